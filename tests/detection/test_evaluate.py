"""A detector's evaluation: every image once on any number of processes, with pycocotools as the referee."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_average_precision import made, referee
from helpers.sets import as_rank
from torch import nn

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.detection import evaluate as evaluation
from lip_resnet.detection.evaluate import coco_metrics, detect, evaluate, read_results, write_results
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.scenes import Scenes
from lip_resnet.evaluation.average_precision import METRICS
from lip_resnet.evaluation.matching import Detections

HOW = {"precision": "float32", "channels_last": True, "mean": (0.5,) * 3, "std": (0.5,) * 3}


class FakeDetector(nn.Module):
    """Boxes at the objects of a scene, moved and scored by the pixels: a function of the image alone."""

    def __init__(self, source: Scenes, sides: dict[tuple[int, ...], int]) -> None:
        super().__init__()
        self.backbone = nn.BatchNorm2d(3)
        self.source, self.by_pixels = source, sides

    def forward(self, images, sizes):
        assert not self.training
        self.backbone(images)
        outputs = []
        for image, (height, width) in zip(images, sizes, strict=True):
            index = self.by_pixels[tuple(image[:, 1, :4].flatten().mul(1000).int().tolist())]
            original = self.source.sizes[index]
            boxes, labels = self.source.annotations(index)
            boxes = torch.from_numpy(boxes) * torch.tensor([width / original[1], height / original[0]] * 2)
            moved = boxes + torch.linspace(-2, 2, boxes.numel()).view_as(boxes)
            scores = torch.sigmoid(image.mean() + torch.arange(len(boxes)))
            outputs.append({"boxes": moved.float(), "scores": scores, "labels": torch.from_numpy(labels) + 1})
        return outputs


@pytest.fixture(scope="module")
def source() -> Scenes:
    return Scenes(train=False, images=11)


def config() -> EvalDetectionDataConfig:
    return EvalDetectionDataConfig(name="digit_scenes", size=64, max_size=96, eval_batch_size=2, workers=0)


@pytest.fixture(scope="module")
def model(source) -> FakeDetector:
    known = {}
    loader = DetectionEvalLoader(source, config())
    for indices, (images, _) in zip(loader.batches, loader, strict=True):
        values = (images.float() / 255 - 0.5) / 0.5
        known |= {
            tuple(image[:, 1, :4].flatten().mul(1000).int().tolist()): index
            for index, image in zip(indices, values, strict=True)
        }
    assert len(known) == 11
    return FakeDetector(source, known)


def on(world: int, model, source, monkeypatch) -> list[Detections]:
    """Every rank's detections: gathered values are those of a first pass, in which each rank gathers alone."""
    own: dict[tuple[int, int], object] = {}
    monkeypatch.setattr(evaluation, "distribute_bn", lambda *arguments, **keywords: None)
    results = []
    for gathers in (False, True):
        results = []
        for rank in range(world):
            as_rank(monkeypatch, rank, world)
            calls = iter(range(9))

            def gather(value, rank=rank, calls=calls, gathers=gathers):
                call = next(calls)
                own[rank, call] = value
                return [own[other, call] for other in range(world)] if gathers else [value] * world

            monkeypatch.setattr(distributed, "gather_objects", gather)
            results.append(detect(model, DetectionEvalLoader(source, config()), **HOW))
    return results


def test_the_same_on_one_two_and_three_processes(source, model, monkeypatch):
    alone = detect(model, DetectionEvalLoader(source, config()), **HOW)
    counts = {image: int((alone.image_ids == image).sum()) for image in source.image_ids}
    assert counts == {image: len(source.annotations(index).labels) for index, image in enumerate(source.image_ids)}
    for world in (2, 3):
        for detections in on(world, model, source, monkeypatch):
            for one, other in zip(alone, detections, strict=True):
                np.testing.assert_array_equal(one, other)


def test_boxes_are_those_of_the_original_image(source, model):
    detections = detect(model, DetectionEvalLoader(source, config()), **HOW)
    first = detections.image_ids == source.image_ids[0]
    boxes = source.annotations(0).boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    assert np.abs(detections.boxes[first] - boxes).max() < 2 * 4 * 192 / 64 + 1e-3
    assert np.abs(detections.boxes[first] - boxes).max() > 1
    assert detections.category_ids[first].tolist() == [label + 1 for label in source.annotations(0).labels]


def test_evaluate_equals_the_referee_and_restores_the_network(source, model):
    model.train()
    figures = evaluate(model, DetectionEvalLoader(source, config()), **HOW)
    assert model.training
    assert not model.backbone._forward_hooks
    assert list(figures) == [*METRICS, "images"]
    assert figures["images"] == 11
    expected = referee(source.ground_truth(), detect(model, DetectionEvalLoader(source, config()), **HOW))
    np.testing.assert_allclose([figures[name] for name in METRICS], expected, rtol=0, atol=1e-9)
    assert 20 < figures["AP"] < 95


def test_both_engines_equal_the_referee(monkeypatch, capsys):
    truth, detections = made(7)
    expected = referee(truth, detections)
    np.testing.assert_allclose(list(coco_metrics(truth, detections).values()), expected, rtol=0, atol=1e-9)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(evaluation, "faster_coco_eval", None)
    np.testing.assert_allclose(list(coco_metrics(truth, detections).values()), expected, rtol=0, atol=1e-9)
    assert capsys.readouterr().err.count("note: faster-coco-eval is not installed (pip install") == 1


def test_detections_as_a_file(tmp_path: Path):
    truth, detections = made(3)
    write_results(tmp_path / "a.json", detections)
    again = read_results(tmp_path / "a.json")
    for one, other in zip(detections, again, strict=True):
        np.testing.assert_array_equal(one, other)
    first = json.loads((tmp_path / "a.json").read_text())[0]
    assert first.keys() == {"image_id", "category_id", "bbox", "score"}
    none = Detections(*(column[:0] for column in detections))
    write_results(tmp_path / "none.json", none)
    assert coco_metrics(truth, read_results(tmp_path / "none.json"))["AP"] == 0
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    bad = ("[", "{}", "3", [1], [{**box, "bbox": [1, 2, 3]}], [{**box, "score": "high"}], [{"image_id": 1}])
    bad = (*bad, [{**box, "image_id": 1.5}], [{**box, "score": "0.5"}])
    for content in (*bad, [{**box, "score": float("nan")}], [box, {**box, "bbox": [1, 2]}]):
        (tmp_path / "b.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError, match=r"b\.json: not detections in COCO's form"):
            read_results(tmp_path / "b.json")
    with pytest.raises(InputError, match="cannot read: No such file"):
        read_results(tmp_path / "absent.json")


def test_outputs_that_are_not_finite_name_their_module(source, model):
    model.backbone.weight.data[1] = torch.nan
    try:
        with pytest.raises(
            FloatingPointError, match=r"digit_scenes/val\[\d+\]: the output of backbone, whose weight is"
        ):
            evaluate(model, DetectionEvalLoader(source, config()), **HOW)
    finally:
        model.backbone.weight.data[1] = 1.0
    assert not model.backbone._forward_hooks

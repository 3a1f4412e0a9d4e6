"""Detections of a set in COCO's layout: the file's ids, its boxes in pixels of the original, and the referee's AP."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.test_average_precision import referee
from PIL import Image
from torch import Tensor, nn

from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.detection.coco import CocoSource
from lip_resnet.detection.evaluate import coco_metrics, detect
from lip_resnet.detection.loaders import DetectionEvalLoader
from lip_resnet.detection.pictures import detect_image

SIZES = {900: (300, 211), 7: (97, 150), 23: (150, 120)}
"""Image id -> width and height, in the order of the file; the second is of the smallest canvas."""
OBJECTS = {
    900: [(90, (10, 20, 200, 150)), (3, (250, 180, 49, 30)), (17, (5, 5, 25, 20))],
    7: [(17, (1, 100, 60, 49))],
    23: [(3, (30, 40, 100, 70)), (90, (100, 1, 31, 31))],
}
"""Image id -> category id and box: x, y, width, height."""
HOW = {"channels_last": False, "mean": (0.0,) * 3, "std": (1.0,) * 3}


class Perfect(nn.Module):
    """The objects of an image, which it knows by the colour, in pixels of the resized image; labels from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        outputs = []
        for image, (height, width) in zip(images, sizes, strict=True):
            number = list(SIZES)[round(image[0, 0, 0].item() * 255) // 50]
            scale = [width / SIZES[number][0], height / SIZES[number][1]] * 2
            boxes = torch.tensor([(x, y, x + w, y + h) for _, (x, y, w, h) in OBJECTS[number]]) * torch.tensor(scale)
            labels = torch.tensor([(3, 17, 90).index(category) + 1 for category, _ in OBJECTS[number]])
            outputs.append({"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.5, len(boxes))})
        return outputs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (image, category, box) in enumerate(
            ((image, *each) for image, objects in OBJECTS.items() for each in objects), 50
        )
    ]
    random.Random(0).shuffle(annotations)
    crowd = {"id": 1, "image_id": 7, "category_id": 3, "bbox": (0, 0, 97, 150), "area": 9000, "iscrowd": 1}
    (tmp_path / "val2017").mkdir()
    for colour, (number, size) in enumerate(SIZES.items()):
        Image.new("RGB", size, (50 * colour,) * 3).save(tmp_path / "val2017" / f"{number}.png")
    images = [{"id": key, "file_name": f"{key}.png", "width": w, "height": h} for key, (w, h) in SIZES.items()]
    categories = [{"id": number, "name": str(number)} for number in (90, 3, 17)]
    (tmp_path / "annotations").mkdir()
    content = {"images": images, "annotations": [*annotations, crowd], "categories": categories}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_ids_and_boxes_are_the_file_s(root):
    data = EvalDetectionDataConfig(root=str(root), size=64, max_size=96, workers=0)
    source = CocoSource(data, "val")
    detections = detect(Perfect(), DetectionEvalLoader(source, data), precision="float32", **HOW)
    expected = [(image, *each) for image, objects in OBJECTS.items() for each in objects]
    assert detections.image_ids.tolist() == [image for image, *_ in expected]
    assert detections.category_ids.tolist() == [category for _, category, _ in expected]
    np.testing.assert_allclose(detections.boxes, [box for *_, box in expected], rtol=0, atol=1e-4)
    truth = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    assert referee(truth, detections)[:3] == pytest.approx([100.0] * 3)
    assert coco_metrics(source.ground_truth(), detections)["AP"] == pytest.approx(100.0)


def test_a_picture_s_detections_are_the_evaluation_s(root):
    """Corners instead of sides, and labels instead of categories."""
    data = EvalDetectionDataConfig(root=str(root), size=64, max_size=96, workers=0, mean=HOW["mean"], std=HOW["std"])
    source = CocoSource(data, "val")
    for index, (number, objects) in enumerate(OBJECTS.items()):
        boxes, labels, scores = detect_image(Perfect(), source[index], data, channels_last=False)
        assert [source.category_ids[label] for label in labels] == [category for category, _ in objects]
        corners = [(x, y, x + w, y + h) for _, (x, y, w, h) in objects]
        np.testing.assert_allclose(boxes, corners, rtol=0, atol=1e-4, err_msg=str(number))
        assert (np.diff(scores) < 0).all()

"""Sizes, canvases and groups, the order of training batches, and what padding does to a network."""

import bisect
import itertools

import numpy as np
import pytest
import torch
from helpers.detection import Pictures, small_detection
from torch import nn

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.detection.canvas import aspect_groups, canvas, eval_batches, prepare, resized
from lip_resnet.detection.loaders import DetectionEvalLoader, DetectionTrainLoader
from lip_resnet.detection.models import build_body, build_detector
from lip_resnet.layers.logits import Gate, InstanceNorm2d
from lip_resnet.layers.pooling import LIP2d

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "expected", "on"),
    [
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 480), (1067, 800), (1088, 800)),
        ((300, 1000), (400, 1333), (416, 1344)),
        ((427, 640), (800, 1199), (800, 1216)),
        ((1, 2000), (1, 1333), (32, 1344)),
    ],
)
def test_sizes(given, expected, on):
    assert resized(*given, 800, 1333) == expected
    assert canvas(*expected) == on


@pytest.mark.parametrize("k", [0, 1, 3])
def test_groups_are_torchvision_s(k):
    sizes = np.random.default_rng(0).integers(50, 1000, (200, 2))
    bounds = (2 ** np.linspace(-1, 1, 2 * k + 1)).tolist() if k else []
    assert aspect_groups(sizes, k).tolist() == [bisect.bisect_right(bounds, width / height) for height, width in sizes]


def test_evaluation_s_batches_hold_one_canvas_each_and_every_image_once():
    sizes = np.random.default_rng(0).integers(50, 200, (60, 2))
    batches = eval_batches(sizes, 64, 96, 4)
    assert sorted(itertools.chain(*batches)) == list(range(60))
    assert max(map(len, batches)) == 4
    for batch in batches:
        assert len({canvas(*resized(*sizes[index].tolist(), 64, 96)) for index in batch}) == 1


def shares(monkeypatch, sizes, world: int, accumulate: int = 1, **changes) -> list[list[list[int]]]:
    """Step -> part over all processes -> images."""
    config = small_detection(data__batch_size=8, **changes).data
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler = DetectionTrainLoader(Pictures(sizes), config, accumulate, 0).sampler
        sampler.epoch = 1
        parts.append([[index for _, index in keys] for keys in sampler])
    steps = len(parts[0]) // accumulate
    return [
        [part for rank in parts for part in rank[step * accumulate : (step + 1) * accumulate]] for step in range(steps)
    ]


def test_a_training_batch_holds_one_group_and_the_same_images_on_any_number_of_processes(monkeypatch):
    sizes = [(60, 60 + 20 * (index % 5)) for index in range(70)]
    alone = shares(monkeypatch, sizes, 1)
    groups = aspect_groups(np.array(sizes), 3)
    assert [len(images) for (images,) in alone] == [8] * 8 + [6]
    assert sorted(index for (images,) in alone for index in images) == list(range(70))
    mixed = [images for (images,) in alone if len({groups[index] for index in images}) > 1]
    assert len(mixed) <= 4  # what remains of five groups of 14
    for world, accumulate in ((2, 1), (2, 2), (4, 1)):
        divided = shares(monkeypatch, sizes, world, accumulate)
        assert [list(itertools.chain(*parts)) for parts in divided] == [images for (images,) in alone]
        assert {len(part) for part in divided[0]} == {8 // (world * accumulate)}
    dropped = shares(monkeypatch, sizes, 1, data__last_batch="drop")
    assert dropped == alone[:-1]
    assert shares(monkeypatch, sizes, 1, data__aspect_groups=0) != alone


def test_a_batch_that_does_not_divide(monkeypatch):
    with pytest.raises(InputError, match="batch_size 8 does not divide by 3 processes"):
        shares(monkeypatch, [(60, 60)] * 16, 3)
    with pytest.raises(InputError, match="last batch has 1 images for 2 parts"):
        shares(monkeypatch, [(60, 60)] * 9, 2)
    with pytest.raises(InputError, match="batch_size 8 is larger than the 5 training images"):
        shares(monkeypatch, [(60, 60)] * 5, 1, data__last_batch="drop")


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_go_with_the_pixels(flip):
    """A white rectangle in a black picture is where its box says, resized, padded and flipped."""

    class Rectangle(Pictures):
        def __getitem__(self, index):
            picture = super().__getitem__(index).point(lambda value: 0)
            height, width = self.sizes[index]
            picture.paste((255, 255, 255), (0, 0, width // 2, height // 4))
            return picture

    source = Rectangle([(128, 64), (96, 96)])
    config = small_detection(data__batch_size=2, data__flip=flip, data__aspect_groups=0).data
    (batch,) = DetectionTrainLoader(source, config, 1, 0).epoch(0)
    ((images, targets),) = batch.parts
    assert images.shape == (2, 3, 96, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert sorted(targets["sizes"]) == [(64, 64), (96, 48)]
    for image, size, boxes, labels in zip(images, *targets.values(), strict=True):
        height, width = size
        rows, columns = (image[0] > 127).nonzero(as_tuple=True)
        seen = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        left = width / 2 if flip else 0
        assert boxes.tolist() == [[left, 0, left + width / 2, height / 4]] == [list(map(float, seen))]
        assert labels.tolist() == [1]


def a_detector(name: str, **backbone: object) -> nn.Module:
    """With logits that are no longer zero."""
    torch.manual_seed(0)
    config = small_detection(model__backbone={"name": name, **backbone}).model
    model = build_detector(config, build_body(config.backbone)).eval()
    for module in model.modules():
        if isinstance(module, LIP2d):
            nn.init.normal_(module.logits.get_submodule("conv").weight, std=0.1)
    return model.to(memory_format=torch.channels_last)


def detect(model: nn.Module, sizes: list[tuple[int, int]], batch_size: int) -> list[dict]:
    """The detections of every picture, in the order of the pictures."""
    source, found = Pictures(sizes), {}
    loader = DetectionEvalLoader(source, small_detection(data__eval_batch_size=batch_size).data)
    half = torch.full((3,), 0.5)
    for indices, (images, areas) in zip(loader.batches, loader, strict=True):
        with torch.no_grad():
            found |= dict(zip(indices, model(prepare(images, areas, CPU, True, half, half), areas), strict=True))
    return [found[index] for index in range(len(sizes))]


@pytest.mark.parametrize("name", ["lip_resnet18", "resnet18"])
def test_boxes_and_scores_are_the_same_alone_and_in_any_batch(name):
    """Images whose sizes differ share a batch where their canvases are equal, and only there."""
    sizes = [(64, 64), (64, 70), (64, 90), (64, 96), (90, 64), (96, 64), (64, 80), (70, 96)]
    model = a_detector(name)
    alone, together = detect(model, sizes, 1), detect(model, sizes, 8)
    assert sum(len(each["scores"]) for each in alone) > 8
    for one, other in zip(alone, together, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist()
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-6)


def test_boxes_do_not_depend_on_the_first_image_that_a_network_has_seen():
    """Of 38 pixels on a canvas of 64: torchvision would take its stride for 2."""
    sizes = [(96, 96)]
    before, after = a_detector("resnet18"), a_detector("resnet18")
    detect(after, [(38, 96)], 1)
    (expected,), (one,) = detect(before, sizes, 1), detect(after, sizes, 1)
    assert len(expected["scores"]) > 1
    assert torch.equal(one["boxes"], expected["boxes"])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("activation", [None, Gate(), nn.ReLU()])
def test_instance_norm_of_the_valid_area(layout, activation):
    """Within the area it is the norm of the image alone, with its gradients, whatever the padding holds."""
    torch.manual_seed(0)
    norm = InstanceNorm2d(8)
    nn.init.normal_(norm.weight)
    areas, images = [(40, 64), (64, 36), (64, 64)], torch.randn(3, 8, 16, 16).to(memory_format=layout)
    images.requires_grad_()
    norm.valid_area = (64, areas)
    together = norm(images, activation)
    together.square().sum().backward()
    gradients, norm.valid_area = norm.weight.grad.clone(), None
    assert together.is_contiguous(memory_format=layout)
    norm.weight.grad = None
    for image, out, gradient, (height, width) in zip(images.detach(), together, images.grad, areas, strict=True):
        h, w = height // 4, width // 4
        alone = image[None, :, :h, :w].clone(memory_format=layout).requires_grad_()
        expected = norm(alone, activation)
        expected.square().sum().backward()
        assert torch.equal(out[:, :h, :w], expected[0])
        assert torch.equal(gradient[:, :h, :w], alone.grad[0])
        for outside in (out[:, h:], out[:, :, w:], gradient[:, h:], gradient[:, :, w:]):
            assert not outside.any()
    torch.testing.assert_close(norm.weight.grad, gradients)


def test_a_network_sees_its_padding_less_with_statistics_of_the_valid_area():
    """How far features inside an image move, relative to their size, when it is padded from 64 to 128 pixels."""
    torch.manual_seed(1)
    image = torch.randn(1, 3, 64, 64)
    padded = torch.zeros(1, 3, 128, 128)
    padded[:, :, :64, :64] = image
    change = {}
    for valid in (True, False):
        model = a_detector("lip_resnet18", valid_statistics=valid)
        with torch.no_grad():
            alone = model.backbone(image.to(memory_format=torch.channels_last), [(64, 64)])["0"]
            both = model.backbone(padded.to(memory_format=torch.channels_last), [(64, 64)])["0"][:, :, :16, :16]
        change[valid] = ((both - alone)[:, :, :8, :8].norm() / alone[:, :, :8, :8].norm()).item()
    assert change[True] < change[False] / 2, change

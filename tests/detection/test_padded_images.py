"""Images of different sizes on one canvas: torchvision's own detections of the images, and norms that stay fixed."""

import pytest
import torch
from helpers.detection import small_detection
from timm.layers import convert_sync_batchnorm
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lip_resnet.detection import models
from lip_resnet.detection.canvas import prepare
from lip_resnet.detection.models import build_body, build_detector

SIZES = [(40, 64), (64, 36)]
ARGS = {
    "faster_rcnn": {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_test": 30, "box_score_thresh": 0.0},
    "retinanet": {"score_thresh": 0.0},
}


class Unchanged(GeneralizedRCNNTransform):
    """torchvision's transform, which only pads."""

    def __init__(self) -> None:
        super().__init__(64, 64, [0.0] * 3, [1.0] * 3)

    def resize(self, image, target=None):
        return image, target


def test_padding_is_zero_after_normalisation():
    pixels = torch.randint(1, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    prepared = prepare(pixels, SIZES, torch.device("cpu"), True, mean, std)
    for image, given, (height, width) in zip(prepared, pixels, SIZES, strict=True):
        expected = (given[:, :height, :width] / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(image[:, :height, :width], expected)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


@pytest.mark.parametrize("kind", ARGS)
def test_losses_and_boxes_within_the_images_are_torchvision_s(kind, monkeypatch):
    """Boxes end where an image ends, not where its canvas does; torchvision is given the images, and pads them."""
    built = []
    build = models._build
    monkeypatch.setattr(models, "_build", lambda *given: built.append(build(*given)) or built[0])
    torch.manual_seed(0)
    config = small_detection(model__backbone={"name": "resnet10t"}, model__name=kind, model__args=ARGS[kind]).model
    model = build_detector(config, build_body(config.backbone))
    theirs = built[0]
    theirs.transform = Unchanged()
    if kind == "retinanet":  # class 0, the background, which torchvision would return too
        model.head.classification_head.cls_logits.bias.data.view(9, 11)[:, 0] = -100
    images = [torch.randn(3, *size) for size in SIZES]
    together = torch.zeros(2, 3, 64, 64)
    for padded, image, (height, width) in zip(together, images, SIZES, strict=True):
        padded[:, :height, :width] = image
    boxes = ([[4.0, 4, 30, 38], [20, 8, 60, 40]], [[1.0, 2, 33, 60]])
    targets = [{"boxes": torch.tensor(each), "labels": torch.arange(1, len(each) + 1)} for each in boxes]

    def run(network: nn.Module, *inputs: object, training: bool) -> object:
        for module in network.train(training).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        torch.manual_seed(1)
        return network(*inputs)

    ours = run(model, together, SIZES, targets, training=True)
    expected = run(theirs, images, targets, training=True)
    prefix = "loss_" if kind == "retinanet" else ""
    assert {name: loss.item() for name, loss in ours.items()} == {
        f"{prefix}{name}": loss.item() for name, loss in expected.items()
    }
    with torch.no_grad():
        ours, expected = run(model, together, SIZES, training=False), run(theirs, images, training=False)
    for one, other, (height, width) in zip(ours, expected, SIZES, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert (one["boxes"] <= torch.tensor([width, height] * 2)).all()


@pytest.mark.parametrize(("norm", "fixed"), [("batch", ("conv1.", "bn1.", "layer1.")), ("eval", ""), ("frozen", "")])
def test_fixed_statistics_stay_fixed_in_sync_batch_norm(norm, fixed):
    """Of frozen stages, or of the whole backbone; which parameters are trained does not change."""
    backbone = {"name": "resnet10t", "weights": "any", "frozen": ["stem", "stage1"], "norm": norm}
    config = small_detection(model__backbone=backbone).model
    model = build_detector(config, build_body(config.backbone))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    converted = convert_sync_batchnorm(model).train()
    assert {name for name, parameter in converted.named_parameters() if parameter.requires_grad} == trained
    body = converted.backbone.body
    norms = {f"{name}.": each for name, each in body.named_modules() if "BatchNorm" in type(each).__name__}
    assert {type(each) for each in norms.values()} == {nn.SyncBatchNorm}
    assert {name for name, each in norms.items() if not each.training} == {
        name for name in norms if name.startswith(fixed)
    }

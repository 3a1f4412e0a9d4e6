"""The detectors against torchvision's own, what is fixed in them, and the weights that they start from."""

import itertools

import pytest
import timm
import torch
from helpers import small_config
from helpers.detection import small_detection
from torch import nn
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align

from lip_resnet import checkpoint
from lip_resnet.commands.detection import load_backbone_weights
from lip_resnet.config import InputError
from lip_resnet.detection import models
from lip_resnet.detection.canvas import canvas
from lip_resnet.detection.models import CanvasRoIAlign, build_body, build_detector, find_stages, stage_modules
from lip_resnet.models import registry

SIZES = [(64, 64), (64, 64)]
SMALL = {"model__backbone": {"name": "resnet10t"}}


def a_detector(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = small_detection(**changes).model
    return build_detector(config, build_body(config.backbone))


def targets() -> list[dict[str, torch.Tensor]]:
    boxes = [[[4.0, 4, 30, 40], [20, 8, 60, 60]], [[10.0, 2, 50, 20]]]
    return [{"boxes": torch.tensor(each), "labels": torch.arange(1, len(each) + 1)} for each in boxes]


class Padded(GeneralizedRCNNTransform):
    """torchvision's transform without resizing and normalisation."""

    def __init__(self) -> None:
        super().__init__(64, 64, [0.0] * 3, [1.0] * 3)

    def resize(self, image, target=None):
        return image, target


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("faster_rcnn", {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_test": 30}),
        ("retinanet", {"score_thresh": 0.001}),
    ],
)
def test_losses_and_detections_are_torchvision_s(kind, args, monkeypatch):
    """torchvision's own forward of the same modules, on images that need no resizing."""
    built = []
    build = models._build
    monkeypatch.setattr(models, "_build", lambda *given: built.append(build(*given)) or built[0])
    model = a_detector(model__name=kind, model__args=args, **SMALL)
    theirs = built[0]
    theirs.transform = Padded()
    images = torch.randn(2, 3, 64, 64)

    def run(network: nn.Module, *inputs: object, training: bool) -> object:
        """From the same statistics, with the same samples of proposals."""
        for module in network.train(training).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        torch.manual_seed(1)
        return network(*inputs)

    losses = run(model, images, SIZES, targets(), training=True)
    expected = run(theirs, list(images), targets(), training=True)
    prefix = "" if kind == "faster_rcnn" else "loss_"
    assert tuple(losses) == model.loss_names
    assert {name: loss.item() for name, loss in losses.items()} == {
        f"{prefix}{name}": loss.item() for name, loss in expected.items()
    }
    if kind == "retinanet":  # class 0, the background, has logits that are trained to be low
        first = model.head.classification_head.cls_logits.bias.data.view(9, 11)[:, 0]
        first.fill_(-100)
    ours = run(model, images, SIZES, training=False)
    assert sum(len(each["scores"]) for each in ours) > 0
    for one, other in zip(ours, run(theirs, list(images), training=False), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    if kind == "retinanet":
        first.fill_(100)
        for one, other in zip(ours, run(model, images, SIZES, training=False), strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_anchors_are_torchvision_s():
    default = [32, 64, 128, 256, 512]
    network = a_detector(model__name="retinanet", model__args={}, model__anchor_sizes=default, **SMALL).network[0]
    assert network.anchor_generator.sizes == retinanet._default_anchorgen().sizes
    model = a_detector(model__anchor_sizes=default, **SMALL)
    generator = model.rpn.anchor_generator
    assert generator.sizes == faster_rcnn._default_anchorgen().sizes
    assert generator.aspect_ratios == faster_rcnn._default_anchorgen().aspect_ratios
    assert isinstance(model.roi_heads.box_roi_pool, CanvasRoIAlign)


@pytest.mark.parametrize("sides", [(40, 40), (33, 128), (64, 64), (16, 20)])
def test_boxes_of_small_images_are_pooled_at_the_features_strides(sides):
    """As roi_align at 1/4, whatever part of its canvas an image covers; other images before it change nothing."""
    features = {str(level): torch.randn(1, 8, *(side >> level + 2 for side in canvas(*sides))) for level in range(4)}
    boxes = [torch.tensor([[1.0, 2, 14, 13], [3, 3, 9, 15.5]])]
    pool = CanvasRoIAlign(["0", "1", "2", "3"], 7, 2)
    for sizes in ([sides], [(33, 33)]):
        expected = roi_align(features["0"], boxes, 7, 1 / 4, 2)
        torch.testing.assert_close(pool(features, boxes, sizes), expected, rtol=0, atol=0)


def test_boxes_are_not_rounded_under_autocast():
    """A bfloat16 box near x = 1000 would be a multiple of 4 pixels."""
    model = a_detector(**SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (result,) = model(torch.randn(1, 3, 64, 1024), [(64, 1024)])
    assert result["boxes"].dtype == torch.float32
    far = result["boxes"][result["boxes"] > 512]
    assert len(far)
    assert (far != far.bfloat16()).float().mean() > 0.5


@pytest.mark.parametrize("name", ["lip_resnet18", "resnet18"])
def test_what_is_frozen(name, tmp_path):
    """The stem with LIP's logits and stage 1 keep weights and statistics in a training step; all else is trained."""
    start = build_body(small_detection(model__backbone={"name": name}).model.backbone)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    frozen = ("conv1.", "bn1.", "pool.", "layer1.")
    for norm in ("batch", "frozen", *["eval"] * (name == "resnet18")):
        backbone = {"name": name, "weights": str(tmp_path / "start.pt"), "frozen": ["stem", "stage1"], "norm": norm}
        model = a_detector(model__backbone=backbone).train()
        for module in model.modules():
            if hasattr(module, "zero_init_last"):
                module.bn2.weight.data.fill_(0.5)
        before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
        sum(model(torch.randn(2, 3, 64, 64), SIZES, targets()).values()).backward()
        for key, parameter in model.backbone.body.named_parameters():
            is_norm = ".bn" in f".{key}" or key.startswith("bn") or "downsample.bn" in key or "downsample.1" in key
            fixed = key.startswith(frozen) or (norm == "frozen" and is_norm)
            assert (parameter.grad is None) == fixed, key
        for key, value in model.backbone.body.state_dict().items():
            moved = ("running" in key or "tracked" in key) and norm == "batch" and not key.startswith(frozen)
            assert torch.equal(value, before[key]) != moved, key
        assert all(parameter.grad is not None for key, parameter in model.named_parameters() if "body" not in key)


@pytest.mark.parametrize("name", ["lip_resnet18", "mobilenetv3_small_050"])
def test_stages_of_other_networks(name):
    """Every module with parameters is in one stage, or after the last; what no feature needs is known."""
    body = registry.build_model(small_config(model__name=name).model)
    stages, unused = find_stages(body, name)
    members = stage_modules(body, [module for _, module, _ in stages])
    assert list(members) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    owners = [key for key, module in body.named_modules() if any(True for _ in module.parameters(recurse=False))]
    in_order = list(itertools.chain(*members.values()))
    assert in_order == owners[: len(in_order)]
    assert {key.rpartition(".")[0] for key in unused} == set(owners[len(in_order) :])
    if name == "lip_resnet18":
        assert members["stem"] == ["conv1", "bn1", "pool.logits.conv", "pool.logits.norm"]
        assert {key.split(".")[0] for key in members["stage3"]} == {"layer3"}
        assert unused == ["fc.weight", "fc.bias"]
    if name == "mobilenetv3_small_050":
        assert any(key.startswith("conv_head") for key in unused)


def test_a_network_for_images_of_one_size_is_refused():
    with torch.device("meta"):
        body = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(
        InputError, match=r"swin\S+ has no features of 128x64 images: .*\(224\).*; a detector needs a network"
    ):
        find_stages(body, "swin_tiny_patch4_window7_224")


def test_group_norm_in_the_place_of_batch_norm():
    model = a_detector(model__backbone={"norm": "group"})
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    assert {type(norm) for norm in norms} == {nn.GroupNorm}
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}
    assert not model.backbone.body.layer1[0].bn2.weight.any()  # blocks still start as their shortcuts
    sum(model(torch.randn(2, 3, 64, 64), SIZES, targets()).values()).backward()


def test_weights_of_a_classification(tmp_path):
    """A run's weights, of any number of classes; its recipe must have the same normalisation."""
    config = small_config(model__name="lip_resnet18", model__num_classes=7)
    trained = registry.build_model(config.model)
    payload = {"model": trained.state_dict(), "ema": None, "step": 9, "processes": [1]}
    checkpoint.save(tmp_path / "last.pt", {**payload, "config": config.model_dump(mode="json")})
    recipe = small_detection(model__backbone={"weights": str(tmp_path / "last.pt")})
    body = build_body(recipe.model.backbone)
    record = load_backbone_weights(body, recipe)
    assert record["training"]["step"] == 9
    for key, value in trained.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(body.state_dict()[key], value), key
    other = small_detection(data__mean=[0.5] * 3, model__backbone={"weights": str(tmp_path / "last.pt")})
    with pytest.raises(InputError, match=r"trained with data.mean=\[0.485, .*model.convert: true"):
        load_backbone_weights(body, other)


def test_weights_of_a_detector_are_refused(tmp_path):
    recipe = small_detection(model__backbone={"weights": str(tmp_path / "last.pt")})
    payload = {"model": a_detector().state_dict(), "config": recipe.model_dump(mode="json"), "step": 1}
    checkpoint.save(tmp_path / "last.pt", payload)
    with pytest.raises(InputError, match=r"last.pt is of task: detection; a network starts from the weights of a cl"):
        load_backbone_weights(build_body(recipe.model.backbone), recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__backbone": {"name": "vit_tiny_patch16_224"}}, "has features at 16; a detector needs a network with"),
        (
            {"model__backbone": {"name": "hrnet_w18_small", "weights": "x", "frozen": ["stem"]}},
            "does not say which modules",
        ),
        ({"model__backbone": {"name": "mobilenetv3_small_050", "norm": "group"}}, "can be replaced"),
        (
            {**SMALL, "model__args": {"box_detections": 3}},
            "FasterRCNN has no number box_detections; allowed: box_batch_size",
        ),
        ({**SMALL, "model__args": {"min_size": 3}}, "FasterRCNN has no number min_size"),
        ({**SMALL, "model__args": {"box_score_thresh": "low"}}, "box_score_thresh: given 'low'; it must be a number"),
        ({"model__backbone": {"norm": "frozen"}}, "norm: frozen needs weights to keep"),
        ({"model__backbone": {"norm": "eval", "frozen": ["stem"]}}, "norm: eval needs weights to keep"),
        ({"model__backbone": {"frozen": ["stem"]}}, r"frozen: \[stem\] needs weights to keep"),
        ({"model__backbone": {"frozen": ["layer1"]}}, "model.backbone.frozen.0: given 'layer1'"),
        ({"model__anchor_sizes": [8, 16]}, "anchor_sizes are .8, 16.; there must be 5"),
        ({"train__mixup": 0.2}, "train.mixup: unknown key"),
        ({"optim__layer_decay": 0.8}, "optim.layer_decay is not for task: detection"),
        ({"train__compile": True}, "train.compile is not for task: detection"),
        ({"data__size": 128}, "size 128 is larger than max_size 96"),
        ({"data__name": "coco"}, "data.name: coco needs the directory that holds train2017/, val2017/ and annotations"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        a_detector(**changes)

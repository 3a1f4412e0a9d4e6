"""torchvision's Faster R-CNN and RetinaNet on a feature pyramid over LIP-ResNets and timm's networks."""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from lip_resnet.compat import tree_map_only
from lip_resnet.config import BackboneConfig, DetectorConfig, InputError, ModelConfig
from lip_resnet.detection.canvas import Sizes
from lip_resnet.layers.logits import InstanceNorm2d
from lip_resnet.models import registry

STRIDES = (4, 8, 16, 32)
GROUPS = 32
_RATIOS = (0.5, 1.0, 2.0)


class Backbone(nn.Module):
    """Images (B, 3, H, W), H and W multiples of 32 -> name of a level: features (B, channels, H / s, W / s).

    A classifier's network without its classifier, and a feature pyramid on its features of ``strides``.

    Args:
        body: the network; ``forward_intermediates`` returns its features.
        config: which of its norms and stages are fixed.
        channels: of the pyramid.
        strides: those of ``STRIDES`` that the pyramid is built on.
        extra: makes the levels after the last.

    Raises:
        InputError: the body has no features at ``STRIDES``, or a norm cannot be replaced.
    """

    def __init__(
        self, body: nn.Module, config: BackboneConfig, channels: int, strides: tuple[int, ...], extra: nn.Module
    ) -> None:
        super().__init__()
        stages, unused = find_stages(body, config.name)
        if config.norm == "group":
            use_group_norm(body)
        self.indices = [index for stride, (index, _, _) in zip(STRIDES, stages, strict=True) if stride in strides]
        widths = [width for stride, (_, _, width) in zip(STRIDES, stages, strict=True) if stride in strides]
        for name in unused:
            body.get_parameter(name).requires_grad_(False)
        members = stage_modules(body, [module for _, module, _ in stages])
        if config.frozen and not all(members.values()):
            raise InputError(
                f"model.backbone.frozen: {config.name} does not say which modules are its stem and stages; leave it out"
            )
        self.fixed = tuple(name for stage in config.frozen for name in members[stage])
        for name in self.fixed:
            body.get_submodule(name).requires_grad_(False)
        if config.norm == "frozen":
            for module in batch_norms(body):
                module.requires_grad_(False)
        self.fixed_statistics, self.valid_only = config.norm in ("frozen", "eval"), config.valid_statistics
        self.body = body
        self.out_channels = channels
        self.fpn = FeaturePyramidNetwork(widths, channels, extra)

    def train(self, mode: bool = True) -> "Backbone":
        """As ``nn.Module``'s; batch norms of fixed statistics keep them in training too."""
        super().train(mode)
        fixed = [self.body] if self.fixed_statistics else [self.body.get_submodule(name) for name in self.fixed]
        for module in fixed:
            for norm in batch_norms(module):
                norm.eval()
        return self

    def instance_norms(self) -> list[InstanceNorm2d]:
        """The instance norms that take their statistics from the valid areas alone."""
        return [each for each in self.body.modules() if isinstance(each, InstanceNorm2d)] if self.valid_only else []

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> OrderedDict[str, Tensor]:
        for norm in self.instance_norms():
            norm.valid_area = None if sizes is None else (images.shape[-2], sizes)
        forward_intermediates: Any = self.body.forward_intermediates
        features = forward_intermediates(images, indices=self.indices, intermediates_only=True)
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(features)))


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Every batch norm of a module, itself included."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return (each for each in module.modules() if isinstance(each, kinds))


def find_stages(body: nn.Module, name: str) -> tuple[list[tuple[int, str, int]], list[str]]:
    """The features of a network at ``STRIDES``: index in ``forward_intermediates``, name of the module, channels; and
    the names of the parameters that none of them depends on.

    Raises:
        InputError: it has none there.
    """
    allowed = "a detector needs a network with features at strides 4, 8, 16 and 32, such as a ResNet"
    infos = list(getattr(body, "feature_info", None) or [])
    by_stride = {info["reduction"]: (index, info["module"], info["num_chs"]) for index, info in enumerate(infos)}
    if not by_stride.keys() >= set(STRIDES):
        strides = ", ".join(map(str, sorted(by_stride))) or "no stride that timm knows"
        raise InputError(f"model.backbone.name: {name} has features at {strides}; {allowed}")
    stages = [by_stride[stride] for stride in STRIDES]
    try:
        trial: Any = copy.deepcopy(body).to("meta")
        indices = [index for index, _, _ in stages]
        images = torch.empty(2, 3, 128, 64, device="meta")
        features = trial.forward_intermediates(images, indices=indices, intermediates_only=True)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:  # timm's, for want of a feature or size
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.backbone.name: {name} has no features of 128x64 images: {reason}; {allowed}"
        ) from error
    expected = [(width, 128 // stride, 64 // stride) for stride, (_, _, width) in zip(STRIDES, stages, strict=True)]
    if [tuple(feature.shape[1:]) for feature in features] != expected:
        raise InputError(f"model.backbone.name: {name} has features of other sizes at its strides; {allowed}")
    torch.autograd.backward([feature.sum() for feature in features])
    return stages, [name for name, parameter in trial.named_parameters() if parameter.grad is None]


def stage_modules(body: nn.Module, ends: Sequence[str]) -> dict[str, list[str]]:
    """Stage (stem, stage1 to stage4) -> names of its modules that have parameters of their own.

    The stem is all before the first of ``ends``, the modules that are or end stages 1 to 4: its pooling too, and so the
    logits of LIP there. What is between two of them belongs to the later one, what is after the last to none.
    """
    members: dict[str, list[str]] = {stage: [] for stage in ("stem", "stage1", "stage2", "stage3", "stage4", "head")}
    stages, last = list(members), 0
    for name, module in body.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            inside = [number for number, end in enumerate(ends, start=1) if f"{name}.".startswith(f"{end}.")]
            stage = inside[0] if inside else last and last + 1
            last = max(last, *inside, 0)
            members[stages[stage]].append(name)
    return {stage: members[stage] for stage in stages[:-1]}


def use_group_norm(body: nn.Module) -> None:
    """Replace every batch norm by a group norm of ``GROUPS`` groups with its affine map.

    Raises:
        InputError: its channels do not divide by the groups, or it is more than a batch norm.
    """
    for name, module in list(body.named_modules()):
        if not isinstance(module, nn.BatchNorm2d):
            continue
        if type(module) is not nn.BatchNorm2d or module.num_features % GROUPS:
            raise InputError(
                f"model.backbone.norm: group: {name} is a {type(module).__name__} of {module.num_features} channels; "
                f"a batch norm of a multiple of {GROUPS} channels can be replaced"
            )
        norm = nn.GroupNorm(GROUPS, module.num_features, eps=module.eps)
        norm.load_state_dict({"weight": module.weight.detach(), "bias": module.bias.detach()})
        parent, _, child = name.rpartition(".")
        setattr(body.get_submodule(parent), child, norm)


class Detector(nn.Module):
    """A detector of torchvision on images that are normalised, padded to one canvas and zero outside their valid area.

    Args:
        network: torchvision's detector, whose own resizing and normalisation are not used.
    """

    loss_names: tuple[str, ...]
    """The losses that ``forward`` returns in training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone: Backbone = network.get_submodule("backbone")  # type: ignore[assignment]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone's network in the backward pass: less memory."""
        body: Any = self.backbone.body
        body.set_grad_checkpointing(enable)

    def forward(
        self, images: Tensor, sizes: Sizes, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        Args:
            images: (B, 3, H, W) float.
            sizes: of the valid areas.
            targets: in training, of every image ``boxes`` (n, 4) float32, pixels of the resized image, and ``labels``
                (n,) int64, from 1.

        Returns:
            In training, ``loss_names`` -> (). In evaluation of every image, by falling score: ``boxes`` (k, 4)
            x1, y1, x2, y2 in pixels of the resized image, ``scores`` (k,), and ``labels`` (k,), from 1.
        """
        raise NotImplementedError


class CanvasRoIAlign(MultiScaleRoIAlign):
    """torchvision's, which infers the strides of the features from the first images: here from their canvas.

    An image of 40 pixels has a canvas of 64: features of 16 pixels would pass for those of stride 2.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        height, width = x["0"].shape[-2:]
        return super().forward(x, boxes, [(height * STRIDES[0], width * STRIDES[0])])


class FasterRCNN(Detector):
    """torchvision's Faster R-CNN, see ``Detector``."""

    loss_names = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")

    def __init__(self, network: detection.FasterRCNN) -> None:
        super().__init__(network)
        self.rpn, self.roi_heads = network.rpn, network.roi_heads
        for head in (self.rpn.head, self.roi_heads.box_predictor):
            head.register_forward_hook(_to_float32)

    def forward(
        self, images: Tensor, sizes: Sizes, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        features = self.backbone(images, sizes)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, losses = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **rpn_losses} if self.training else detections


class RetinaNet(Detector):
    """torchvision's RetinaNet, see ``Detector``."""

    loss_names = ("loss_classification", "loss_bbox_regression")

    def __init__(self, network: detection.RetinaNet) -> None:
        super().__init__(network)
        self.head = network.head
        self.head.register_forward_hook(_to_float32)
        self.network = [network]  # for its functions, not as a module: its parameters are those above

    def forward(
        self, images: Tensor, sizes: Sizes, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        network, features = self.network[0], list(self.backbone(images, sizes).values())
        outputs = self.head(features)
        anchors = network.anchor_generator(ImageList(images, sizes), features)
        if self.training:
            losses = network.compute_loss(targets, outputs, anchors)
            return {f"loss_{name}": loss for name, loss in losses.items()}
        per_anchor = outputs["cls_logits"].size(1) // sum(feature[0, 0].numel() for feature in features)
        counts = [feature[0, 0].numel() * per_anchor for feature in features]
        outputs["cls_logits"][..., 0] = -math.inf  # labels are from 1
        outputs = {name: list(output.split(counts, dim=1)) for name, output in outputs.items()}
        return network.postprocess_detections(outputs, [list(each.split(counts)) for each in anchors], sizes)


def _to_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Outputs of a head in float32: boxes of a bfloat16 head would be rounded to whole pixels and more."""
    return tree_map_only(Tensor, Tensor.float, outputs)


def build_body(config: BackboneConfig) -> nn.Module:
    """The backbone's network as a classifier, initialised; the caller loads ``config.weights``.

    Raises:
        InputError: as ``registry.build_model``.
    """
    keys = ("name", "args", "downsampling", "circular_padding")
    return registry.build_model(ModelConfig(**{key: getattr(config, key) for key in keys}))


def build_detector(config: DetectorConfig, body: nn.Module) -> FasterRCNN | RetinaNet:
    """The detector of a recipe.

    Args:
        body: from ``build_body``, with its weights; its classifier is removed.

    Raises:
        InputError: the body has no features at strides 4 to 32, or ``config.args`` are not keywords of the detector.
    """
    reset_classifier: Any = body.reset_classifier
    reset_classifier(0, "")
    sizes, channels = config.anchor_sizes, config.fpn_channels
    if config.name == "faster_rcnn":
        backbone = Backbone(body, config.backbone, channels, STRIDES, LastLevelMaxPool())
        keywords = {
            "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in sizes), (_RATIOS,) * 5),
            "box_roi_pool": CanvasRoIAlign(["0", "1", "2", "3"], 7, 2),
            "box_head": TwoMLPHead(channels * 7**2, config.head_channels),
            "box_predictor": FastRCNNPredictor(config.head_channels, config.num_classes + 1),
        }
        return FasterRCNN(_build(detection.FasterRCNN, backbone, None, keywords, config.args))
    backbone = Backbone(body, config.backbone, channels, STRIDES[1:], LastLevelP6P7(channels, channels))
    octaves = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in sizes)
    generator = {"anchor_generator": AnchorGenerator(octaves, (_RATIOS,) * 5)}
    return RetinaNet(_build(detection.RetinaNet, backbone, config.num_classes + 1, generator, config.args))


def _build(kind: Any, backbone: Backbone, classes: int | None, keywords: dict[str, Any], args: dict[str, Any]) -> Any:
    """torchvision's detector; ``args`` must be among its keywords that are numbers, since it ignores unknown ones."""
    defaults = {name: each.default for name, each in inspect.signature(kind).parameters.items()}
    numbers = {name: value for name, value in defaults.items() if type(value) in (int, float)}
    allowed = numbers.keys() - {"min_size", "max_size"}
    for name, value in args.items():
        if name not in allowed:
            raise InputError(f"model.args: {kind.__name__} has no number {name}; allowed: {', '.join(sorted(allowed))}")
        if type(value) not in {int, type(numbers[name])} or value < 0:
            raise InputError(
                f"model.args.{name}: given {value!r}; it must be a number of the kind of its default, {numbers[name]}"
            )
    return kind(backbone, classes, **keywords, **args)

"""The recipe of ``task: detection``: the detector, its images, and the loop of every task."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from lip_resnet.config.fields import (
    Colour,
    Count,
    Evaluates,
    Fraction,
    Neutral,
    Positive,
    Section,
    Trains,
    check_mean_and_std,
)
from lip_resnet.config.model import NetworkConfig
from lip_resnet.config.recipe import Recipe

Stage = Literal["stem", "stage1", "stage2", "stage3", "stage4"]


class BackboneConfig(NetworkConfig):
    """The network whose features are detected on: the only section in which a LIP recipe and its baseline differ."""

    norm: Trains[Literal["batch", "frozen", "eval", "group"]] = "batch"
    """Batch norm as in training (with train.sync_bn over all processes); frozen: the statistics and affine map of
    `weights`; eval: its statistics, and the affine map is trained, as mmdetection's norm_eval; group: a group norm of
    32 groups in its place, for training from random weights in small batches."""
    frozen: Trains[Annotated[tuple[Stage, ...], Field(strict=False, examples=[["stem", "stage1"]])]] = ()
    """Stages that are not trained, with all their layers: of a LIP network the logit modules too."""
    valid_statistics: Trains[bool] = False
    """Instance norms (of LIP's logits) take their statistics from the image alone, not from its padding too."""

    @model_validator(mode="after")
    def _check_backbone(self) -> "BackboneConfig":
        fixed = self.norm in ("frozen", "eval")
        if not self.weights and (fixed or self.frozen):
            key = f"norm: {self.norm}" if fixed else f"frozen: [{', '.join(self.frozen)}]"
            raise ValueError(f"{key} needs weights to keep; give weights, or train all with norm: batch or group")
        return self


class DetectorConfig(Section):
    """The detector."""

    name: Trains[Literal["faster_rcnn", "retinanet"]] = "faster_rcnn"
    """torchvision's detector, on a feature pyramid (FPN)."""
    num_classes: Trains[Positive] = 80
    """Classes without the background; the data must have as many."""
    backbone: BackboneConfig
    fpn_channels: Trains[Positive] = 256
    """Channels of the feature pyramid."""
    head_channels: Trains[Positive] = 1024
    """For `faster_rcnn`: channels of the two layers of the box head."""
    anchor_sizes: Trains[Annotated[tuple[Positive, ...], Field(strict=False, examples=[[32, 64, 128, 256, 512]])]] = (
        *(32, 64, 128, 256, 512),
    )
    """Side of the anchors of each of the five levels, pixels of the resized image."""
    args: Trains[dict[str, JsonValue]] = Field(default_factory=dict, examples=[{"box_detections_per_img": 100}])
    """Further keyword arguments of torchvision's detector, such as box_detections_per_img: 100."""

    @model_validator(mode="after")
    def _check_detector(self) -> "DetectorConfig":
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes are {list(self.anchor_sizes)}; there must be 5, one for each level")
        return self


class EvalDetectionDataConfig(Section):
    """Images with boxes, and how an evaluation reads them."""

    name: Trains[Literal["coco", "digit_scenes"]] = "coco"
    """coco: COCO's layout, or any set in its form; digit_scenes: scikit-learn's digits on a canvas, embedded."""
    root: Neutral[str | None] = None
    """For `coco`: the directory that holds the image folders and annotations/."""
    train_split: Trains[str] = "train2017"
    """For `coco`: the folder of the training images below root."""
    val_split: Evaluates[str] = "val2017"
    """For `coco`: the folder of the validation images below root."""
    train_annotations: Neutral[str | None] = None
    """For `coco`: the annotations below root; null: annotations/instances_<train_split>.json."""
    val_annotations: Neutral[str | None] = None
    """For `coco`: the annotations below root; null: annotations/instances_<val_split>.json."""
    images: Trains[Positive] = 1000
    """For `digit_scenes`: the number of training scenes; validation has a fifth as many."""
    size: Trains[Positive] = 800
    """The shorter side of every image is resized to this, pixels, unless the longer would exceed max_size."""
    max_size: Trains[Positive] = 1333
    """The longer side of a resized image is at most this, pixels."""
    mean: Trains[Colour] = (0.485, 0.456, 0.406)
    """Mean of each channel (R, G, B) for normalisation, of pixels scaled to [0, 1]."""
    std: Trains[Colour] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel (R, G, B) for normalisation, of pixels scaled to [0, 1]."""
    eval_batch_size: Neutral[Positive] = 8
    """Images per batch and process in evaluation, at most: only images of one canvas share a batch."""
    workers: Neutral[Count] = 8
    """Loader worker processes per training process; 0 loads in the training process itself."""

    @model_validator(mode="after")
    def _check_images(self) -> "EvalDetectionDataConfig":
        if self.name == "coco" and not self.root:
            raise ValueError(
                f"root is missing; data.name: coco needs the directory that holds {self.train_split}/, "
                f"{self.val_split}/ and annotations/"
            )
        if self.size > self.max_size:
            raise ValueError(f"size {self.size} is larger than max_size {self.max_size}, its maximum")
        check_mean_and_std(self.mean, self.std)
        return self


class DetectionDataConfig(EvalDetectionDataConfig):
    """Images with boxes: the keys of evaluation, and those of training."""

    batch_size: Trains[Positive]
    """Images per optimizer step over all processes and accumulated parts: a multiple of processes x accumulate."""
    last_batch: Trains[Literal["keep", "drop"]] = "keep"
    """The remaining images of an epoch, fewer than batch_size. keep: one smaller step; drop: no step."""
    flip: Trains[Fraction] = 0.5
    """Probability of a horizontal flip."""
    aspect_groups: Trains[Count] = 3
    """A batch holds images of one group of aspect ratios, so that padding is small: k: torchvision's 2 k + 2 groups
    between 1:2 and 2:1 and beyond; 0: batches of any images."""
    on_error: Neutral[Literal["stop", "skip"]] = "stop"
    """A training image that cannot be decoded. stop: end with its path; skip: its batch is one image smaller; the image
    is counted and listed, and not replaced by another. Validation always stops."""

    @property
    def repeats(self) -> int:
        """No repeated augmentation."""
        return 1


class DetectionConfig(Recipe):
    """A recipe of detection."""

    task: Literal["detection"] = "detection"
    model: DetectorConfig
    data: DetectionDataConfig

    @model_validator(mode="after")
    def _check_task(self) -> "DetectionConfig":
        if self.train.compile:
            raise ValueError("train.compile is not for task: detection, whose images have many sizes; leave it out")
        if self.optim.layer_decay < 1:
            raise ValueError(
                "optim.layer_decay is not for task: detection: timm has no layers of a detector; leave it out"
            )
        return self

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As pydantic's, with the task first."""
        tree = super().model_dump(**options)
        return {"task": tree.pop("task"), **tree}

"""The ``data`` section of a recipe: the keys of an evaluation, and with training's the whole section."""

import math
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from lip_resnet.config.fields import (
    Colour,
    Count,
    Evaluates,
    Fraction,
    Neutral,
    NonNegative,
    Patterns,
    Positive,
    Range,
    Section,
    Trains,
    check_mean_and_std,
)

SizeFrom = Annotated[tuple[Count, Positive], Field(strict=False)]
TorchvisionSet = Literal[
    "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn", "stl10", "gtsrb",
    "imagenette", "flowers102", "food101", "pets", "dtd", "aircraft", "country211",
]  # fmt: skip


class EvalDataConfig(Section):
    """A set of images, and how an evaluation reads it."""

    name: Trains[Literal["folder", "shards", "huggingface", "digits", "synthetic", TorchvisionSet]] = "folder"
    """folder: class folders under root/train and root/val; shards: tar files there, in WebDataset layout; huggingface:
    a table; digits: scikit-learn's, embedded; synthetic: noise; the others: torchvision's sets."""
    root: Neutral[str | None] = None
    """For `folder` and `shards`: the directory that holds train/ and val/, for `shards` perhaps behind a URL. For
    `huggingface`: a folder of Parquet files, or the hub's name. For torchvision's sets: where they are downloaded."""
    train: Neutral[Patterns] = ()
    """For `shards`: those of the training split, names or brace patterns below root, such as
    imagenet-train-{0000..1023}.tar; one, or a list. Without it, all in root/train."""
    val: Neutral[Patterns] = ()
    """For `shards`: those of the validation split, as `train`. Without it, all in root/val."""
    download: Neutral[bool] = False
    """Download a torchvision set that is not at `root`."""
    label_column: Trains[str | None] = None
    """For `huggingface`: the label column; needed if there are several."""
    classes: Neutral[str | None] = None
    """A text file that selects class folders or training images (folder/name or name), one a line. Validation keeps
    every image of the classes. Runs are compared by the selected images, not by this path."""
    images: Trains[Positive] = 12800
    """For `synthetic`: the number of training images; validation has a tenth as many."""
    eval_batch_size: Neutral[Positive] = 256
    """Images per batch and process in evaluation."""
    eval_size: Evaluates[Positive] = 224
    """Side of the centre crop in evaluation, pixels."""
    eval_resize: Evaluates[Positive] = 256
    """In evaluation an image's shorter side is resized to this before the crop, pixels (which side: `crop_mode`)."""
    crop_mode: Evaluates[Literal["center", "squash", "border"]] = "center"
    """What evaluation resizes to eval_resize before its centre crop, as in timm. center: the shorter side; squash: both
    sides; border: the longer side, and the rest of eval_size is padded with the mean colour."""
    interpolation: Trains[Literal["bilinear", "bicubic"]] = "bilinear"
    """Interpolation of every resize, with PIL's antialiasing."""
    mean: Trains[Colour] = (0.485, 0.456, 0.406)
    """Mean of each channel (R, G, B) for normalisation, of pixels scaled to [0, 1]."""
    std: Trains[Colour] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel (R, G, B) for normalisation, of pixels scaled to [0, 1]."""
    workers: Neutral[Count] = 8
    """Loader worker processes per training process; 0 loads in the training process itself."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> "EvalDataConfig":
        if self.name not in ("digits", "synthetic") and not self.root:
            needed = {
                "folder": "the directory that holds train/ and val/",
                "shards": "the directory or URL that holds train/ and val/",
                "huggingface": "a folder of Parquet files, or the hub's name of the set",
            }.get(self.name, "the directory of the set")
            raise ValueError(f"root is missing; data.name: {self.name} needs {needed}")
        if self.download and self.name not in get_args(TorchvisionSet):
            raise ValueError(f"download needs one of torchvision's sets; data.name is {self.name}")
        kinds = {"label_column": "huggingface", "classes": "folder", "train": "shards", "val": "shards"}
        for key, kind in kinds.items():
            if getattr(self, key) and self.name != kind:
                raise ValueError(f"{key} needs data.name: {kind}; data.name is {self.name}")
        if self.eval_size > self.eval_resize:
            raise ValueError(f"eval_size {self.eval_size} is larger than eval_resize {self.eval_resize}, its maximum")
        check_mean_and_std(self.mean, self.std)
        return self


class DataConfig(EvalDataConfig):
    """Data and augmentation: the keys of evaluation, and those of training."""

    batch_size: Trains[Positive]
    """Images per optimizer step over all processes and accumulated parts: a multiple of processes x accumulate."""
    last_batch: Trains[Literal["keep", "drop"]] = "keep"
    """The remaining images of an epoch, fewer than batch_size. keep: one smaller step; drop: no step."""
    repeats: Trains[Positive] = 1
    """Repeated augmentation: a batch holds batch_size / repeats different images, each this many times with a different
    augmentation. An epoch keeps its number of steps, so it visits one in `repeats` of the images, others each epoch."""
    size: Trains[Positive] = 224
    """Side of the training images, pixels."""
    size_schedule: Trains[Annotated[tuple[SizeFrom, ...], Field(strict=False, examples=[[[0, 128], [10, 160]]])]] = ()
    """Progressive resizing: [epoch, size] pairs; from that epoch on (counted from 0) images have that side."""
    decode: Trains[Literal["exact", "fast", "gpu"]] = "exact"
    """Decoder of training images. exact: PIL decodes and resizes; fast: the same crops, decoded by libjpeg-turbo no
    further than the crop needs and resized by torch, within one or two of 255 levels of PIL's pixels; gpu: the same
    crops, decoded and resized on the GPU (needs nvImageCodec), experimental: no GPU run has yet shown that it pays.
    Validation is always exact."""
    on_error: Neutral[Literal["stop", "skip"]] = "stop"
    """A training image that cannot be decoded. stop: end with its path; skip: its batch is one image smaller; the image
    is counted and listed, and not replaced by another. Validation always stops."""
    crop_scale: Trains[Range] = (0.08, 1.0)
    """RandomResizedCrop: area of the crop as a fraction of the image's, minimum and maximum."""
    crop_ratio: Trains[Range] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height of the crop, minimum and maximum."""
    flip: Trains[Fraction] = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Trains[NonNegative] = 0.0
    """Strength of brightness, contrast and saturation jitter, as torchvision's ColorJitter; 0 is off."""
    rand_augment: Trains[str | None] = None
    """timm's RandAugment string, such as rand-m7-mstd0.5-inc1."""
    auto_augment: Trains[str | None] = None
    """Another augmentation policy. torchvision's: ta_wide (TrivialAugment), ra (RandAugment), augmix, or AutoAugment's
    imagenet, cifar10, svhn. timm's: AutoAugment's original, originalr, v0, v0r, 3a (ThreeAugment) with options, such as
    original-mstd0.5, or its AugMix, such as augmix-m5-w4-d2."""
    random_erasing: Trains[Fraction] = 0.0
    """Probability of erasing a random rectangle."""

    @model_validator(mode="after")
    def _check_training(self) -> "DataConfig":
        if self.decode == "gpu":
            for key in ("color_jitter", "rand_augment", "auto_augment", "random_erasing"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs decode: exact or fast; decode: gpu only crops and flips")
        if self.auto_augment is not None and self.rand_augment is not None:
            raise ValueError(f"auto_augment {self.auto_augment} and rand_augment {self.rand_augment}: set one of them")
        for key, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, key)
            if not 0 < low <= high <= top:
                raise ValueError(f"{key} is [{low}, {high}]; it must be 0 < minimum <= maximum <= {top:g}")
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size {self.batch_size} does not divide by repeats {self.repeats}")
        epochs = [epoch for epoch, _ in self.size_schedule]
        if epochs != sorted(set(epochs)):
            raise ValueError(f"size_schedule changes at epochs {epochs}; they must rise")
        return self

    def size_at(self, epoch: int) -> int:
        """Side of the training images in an epoch, counted from 0."""
        return next((size for start, size in reversed(self.size_schedule) if epoch >= start), self.size)

    @property
    def sizes(self) -> list[int]:
        """Every side that training images may have, in increasing order."""
        return sorted({self.size, *(size for _, size in self.size_schedule)})

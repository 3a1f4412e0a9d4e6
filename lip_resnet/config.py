"""What a run is: the sections of a recipe, frozen and validated. Defaults exist here and nowhere else.

A field's type is ``Trains[...]``, ``Evaluates[...]`` or ``Neutral[...]``, by what a change of its value changes; see
``Effect``.
"""

import enum
import math
from typing import Annotated, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from lip_resnet.errors import InputError as InputError

T = TypeVar("T")


class Effect(enum.Enum):
    """What another value of a field changes, in a sentence that the list of keys in the documentation repeats."""

    WEIGHTS = "Changes the trained weights: part of the training protocol; it cannot change when a run is resumed."
    EVALUATION = "Changes how weights are evaluated, not the weights. Changed on resume, `best` is chosen afresh."
    NOTHING = "Changes neither weights nor figures; it may change when a run is resumed."


Trains = Annotated[T, Effect.WEIGHTS]
Evaluates = Annotated[T, Effect.EVALUATION]
Neutral = Annotated[T, Effect.NOTHING]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Colour = Annotated[tuple[float, float, float], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]
SizeFrom = Annotated[tuple[Count, Positive], Field(strict=False)]
TorchvisionSet = Literal[
    "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn", "stl10", "gtsrb",
    "imagenette", "flowers102", "food101", "pets", "dtd", "aircraft", "country211",
]  # fmt: skip


class Section(BaseModel):
    """A frozen group of keys: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network: the only section in which a LIP recipe and its baseline differ."""

    name: Trains[str]
    """A name registered with timm: lip_resnet50, lip_resnet101, or any of timm's own."""
    num_classes: Trains[Positive] = 1000
    args: Trains[dict[str, JsonValue]] = {}
    """Further keywords of the model, such as bottleneck_width: 64."""
    downsampling: Trains[dict[str, str]] = {}
    """Site (stem, main, shortcut, transition, image) -> layer of the zoo that replaces what stands there, in any
    convolutional network: {stem: blur, main: blur, shortcut: average}."""
    weights: Neutral[str | None] = None
    """A checkpoint file or run folder to start from. What it held, not where, is compared between runs."""
    new_head: Trains[bool] = False
    """Leave the classifier of `weights` out and start it afresh (fine-tuning)."""


class EvalDataConfig(Section):
    """A set of images, and how an evaluation reads it."""

    name: Trains[Literal["folder", "shards", "huggingface", "digits", "synthetic", TorchvisionSet]] = "folder"
    """folder: class folders under root/train and root/val; shards: tar files there, in WebDataset layout; huggingface:
    a table; digits: scikit-learn's, embedded; synthetic: noise; the others: torchvision's sets."""
    root: Neutral[str | None] = None
    """For `folder` and `shards`: the directory that holds train/ and val/, for `shards` perhaps behind a URL. For
    `huggingface`: a folder of Parquet files, or the hub's name. For torchvision's sets: where they are downloaded."""
    download: Neutral[bool] = False
    """Of torchvision's sets: fetch what is not there."""
    label_column: Trains[str | None] = None
    """Of `huggingface`: the column of the labels, where there are several."""
    classes: Trains[str | None] = None
    """A text file: a class folder's name a line keeps those classes alone (in sorted order); lines that are image
    files (folder/name or name) keep those training images alone. Validation keeps every image of the classes."""
    images: Trains[Positive] = 12800
    """For `synthetic`: how many training images to pretend; a tenth as many for validation."""
    eval_batch_size: Neutral[Positive] = 256
    """Images per batch of the evaluation, on one process."""
    eval_size: Evaluates[Positive] = 224
    """Side of the evaluation's centre crop, pixels."""
    eval_resize: Evaluates[Positive] = 256
    """The evaluation first resizes an image's shorter side to this, pixels (other crop modes: other sides)."""
    crop_mode: Evaluates[Literal["center", "squash", "border"]] = "center"
    """How the evaluation resizes before its centre crop, as in timm. center: the shorter side to eval_resize; squash:
    both sides to eval_resize, whatever the aspect ratio; border: the longer side to eval_resize, and what is then
    smaller than eval_size is padded with the mean colour."""
    interpolation: Trains[Literal["bilinear", "bicubic"]] = "bilinear"
    """Of every resize, with PIL's antialiasing."""
    mean: Trains[Colour] = (0.485, 0.456, 0.406)
    std: Trains[Colour] = (0.229, 0.224, 0.225)
    """Of the pixels in [0, 1]; images are normalised on the device."""
    workers: Neutral[Count] = 8
    """Loader processes of each process; 0 loads in the process itself."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> "EvalDataConfig":
        if self.name not in ("digits", "synthetic") and not self.root:
            needed = {
                "folder": "the directory that holds train/ and val/",
                "shards": "the directory or URL that holds train/ and val/",
                "huggingface": "a folder of Parquet files, or the hub's name of the set",
            }
            raise ValueError(
                f"root is missing; data.name: {self.name} needs {needed.get(self.name, 'the directory of the set')}"
            )
        if self.download and self.name not in get_args(TorchvisionSet):
            raise ValueError(f"download belongs to torchvision's sets; the name is {self.name}")
        if self.label_column and self.name != "huggingface":
            raise ValueError(f"label_column belongs to name: huggingface; the name is {self.name}")
        if self.classes and self.name != "folder":
            raise ValueError(f"classes needs data.name: folder; the name is {self.name}")
        if self.eval_size > self.eval_resize:
            raise ValueError(f"eval_size {self.eval_size} is larger than eval_resize {self.eval_resize}")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; each must be greater than 0")
        return self


class DataConfig(EvalDataConfig):
    """Files to batches: an evaluation's keys, and training's."""

    batch_size: Trains[Positive]
    """Images per optimizer step over all processes and accumulated parts; must divide by processes x accumulate."""
    last_batch: Trains[Literal["keep", "drop"]] = "keep"
    """What happens to the images left over when the set does not divide by batch_size: a smaller step, or none."""
    repeats: Trains[Positive] = 1
    """Repeated augmentation: a batch holds batch_size / repeats different images, each this often with an augmentation
    of its own. An epoch keeps its number of steps, so it visits one in `repeats` of the images, others each epoch."""
    size: Trains[Positive] = 224
    """Side of the training images, pixels."""
    size_schedule: Trains[Annotated[tuple[SizeFrom, ...], Field(strict=False)]] = ()
    """Progressive resizing: [epoch, size] pairs; from an epoch (the first is 0) on, training images have that side."""
    decode: Trains[Literal["exact", "fast", "gpu"]] = "exact"
    """Of training images. exact: PIL decodes and resizes; fast: the same crops, decoded by libjpeg-turbo no further
    than the crop needs and resized by torch, within a level or two of PIL's pixels; gpu: the same crops, decoded and
    resized on the GPU (needs nvImageCodec). Validation is always exact."""
    on_error: Trains[Literal["stop", "skip"]] = "stop"
    """A training image that does not decode. stop: end with its path; skip: leave it out of its batch, which is one
    smaller, count it and list it. Nothing is ever put in its place, and validation always stops."""
    crop_scale: Trains[Range] = (0.08, 1.0)
    """RandomResizedCrop: area of the crop as a fraction of the image, lowest and highest."""
    crop_ratio: Trains[Range] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height of the crop, lowest and highest."""
    flip: Trains[Fraction] = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Trains[NonNegative] = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: Trains[str | None] = None
    """timm's RandAugment string, such as rand-m7-mstd0.5-inc1."""
    random_erasing: Trains[Fraction] = 0.0
    """Probability of erasing a random rectangle."""

    @model_validator(mode="after")
    def _check_training(self) -> "DataConfig":
        if self.decode == "gpu":
            for key in ("color_jitter", "rand_augment", "random_erasing"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs decode: exact or fast; decode: gpu only crops and flips")
        for key, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, key)
            if not 0 < low <= high <= top:
                raise ValueError(f"{key} is [{low}, {high}]; it must be 0 < lowest <= highest <= {top:g}")
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
        """Every side that training images may have, rising."""
        return sorted({self.size, *(size for _, size in self.size_schedule)})


class OptimConfig(Section):
    """The optimizer and its learning rate, which is a function of the step alone."""

    name: Trains[Literal["sgd", "adamw", "lamb", "lars"]] = "sgd"
    lr: Trains[Annotated[float, Field(gt=0)]]
    """Peak learning rate for data.batch_size as it stands; nothing rescales it."""
    momentum: Trains[Rate] = 0.9
    """Of sgd and lars."""
    nesterov: Trains[bool] = False
    betas: Trains[Range] = (0.9, 0.999)
    """Of adamw and lamb."""
    weight_decay: Trains[NonNegative] = 1e-4
    decay: Trains[Literal["all", "matrices"]] = "all"
    """all: decay every parameter (the paper); matrices: only tensors of two or more dimensions."""
    schedule: Trains[Literal["cosine", "linear", "step"]] = "cosine"
    milestones: Trains[Annotated[tuple[Positive, ...], Field(strict=False)]] = ()
    """For `step`: the epochs at which the rate is multiplied by gamma."""
    gamma: Trains[Annotated[float, Field(gt=0, le=1)]] = 0.1
    min_lr: Trains[NonNegative] = 0.0
    """For `cosine` and `linear`: the rate at the end."""
    warmup_epochs: Trains[NonNegative] = 0.0
    """Linear rise from (almost) 0, per step."""
    accumulate: Trains[Positive] = 1
    """Parts into which each process cuts its share of a batch; gradients are summed over them."""
    clip_norm: Trains[Annotated[float, Field(gt=0)] | None] = None
    """Largest norm of the whole gradient."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.schedule == "step" and not self.milestones:
            raise ValueError("milestones is missing; schedule: step needs the epochs at which the rate drops")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones belong to schedule: step; the schedule is {self.schedule}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must rise")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov needs name: sgd and a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


class TrainConfig(Section):
    """The protocol around the optimizer."""

    epochs: Trains[Positive]
    seed: Trains[Annotated[int, Field(ge=0, lt=2**32)]] = 0
    max_steps: Trains[Positive | None] = None
    """Stop after this many optimizer steps; the schedule still spans `epochs`."""
    precision: Trains[Literal["float32", "tf32", "bfloat16", "float16"]] = "float32"
    """Of the autocast forward. tf32 is float32 whose products GPUs round to 10 bits. float16 scales its loss and needs
    sgd or adamw, whose fused form never synchronises."""
    channels_last: Trains[bool] = True
    compile: Trains[bool] = False
    """torch.compile the training step's forward and backward."""
    compile_mode: Trains[Literal["default", "reduce-overhead", "max-autotune"]] = "default"
    """Of torch.compile."""
    gradient_compression: Trains[Literal["none", "bfloat16", "float16"]] = "none"
    """The dtype in which processes exchange gradients: half the traffic, rounded sums."""
    loss: Trains[Literal["cross_entropy", "binary_cross_entropy"]] = "cross_entropy"
    target_threshold: Trains[Rate | None] = None
    """For `binary_cross_entropy`: (mixed) targets above this count as 1, all others as 0."""
    label_smoothing: Trains[Rate] = 0.0
    mixup: Trains[NonNegative] = 0.0
    """Alpha of mixup's Beta distribution; 0 is off. With cutmix too, each step takes one of the two."""
    cutmix: Trains[NonNegative] = 0.0
    """Alpha of cutmix's Beta distribution; 0 is off."""
    drop_path: Trains[Rate] = 0.0
    """Stochastic depth, where the model has it."""
    drop: Trains[Rate] = 0.0
    """Dropout in front of the classifier."""
    ema_decay: Trains[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Keep an exponential moving average of the weights, with this decay per step."""
    rules: Evaluates[Literal["model", "ema"]] = "model"
    """Whose top-1 chooses the best checkpoint, and which weights eval.py evaluates by default."""
    sync_bn: Trains[bool] = False
    """Batch statistics over all processes (GPUs only). The host then waits for the device in every layer."""
    eval_every: Neutral[Positive] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_steps: Neutral[Count] = 0
    """Save every so many steps too, not only at the end of an epoch; 0 is off."""
    checkpoint_minutes: Neutral[NonNegative] = 10.0
    """Save too when so many minutes have passed since this was last done; 0 is off."""
    keep: Neutral[Positive] = 2
    """Checkpoints kept beside the best: the last one, and those to fall back on if it is damaged."""
    on_write_error: Neutral[Literal["stop", "continue"]] = "stop"
    """What a checkpoint that cannot be written does to the run; the older checkpoints stay either way."""
    on_nonfinite: Neutral[Literal["stop", "skip", "rollback"]] = "stop"
    """What a step with a loss or gradient that is not finite does to the run. It never changes weights, optimizer,
    average or batch statistics. stop: end, with what was not finite and where; skip: go on with the next batch;
    rollback: go back to the newest checkpoint and leave out that batch. Without such a step all three are alike."""
    nonfinite_limit: Neutral[Positive] = 10
    """For `skip`, so many steps in a row, and for `rollback`, so many times in a run; one more ends the run."""
    hang_minutes: Neutral[NonNegative] = 30.0
    """End the run, with every process's stack in the run folder, when a step takes longer than this; 0 is off."""
    log_every: Neutral[Positive] = 50
    """Steps between log lines, which are the only host synchronisations."""
    profile: Neutral[Count] = 0
    """Trace this many steps with torch.profiler for TensorBoard, after the first 5; 0 is off."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.rules == "ema" and self.ema_decay is None:
            raise ValueError("rules: ema needs an ema_decay")
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise ValueError(f"target_threshold belongs to loss: binary_cross_entropy; the loss is {self.loss}")
        return self


class Config(Section):
    """A whole recipe."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.optim.milestones and self.optim.milestones[-1] >= self.train.epochs:
            raise ValueError(
                f"optim.milestones end at epoch {self.optim.milestones[-1]}; train.epochs is {self.train.epochs}"
            )
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs is {self.optim.warmup_epochs:g}; train.epochs is {self.train.epochs}"
            )
        graphs = self.train.compile and self.train.compile_mode != "default"
        if graphs and self.optim.accumulate > 1:
            raise ValueError(
                f"train.compile_mode {self.train.compile_mode} with optim.accumulate {self.optim.accumulate}: "
                "CUDA graphs cannot add gradients up; use compile_mode: default"
            )
        if self.train.precision == "float16" and self.optim.name not in ("sgd", "adamw"):
            raise ValueError(
                f"train.precision float16 with optim.name {self.optim.name}; its scaler needs a fused optimizer: "
                "sgd or adamw"
            )
        return self

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def values(self, effect: Effect) -> dict[str, JsonValue]:
        """``section.key`` to value, of the fields that have this effect."""
        tree = self.model_dump(mode="json")
        return {name: tree[name.split(".")[0]][name.split(".")[1]] for name, each in EFFECTS.items() if each is effect}


EFFECTS: dict[str, Effect] = {
    f"{section}.{key}": effect
    for section, part in Config.model_fields.items()
    for key, field in part.annotation.model_fields.items()
    for effect in field.metadata
    if isinstance(effect, Effect)
}
"""What each key of a recipe, as ``section.key``, changes."""

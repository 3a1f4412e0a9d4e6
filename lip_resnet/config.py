"""The schema of a recipe: its sections, frozen and validated. Defaults exist here and nowhere else.

A field is ``Trains[...]``, ``Evaluates[...]`` or ``Neutral[...]``, by what a change of its value affects (``Effect``).
"""

import enum
import math
from typing import Annotated, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from lip_resnet.errors import InputError as InputError

T = TypeVar("T")


class Effect(enum.Enum):
    """What a change of a field's value affects; docs/recipes.md repeats these sentences."""

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
    """Outputs of the classifier; the data must have as many classes."""
    args: Trains[dict[str, JsonValue]] = {}
    """Further keyword arguments of the model, such as bottleneck_width: 64."""
    downsampling: Trains[dict[str, str]] = {}
    """Downsampling layers to replace, in any convolutional network: placement (stem, main, shortcut, transition, image)
    -> layer, such as {stem: blur, main: blur, shortcut: average}."""
    weights: Neutral[str | None] = None
    """A checkpoint file or run folder to start from. Runs are compared by what it holds, not by its path."""
    new_head: Trains[bool] = False
    """Do not load the classifier from `weights`; initialise it (fine-tuning)."""


class EvalDataConfig(Section):
    """A set of images, and how an evaluation reads it."""

    name: Trains[Literal["folder", "shards", "huggingface", "digits", "synthetic", TorchvisionSet]] = "folder"
    """folder: class folders under root/train and root/val; shards: tar files there, in WebDataset layout; huggingface:
    a table; digits: scikit-learn's, embedded; synthetic: noise; the others: torchvision's sets."""
    root: Neutral[str | None] = None
    """For `folder` and `shards`: the directory that holds train/ and val/, for `shards` perhaps behind a URL. For
    `huggingface`: a folder of Parquet files, or the hub's name. For torchvision's sets: where they are downloaded."""
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
        for key, kind in (("label_column", "huggingface"), ("classes", "folder")):
            if getattr(self, key) and self.name != kind:
                raise ValueError(f"{key} needs data.name: {kind}; data.name is {self.name}")
        if self.eval_size > self.eval_resize:
            raise ValueError(f"eval_size {self.eval_size} is larger than eval_resize {self.eval_resize}, its maximum")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; each must be greater than 0")
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
    size_schedule: Trains[Annotated[tuple[SizeFrom, ...], Field(strict=False)]] = ()
    """Progressive resizing: [epoch, size] pairs; from that epoch on (counted from 0) images have that side."""
    decode: Trains[Literal["exact", "fast", "gpu"]] = "exact"
    """Decoder of training images. exact: PIL decodes and resizes; fast: the same crops, decoded by libjpeg-turbo no
    further than the crop needs and resized by torch, within one or two of 255 levels of PIL's pixels; gpu: the same
    crops, decoded and resized on the GPU (needs nvImageCodec). Validation is always exact."""
    on_error: Trains[Literal["stop", "skip"]] = "stop"
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


class OptimConfig(Section):
    """The optimizer and its learning rate, which depends only on the step."""

    name: Trains[Literal["sgd", "adamw", "lamb", "lars"]] = "sgd"
    """The optimizer. lamb and lars are for very large batches."""
    lr: Trains[Annotated[float, Field(gt=0)]]
    """Peak learning rate; it is never rescaled by data.batch_size."""
    momentum: Trains[Rate] = 0.9
    """For `sgd` and `lars`: the momentum."""
    nesterov: Trains[bool] = False
    """For `sgd`: Nesterov's momentum."""
    betas: Trains[Range] = (0.9, 0.999)
    """For `adamw` and `lamb`: decay rates of the averages of the gradient and of its square."""
    weight_decay: Trains[NonNegative] = 1e-4
    """Weight decay: decoupled in `adamw` and `lamb`, added to the gradient in `sgd` and `lars`."""
    decay: Trains[Literal["all", "matrices"]] = "all"
    """Which parameters decay. all: every parameter (as in the paper); matrices: those of two or more dimensions."""
    schedule: Trains[Literal["cosine", "linear", "step"]] = "cosine"
    """The learning rate after the warm-up: a cosine or a straight line to min_lr, or steps at `milestones`."""
    milestones: Trains[Annotated[tuple[Positive, ...], Field(strict=False)]] = ()
    """For `step`: the epochs at which the rate is multiplied by gamma."""
    gamma: Trains[Annotated[float, Field(gt=0, le=1)]] = 0.1
    """For `step`: the factor at each milestone."""
    min_lr: Trains[NonNegative] = 0.0
    """For `cosine` and `linear`: the learning rate at the end."""
    warmup_epochs: Trains[NonNegative] = 0.0
    """Epochs in which the learning rate rises linearly, step by step, from almost 0 to lr."""
    accumulate: Trains[Positive] = 1
    """Gradient accumulation: the number of parts into which each process splits its share of a batch."""
    clip_norm: Trains[Annotated[float, Field(gt=0)] | None] = None
    """Maximum L2 norm of the gradient over all parameters; null is off."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimConfig":
        if self.schedule == "step" and not self.milestones:
            raise ValueError("milestones are missing; schedule: step needs the epochs at which the rate drops")
        if self.schedule != "step" and self.milestones:
            raise ValueError(f"milestones are for schedule: step; the schedule is {self.schedule}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must rise")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError(f"nesterov needs name: sgd, not {self.name}, and a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; it must be at most that")
        return self


class TrainConfig(Section):
    """The training protocol around the optimizer, and how a run evaluates, saves and logs."""

    epochs: Trains[Positive]
    """Length of the run, and of the learning-rate schedule."""
    seed: Trains[Annotated[int, Field(ge=0, lt=2**32)]] = 0
    """Seed of all randomness: initial weights, order of the images, augmentation, dropout."""
    max_steps: Trains[Positive | None] = None
    """Stop after this many optimizer steps; the schedule still spans `epochs`. It may change on resume."""
    precision: Trains[Literal["float32", "tf32", "bfloat16", "float16"]] = "float32"
    """Precision of the forward (autocast). tf32: float32, TF32 products; float16: scaled loss, sgd or adamw only."""
    channels_last: Trains[bool] = True
    """Memory layout of images and weights: channels-last (NHWC), or contiguous (NCHW)."""
    compile: Trains[bool] = False
    """Compile the forward and backward of the training step with torch.compile."""
    compile_mode: Trains[Literal["default", "reduce-overhead", "max-autotune"]] = "default"
    """The mode argument of torch.compile."""
    gradient_compression: Trains[Literal["none", "bfloat16", "float16"]] = "none"
    """The dtype of DDP's gradient all-reduce: half the traffic, rounded gradients. none: float32."""
    loss: Trains[Literal["cross_entropy", "binary_cross_entropy"]] = "cross_entropy"
    """The loss: cross entropy over the classes, or binary cross entropy of each class."""
    target_threshold: Trains[Rate | None] = None
    """For `binary_cross_entropy`: targets above this (after mixup and cutmix) become 1, all others 0; null is off."""
    label_smoothing: Trains[Rate] = 0.0
    """Share of the target that is spread evenly over all classes; 0 is off."""
    mixup: Trains[NonNegative] = 0.0
    """Alpha of mixup's Beta distribution; 0 is off. With cutmix too, each step uses one of the two at random."""
    cutmix: Trains[NonNegative] = 0.0
    """Alpha of cutmix's Beta distribution; 0 is off."""
    drop_path: Trains[Rate] = 0.0
    """Rate of stochastic depth, for models that have it; 0 is off."""
    drop: Trains[Rate] = 0.0
    """Rate of dropout before the classifier; 0 is off."""
    ema_decay: Trains[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Keep an exponential moving average (EMA) of the weights, with this decay per step; null is off."""
    rules: Evaluates[Literal["model", "ema"]] = "model"
    """The weights, the model's or their EMA, whose top-1 selects best.pt and which eval.py evaluates by default."""
    sync_bn: Trains[bool] = False
    """Batch norm with statistics over all processes (GPUs only). The host then waits for the device in every layer."""
    eval_every: Neutral[Positive] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_steps: Neutral[Count] = 0
    """Save a checkpoint every so many steps, beside the one at the end of every epoch; 0 is off."""
    checkpoint_minutes: Neutral[NonNegative] = 10.0
    """Save a checkpoint every so many minutes too; 0 is off."""
    keep: Neutral[Positive] = 2
    """Number of checkpoints to keep beside the best: the last, and older ones in case it is damaged."""
    on_write_error: Neutral[Literal["stop", "continue"]] = "stop"
    """If a checkpoint or a log line cannot be written: stop ends the run, continue warns. Older checkpoints stay."""
    on_nonfinite: Neutral[Literal["stop", "skip", "rollback"]] = "stop"
    """If a step's loss or gradient is not finite. stop: end, with what was not finite and where; skip: go on with the
    next batch; rollback: go back to the newest checkpoint and exclude that batch. The step itself changes nothing."""
    nonfinite_limit: Neutral[Positive] = 10
    """The most steps in a row that `skip` skips, and the most times in a run that `rollback` goes back."""
    hang_minutes: Neutral[NonNegative] = 30.0
    """End the run, with the stacks of every process in the run folder, if a step takes longer than this; 0 is off."""
    log_every: Neutral[Positive] = 50
    """Steps between log lines; only then does the host wait for the device."""
    profile: Neutral[Count] = 0
    """Trace this many steps with torch.profiler, after the first 5, for TensorBoard; 0 is off."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.rules == "ema" and self.ema_decay is None:
            raise ValueError("rules: ema needs ema_decay, a number between 0 and 1 such as 0.9999")
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise ValueError(f"target_threshold is for loss: binary_cross_entropy; the loss is {self.loss}")
        return self


class Config(Section):
    """A whole recipe."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        optim, train, epochs = self.optim, self.train, self.train.epochs
        if optim.milestones and optim.milestones[-1] >= epochs:
            raise ValueError(f"optim.milestones are {list(optim.milestones)}; they must be below train.epochs {epochs}")
        if optim.warmup_epochs >= epochs:
            raise ValueError(f"optim.warmup_epochs is {optim.warmup_epochs:g}; it must be below train.epochs {epochs}")
        if train.compile and train.compile_mode != "default" and optim.accumulate > 1:
            raise ValueError(
                f"train.compile_mode {train.compile_mode} with optim.accumulate {optim.accumulate}: CUDA graphs cannot "
                "accumulate gradients; use train.compile_mode: default"
            )
        if train.precision == "float16" and optim.name not in ("sgd", "adamw"):
            raise ValueError(
                f"train.precision float16 with optim.name {optim.name}: loss scaling needs a fused optimizer, sgd or "
                "adamw; or use train.precision: bfloat16"
            )
        return self

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def values(self, effect: Effect) -> dict[str, JsonValue]:
        """``section.key`` -> value, of the fields that have this effect."""
        tree = self.model_dump(mode="json")
        return {name: tree[name.split(".")[0]][name.split(".")[1]] for name, each in EFFECTS.items() if each is effect}


EFFECTS: dict[str, Effect] = {
    f"{section}.{key}": effect
    for section, part in Config.__annotations__.items()
    for key, field in part.model_fields.items()
    for effect in field.metadata
    if isinstance(effect, Effect)
}
"""The effect of each key of a recipe, by ``section.key``."""

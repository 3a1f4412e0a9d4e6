"""What a run is: the sections of a recipe, frozen and validated. Defaults exist here and nowhere else."""

import math
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from lip_resnet.errors import InputError as InputError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Colour = Annotated[tuple[float, float, float], Field(strict=False)]
Range = Annotated[tuple[float, float], Field(strict=False)]
SizeFrom = Annotated[tuple[Count, Positive], Field(strict=False)]
TorchvisionSet = Literal[
    "cifar10",
    "cifar100",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "svhn",
    "stl10",
    "gtsrb",
    "imagenette",
    "flowers102",
    "food101",
    "pets",
    "dtd",
    "aircraft",
    "country211",
]


class Section(BaseModel):
    """A frozen group of keys: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network: the only section in which a LIP recipe and its baseline differ."""

    name: str
    """A name registered with timm: lip_resnet50, lip_resnet101, or any of timm's own."""
    num_classes: Positive = 1000
    args: dict[str, JsonValue] = {}
    """Further keywords of the model, such as bottleneck_width: 64."""
    downsampling: dict[str, str] = {}
    """Site (stem, main, shortcut, transition, image) -> layer of the zoo that replaces what stands there, in any
    convolutional network: {stem: blur, main: blur, shortcut: average}."""
    weights: str | None = None
    """A checkpoint file or run folder to start from."""
    new_head: bool = False
    """Leave the classifier of `weights` out and start it afresh (fine-tuning)."""


class DataConfig(Section):
    """Files to batches."""

    name: Literal["folder", "shards", "huggingface", "digits", "synthetic", TorchvisionSet] = "folder"
    """folder: class folders under root/train and root/val; shards: tar files there, in WebDataset layout; huggingface:
    a table; digits: scikit-learn's, embedded; synthetic: noise; the others: torchvision's sets."""
    root: str | None = None
    """For `folder` and `shards`: the directory that holds train/ and val/, for `shards` perhaps behind a URL. For
    `huggingface`: a folder of Parquet files, or the hub's name. For torchvision's sets: where they are downloaded."""
    download: bool = False
    """Of torchvision's sets: fetch what is not there."""
    label_column: str | None = None
    """Of `huggingface`: the column of the labels, where there are several."""
    classes: str | None = None
    """A text file: a class folder's name a line keeps those classes alone (in sorted order); lines that are image
    files (folder/name or name) keep those training images alone. Validation keeps every image of the classes."""
    batch_size: Positive
    """Images per optimizer step over all processes and accumulated parts; must divide by processes x accumulate."""
    eval_batch_size: Positive = 256
    """Images per batch of the evaluation, on one process."""
    last_batch: Literal["keep", "drop"] = "keep"
    """What happens to the images left over when the set does not divide by batch_size: a smaller step, or none."""
    repeats: Positive = 1
    """Repeated augmentation: a batch holds batch_size / repeats different images, each this often with an augmentation
    of its own. An epoch keeps its number of steps, so it visits one in `repeats` of the images, others each epoch."""
    size: Positive = 224
    """Side of the training images, pixels."""
    size_schedule: Annotated[tuple[SizeFrom, ...], Field(strict=False)] = ()
    """Progressive resizing: [epoch, size] pairs; from an epoch (the first is 0) on, training images have that side."""
    eval_size: Positive = 224
    """Side of the evaluation's centre crop, pixels."""
    eval_resize: Positive = 256
    """The evaluation first resizes an image's shorter side to this, pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of every resize, with PIL's antialiasing."""
    decode: Literal["exact", "fast", "gpu"] = "exact"
    """Of training images. exact: PIL decodes and resizes; fast: the same crops, decoded by libjpeg-turbo no further
    than the crop needs and resized by torch, within a level or two of PIL's pixels; gpu: the same crops, decoded and
    resized on the GPU (needs nvImageCodec). Validation is always exact."""
    on_error: Literal["stop", "skip"] = "stop"
    """A training image that does not decode. stop: end with its path; skip: leave it out of its batch, which is one
    smaller, count it and list it. Nothing is ever put in its place, and validation always stops."""
    crop_scale: Range = (0.08, 1.0)
    """RandomResizedCrop: area of the crop as a fraction of the image, lowest and highest."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height of the crop, lowest and highest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegative = 0.0
    """Strength of brightness, contrast and saturation jitter."""
    rand_augment: str | None = None
    """timm's RandAugment string, such as rand-m7-mstd0.5-inc1."""
    random_erasing: Fraction = 0.0
    """Probability of erasing a random rectangle."""
    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)
    """Of the pixels in [0, 1]; images are normalised on the device."""
    workers: Count = 8
    """Loader processes of each training process; 0 loads in the training process itself."""
    images: Positive = 12800
    """For `synthetic`: how many training images to pretend; a tenth as many for validation."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
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
        if self.decode == "gpu":
            for key in ("color_jitter", "rand_augment", "random_erasing"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs decode: exact or fast; decode: gpu only crops and flips")
        if self.classes and self.name != "folder":
            raise ValueError(f"classes needs data.name: folder; the name is {self.name}")
        for key, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, key)
            if not 0 < low <= high <= top:
                raise ValueError(f"{key} is [{low}, {high}]; it must be 0 < lowest <= highest <= {top:g}")
        if self.eval_size > self.eval_resize:
            raise ValueError(f"eval_size {self.eval_size} is larger than eval_resize {self.eval_resize}")
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}; each must be greater than 0")
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

    name: Literal["sgd", "adamw", "lamb", "lars"] = "sgd"
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate for data.batch_size as it stands; nothing rescales it."""
    momentum: Rate = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    betas: Range = (0.9, 0.999)
    """Of adamw and lamb."""
    weight_decay: NonNegative = 1e-4
    decay: Literal["all", "matrices"] = "all"
    """all: decay every parameter (the paper); matrices: only tensors of two or more dimensions."""
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    milestones: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """For `step`: the epochs at which the rate is multiplied by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    min_lr: NonNegative = 0.0
    """For `cosine` and `linear`: the rate at the end."""
    warmup_epochs: NonNegative = 0.0
    """Linear rise from (almost) 0, per step."""
    accumulate: Positive = 1
    """Parts into which each process cuts its share of a batch; gradients are summed over them."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
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

    epochs: Positive
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    max_steps: Positive | None = None
    """Stop after this many optimizer steps; the schedule still spans `epochs`."""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    """Of the autocast forward. tf32 is float32 whose products GPUs round to 10 bits. float16 scales its loss and needs
    sgd or adamw, whose fused form never synchronises."""
    channels_last: bool = True
    compile: bool = False
    """torch.compile the training step's forward and backward."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Of torch.compile."""
    gradient_compression: Literal["none", "bfloat16", "float16"] = "none"
    """The dtype in which processes exchange gradients: half the traffic, rounded sums."""
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    target_threshold: Rate | None = None
    """For `binary_cross_entropy`: (mixed) targets above this count as 1, all others as 0."""
    label_smoothing: Rate = 0.0
    mixup: NonNegative = 0.0
    """Alpha of mixup's Beta distribution; 0 is off. With cutmix too, each step takes one of the two."""
    cutmix: NonNegative = 0.0
    """Alpha of cutmix's Beta distribution; 0 is off."""
    drop_path: Rate = 0.0
    """Stochastic depth, where the model has it."""
    drop: Rate = 0.0
    """Dropout in front of the classifier."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, with this decay per step."""
    rules: Literal["model", "ema"] = "model"
    """Which weights choose `best` and stand in tables."""
    sync_bn: bool = False
    """Batch statistics over all processes (GPUs only). The host then waits for the device in every layer."""
    eval_every: Positive = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_steps: Count = 0
    """Save every so many steps too, not only at the end of an epoch; 0 is off."""
    checkpoint_minutes: NonNegative = 10.0
    """Save too when so many minutes have passed since this was last done; 0 is off."""
    keep: Positive = 2
    """Checkpoints kept beside the best: the last one, and those to fall back on if it is damaged."""
    on_write_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run; the older checkpoints stay either way."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What a step with a loss or gradient that is not finite does to the run. It never changes weights, optimizer,
    average or batch statistics. stop: end, with what was not finite and where; skip: go on with the next batch;
    rollback: go back to the newest checkpoint and leave out that batch."""
    nonfinite_limit: Positive = 10
    """For `skip`, so many steps in a row, and for `rollback`, so many times in a run; one more ends the run."""
    hang_minutes: NonNegative = 30.0
    """End the run, with every process's stack in the run folder, when a step takes longer than this; 0 is off."""
    log_every: Positive = 50
    """Steps between log lines, which are the only host synchronisations."""
    profile: Count = 0
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

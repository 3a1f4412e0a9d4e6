"""The ``train`` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lip_resnet.config.fields import Count, Evaluates, Neutral, NonNegative, Positive, Rate, Section, Trains


class LoopConfig(Section):
    """The training loop of every task: its length, precision and averages, and how a run evaluates, saves and logs."""

    epochs: Trains[Positive]
    """Length of the run, and of the learning-rate schedule."""
    seed: Trains[Annotated[int, Field(ge=0, lt=2**32)]] = 0
    """Seed of all randomness: initial weights, order of the images, augmentation, dropout."""
    max_steps: Trains[Positive | None] = None
    """Stop after this many optimizer steps; the schedule still spans `epochs`. It may change on resume."""
    device: Neutral[Literal["auto", "cuda", "mps", "cpu"]] = "auto"
    """What trains: cuda, mps (Apple's GPU; one process; it has not been run yet) or cpu. auto: CUDA, else the CPU."""
    precision: Trains[Literal["float32", "tf32", "bfloat16", "float16"]] = "float32"
    """Precision of the forward (autocast). tf32: float32, TF32 products; float16: scaled loss, sgd or adamw only."""
    channels_last: Trains[bool] = True
    """Memory layout of images and weights: channels-last (NHWC), or contiguous (NCHW), as always on MPS."""
    grad_checkpointing: Neutral[bool] = False
    """Compute the activations again in the backward pass instead of keeping them: less memory, the same gradients, more
    time."""
    compile: Trains[bool] = False
    """Compile the forward and backward of the training step with torch.compile."""
    compile_mode: Trains[Literal["default", "reduce-overhead", "max-autotune"]] = "default"
    """The mode argument of torch.compile. Other modes than default are experimental: no GPU run has yet shown that they
    pay."""
    gradient_compression: Trains[Literal["none", "bfloat16", "float16"]] = "none"
    """The dtype of DDP's gradient all-reduce: half the traffic, rounded gradients. none: float32. Others are
    experimental: no GPU run has yet shown that they pay."""
    ema_decay: Trains[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Keep an exponential moving average (EMA) of the weights, with this decay per step; null is off."""
    rules: Evaluates[Literal["model", "ema"]] = "model"
    """The weights, the model's or their EMA, whose top-1 or AP selects best.pt and which eval.py takes by default."""
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
    log_images: Neutral[Annotated[int, Field(ge=0, le=64)]] = 0
    """At each evaluation, write the importance maps of this many validation images to TensorBoard, and for each site
    the entropy of its weights and the mean and deviation of its logits; of a detector its detections; 0 is off. It
    needs matplotlib."""
    profile: Neutral[Count] = 0
    """Trace this many steps with torch.profiler, after the first 5: tensorboard/*.pt.trace.json.gz, which
    https://ui.perfetto.dev opens; 0 is off."""

    @model_validator(mode="after")
    def _check_loop(self) -> "LoopConfig":
        if self.rules == "ema" and self.ema_decay is None:
            raise ValueError("rules: ema needs ema_decay, a number between 0 and 1 such as 0.9999")
        return self


class TrainConfig(LoopConfig):
    """The training loop, and the loss and regularisation of a classifier."""

    freeze_epochs: Trains[Count] = 0
    """Head first, for fine-tuning: in this many first epochs the classifier alone trains, and batch norm keeps the
    statistics of `model.weights`. As many as `epochs`: linear probing."""
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

    @model_validator(mode="after")
    def _check_loss(self) -> "TrainConfig":
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise ValueError(f"target_threshold is for loss: binary_cross_entropy; the loss is {self.loss}")
        return self

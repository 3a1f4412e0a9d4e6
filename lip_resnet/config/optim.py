"""The ``optim`` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lip_resnet.config.fields import NonNegative, Positive, Range, Rate, Section, Trains


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
    milestones: Trains[Annotated[tuple[Positive, ...], Field(strict=False, examples=[[30, 60, 80]])]] = ()
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

"""The ``optim`` section of a recipe."""

import difflib
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from lip_resnet.config.fields import NonNegative, Positive, Range, Rate, Section, Trains

OWN_OPTIMIZERS = ("sgd", "adamw", "lamb", "lars")
"""Names with keys of their own in the section. ``optim.name`` takes timm's others too, with ``optim.args``."""


class OptimConfig(Section):
    """The optimizer and its learning rate, which depends only on the step."""

    name: Trains[str] = "sgd"
    """The optimizer: sgd, adamw, for very large batches lamb or lars; or another of timm's, such as lion or adan."""
    lr: Trains[Annotated[float, Field(gt=0)]]
    """Peak learning rate; it is never rescaled by data.batch_size."""
    momentum: Trains[Rate] = 0.9
    """For `sgd`, `lars` and those of timm's other optimizers that have one: the momentum."""
    nesterov: Trains[bool] = False
    """For `sgd`: Nesterov's momentum."""
    betas: Trains[Range] = (0.9, 0.999)
    """For `adamw` and `lamb`: decay rates of the averages of the gradient and of its square."""
    args: Trains[dict[str, JsonValue]] = Field(default_factory=dict, examples=[{"betas": [0.9, 0.99]}])
    """For timm's other optimizers: further keyword arguments, such as betas: [0.9, 0.99]. Without, timm's defaults."""
    weight_decay: Trains[NonNegative] = 1e-4
    """Weight decay: decoupled in `adamw` and `lamb`, added to the gradient in `sgd` and `lars`."""
    decay: Trains[Literal["all", "matrices"]] = "all"
    """Which parameters decay. all: every parameter (as in the paper); matrices: those of two or more dimensions."""
    layer_decay: Trains[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Layer-wise learning rates, for fine-tuning: the classifier's is lr, and that of each layer before it (timm's
    groups of a network: a block, the stem) is the next one's times this factor. 1: the same for all."""
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
        if self.args and self.name in OWN_OPTIMIZERS:
            raise ValueError(f"args are for timm's other optimizers; {self.name} has keys of its own, such as momentum")
        if reserved := sorted(
            self.args.keys() & {"params", "lr", "weight_decay", "momentum", "opt", "model_or_params"}
        ):
            raise ValueError(f"args: {', '.join(reserved)} cannot be set there; the section has keys of its own for it")
        if self.betas != (0.9, 0.999) and self.name not in OWN_OPTIMIZERS:
            raise ValueError(f"betas are for adamw and lamb; for {self.name} write args: {{betas: {list(self.betas)}}}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}; it must be at most that")
        return self


def optimizer_problem(name: str) -> str | None:
    """Why ``optim.name`` cannot be used with the timm that is installed; None if it can.

    Not a rule of ``OptimConfig``: weights of a run are evaluated without its optimizer.
    """
    if name in OWN_OPTIMIZERS:
        return None
    from timm.optim import get_optimizer_info, list_optimizers  # only here: a recipe is read without timm

    known, base = list_optimizers(), name.removeprefix("lookahead_")
    if base not in known:
        near = difflib.get_close_matches(name.lower(), {*OWN_OPTIMIZERS, *map(str, known)}, n=3)
        return f"unknown optimizer {name!r}; near names: {', '.join(near) or 'none'}"
    if get_optimizer_info(base).second_order:
        return f"{name} needs second derivatives, which a training step here does not compute; choose another"
    if base.startswith("kron"):
        return (
            f"{name} draws random numbers that its state does not hold: such a run could not be resumed; choose another"
        )
    return None

"""What the recipes of all tasks have: four sections, and the effect of every key."""

import functools
from typing import Any

import yaml
from pydantic import JsonValue, model_validator

from lip_resnet.config.fields import Effect, Section, is_section
from lip_resnet.config.optim import OptimConfig
from lip_resnet.config.train import LoopConfig


class Recipe(Section):
    """A whole recipe; each task has a schema of its own, with its own ``model`` and ``data``."""

    model: Any
    data: Any
    optim: OptimConfig
    train: LoopConfig

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
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
        return {
            name: functools.reduce(lambda part, key: part[key], name.split("."), tree)
            for name, each in effects_of(type(self)).items()
            if each is effect
        }


@functools.cache
def effects_of(schema: type[Section], prefix: str = "") -> dict[str, Effect]:
    """The effect of each key of a schema, by ``section.key``; keys of sections in sections have further dots."""
    effects: dict[str, Effect] = {}
    for key, field in schema.model_fields.items():
        if is_section(field.annotation):
            effects |= effects_of(field.annotation, f"{prefix}{key}.")
        effects |= {f"{prefix}{key}": effect for effect in field.metadata if isinstance(effect, Effect)}
    return effects

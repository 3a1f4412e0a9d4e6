"""The schema of a recipe: four sections, frozen and validated. Defaults exist here and nowhere else."""

import yaml
from pydantic import JsonValue, model_validator

from lip_resnet.config.data import DataConfig, EvalDataConfig, TorchvisionSet
from lip_resnet.config.fields import Effect, Section
from lip_resnet.config.model import ModelConfig
from lip_resnet.config.optim import OptimConfig
from lip_resnet.config.train import TrainConfig
from lip_resnet.errors import InputError

__all__ = [
    "EFFECTS",
    "Config",
    "DataConfig",
    "Effect",
    "EvalDataConfig",
    "InputError",
    "ModelConfig",
    "OptimConfig",
    "Section",
    "TorchvisionSet",
    "TrainConfig",
]


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
        if train.freeze_epochs > epochs:
            raise ValueError(f"train.freeze_epochs is {train.freeze_epochs}; it must be at most train.epochs {epochs}")
        if train.freeze_epochs and self.model.weights is None:
            raise ValueError("train.freeze_epochs needs model.weights: without, random layers would stay as they are")
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

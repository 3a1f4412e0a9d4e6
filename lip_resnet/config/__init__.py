"""The schemas of recipes, one a task: four sections, frozen and validated. Defaults exist here and nowhere else."""

from pydantic import model_validator

from lip_resnet.config.data import DataConfig, EvalDataConfig, TorchvisionSet
from lip_resnet.config.detection import BackboneConfig, DetectionConfig, DetectionDataConfig, DetectorConfig
from lip_resnet.config.fields import Effect, Section
from lip_resnet.config.model import ModelConfig
from lip_resnet.config.optim import OptimConfig
from lip_resnet.config.recipe import Recipe, effects_of
from lip_resnet.config.train import LoopConfig, TrainConfig
from lip_resnet.errors import InputError

__all__ = [
    "EFFECTS",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectorConfig",
    "Effect",
    "EvalDataConfig",
    "InputError",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "Section",
    "TorchvisionSet",
    "TrainConfig",
]


class Config(Recipe):
    """A recipe of classification."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _starts_from_weights(self) -> "Config":
        frozen, epochs = self.train.freeze_epochs, self.train.epochs
        if frozen > epochs:
            raise ValueError(f"train.freeze_epochs is {frozen}; it must be at most train.epochs {epochs}")
        if frozen and self.model.weights is None:
            raise ValueError("train.freeze_epochs needs model.weights: without, random layers would stay as they are")
        return self


EFFECTS: dict[str, Effect] = effects_of(Config)
"""The effect of each key of a recipe of classification, by ``section.key``."""

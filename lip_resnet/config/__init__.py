"""The schemas of recipes, one a task: four sections, frozen and validated. Defaults exist here and nowhere else."""

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


EFFECTS: dict[str, Effect] = effects_of(Config)
"""The effect of each key of a recipe of classification, by ``section.key``."""

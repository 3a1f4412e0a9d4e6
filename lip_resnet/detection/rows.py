"""How a detector is evaluated, and the row of the result: its network, figures, protocol, data and environment."""

import copy
import math
from typing import Any, Literal

from torch import nn

from lip_resnet.config import DetectionConfig, DetectorConfig, Section
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.detection.canvas import STRIDE, canvas
from lip_resnet.detection.samples import DetectionSource
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation import cost
from lip_resnet.evaluation.rows import describe_weights

NETWORK = ("name", "args", "downsampling", "circular_padding")
"""Keys of ``model.backbone`` that are a row's network; those below ``model`` that stay are of its protocol."""


class DetectionEvalConfig(Section):
    """Detector, images and precision of an evaluation."""

    model: DetectorConfig
    data: EvalDetectionDataConfig
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the autocast forward."""
    channels_last: bool = True

    @classmethod
    def from_recipe(cls, config: DetectionConfig) -> "DetectionEvalConfig":
        """The evaluation of a recipe's validation set, in float32."""
        data = config.data.model_dump(include=set(EvalDetectionDataConfig.model_fields))
        return cls(model=config.model, data=EvalDetectionDataConfig(**data), channels_last=config.train.channels_last)


def describe_protocol(config: DetectionEvalConfig, training: dict[str, Any] | None) -> dict[str, Any]:
    """All that must be equal before two APs may be subtracted: data, detector without its backbone, and training.

    Args:
        training: ``describe_training`` of the weights; None where it is unknown.
    """
    model, data = config.model.model_dump(mode="json"), config.data.model_dump(mode="json")
    backbone = model.pop("backbone")
    for key in (*NETWORK, "weights", "convert"):
        backbone.pop(key, None)
    detector = {f"model.{key}": value for key, value in model.items() if key != "num_classes"}
    detector |= {f"model.backbone.{key}": value for key, value in backbone.items()}
    images = {"data": data["name"], "classes": model["num_classes"]}
    if data["name"] == "coco":
        images["split"] = data["val_split"]
    evaluation = {"eval_size": data["size"], "max_size": data["max_size"], "mean": data["mean"], "std": data["std"]}
    evaluation |= {"precision": config.precision, "decode": "exact", "interpolation": "bilinear"}
    views = f"whole images; those of a batch have one canvas, their sides rounded up to multiples of {STRIDE}"
    return {"task": "detection", **images, **detector, **evaluation, "views": views, "training": training}


def count_macs(model: nn.Module, data: EvalDetectionDataConfig) -> int:
    """Multiply-adds of the backbone with its feature pyramid for one ``size`` x ``size`` image on its canvas.

    Those of the heads depend on the number of proposals, and are the same for every backbone.
    """
    backbone: Any = model.get_submodule("backbone")
    return cost.macs_of_map(copy.deepcopy(backbone).to("meta").eval(), 3, canvas(data.size, data.size)[0])


def build_row(
    model: nn.Module,
    source: str,
    ema: bool,
    data: DetectionSource,
    config: DetectionEvalConfig,
    result: dict[str, Any],
    payload: dict[str, Any],
    trained: DetectionConfig | None,
) -> dict[str, Any]:
    """The row of a set; its ``model`` is the backbone.

    Args:
        source: where the weights of ``model`` come from.
        ema: whether they are the averaged ones.
        result: ``METRICS``, where NaN becomes null, ``images``, and ``intervals`` if they were computed.
        payload: the checkpoint.
        trained: the recipe of the training, where it is known.
    """
    weights, training = describe_weights(source, ema, payload, trained)
    backbone = config.model.backbone
    network = {"model": backbone.name, **{key: getattr(backbone, key) for key in NETWORK[1:]}}
    figures = {key: None if isinstance(each, float) and math.isnan(each) else each for key, each in result.items()}
    name = config.data.val_split if config.data.name == "coco" else config.data.name
    return {
        **network,
        "detector": config.model.name,
        **weights,
        **figures,
        "params": cost.count_parameters(model),
        "macs": count_macs(model, config.data),
        "protocol": describe_protocol(config, training),
        "dataset": {"name": name, **data.describe()},
        "environment": describe_environment(),
    }

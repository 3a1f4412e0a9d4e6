"""A detection, built from its recipe for ``train.py``."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_resnet import distributed
from lip_resnet.commands.initial_weights import load_initial_weights
from lip_resnet.config import DetectionConfig, InputError, ModelConfig
from lip_resnet.detection.loaders import DetectionEvalLoader, DetectionTrainLoader
from lip_resnet.detection.models import build_body, build_detector
from lip_resnet.detection.sources import build_sources
from lip_resnet.detection.task import Detection
from lip_resnet.training import run_folder
from lip_resnet.training.run import Built, Datasets, Provenance


def build(config: DetectionConfig, device: torch.device, folder: Path, resume: str) -> Built:
    """Data, network and task of a recipe; ``folder`` and ``resume`` say whether a run in it is continued.

    Raises:
        InputError: data, network and recipe do not fit each other.
    """
    train_source, val_source = build_sources(config.data, config.model.num_classes)
    loader = DetectionTrainLoader(train_source, config.data, config.optim.accumulate, config.train.seed)
    val_loader = DetectionEvalLoader(val_source, config.data)
    provenance = Provenance([distributed.world_size()], class_names=train_source.classes)
    body = build_body(config.model.backbone)
    if config.model.backbone.weights and not distributed.on_main(lambda: run_folder.will_continue(folder, resume)):
        provenance.initial_weights = load_backbone_weights(body, config)
    model = build_detector(config.model, body)

    def describe() -> Datasets:
        return distributed.on_main(lambda: {"train": train_source.describe(), "val": val_source.describe()})

    task = Detection(config, model, device, val_loader)
    observe = None
    if config.train.log_images:
        try:
            from lip_resnet.detection.pictures import build_monitor
        except ImportError as error:
            line = 'train.log_images needs the package matplotlib: pip install "lip-resnet[insight]"'
            raise InputError(line) from error
        observe = build_monitor(val_source, config.data, config.train.channels_last, config.train.log_images)
    return Built(task, model, loader, provenance, config.model.backbone.weights, describe, observe)


def load_backbone_weights(body: nn.Module, config: DetectionConfig) -> dict[str, Any]:
    """Load ``model.backbone.weights`` into a network; its classifier is not loaded.

    Returns:
        ``Provenance.initial_weights``.

    Raises:
        InputError: as ``load_initial_weights``.
    """
    backbone = config.model.backbone
    keys = ("name", "args", "downsampling", "circular_padding", "weights", "convert")
    network = ModelConfig(**{key: getattr(backbone, key) for key in keys}, new_head=True)
    return load_initial_weights(body, network, config.data)

"""A classification, built from its recipe for ``train.py``."""

import functools
from pathlib import Path

import torch

from lip_resnet import distributed
from lip_resnet.commands.initial_weights import load_initial_weights
from lip_resnet.config import Config, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, class_names
from lip_resnet.data.photographs import sample_images
from lip_resnet.insight.monitor import build_monitor
from lip_resnet.models import registry
from lip_resnet.training import run_folder
from lip_resnet.training.classification import Classification
from lip_resnet.training.run import Built, Provenance, describe_datasets


def build(config: Config, device: torch.device, folder: Path, resume: str) -> Built:
    """Data, network and task of a recipe; ``folder`` and ``resume`` say whether a run in it is continued.

    Raises:
        InputError: data, network and recipe do not fit each other.
    """
    selection = None
    if (path := config.data.classes) is not None:
        selection = distributed.on_main(lambda: run_folder.read_selection(path, folder, resume))
    train_source, val_source = build_sources(config.data, config.model.num_classes, ("train", "val"), selection)
    loader = TrainLoader(train_source, config.data, config.optim.accumulate, config.train.seed)
    val_loader = EvalLoader(val_source, config.data)
    model = registry.build_model(config.model, **regularisers(config.train))
    registry.check_size(model, min(*config.data.sizes, config.data.eval_size))
    parts = config.optim.accumulate * (1 if config.train.sync_bn else distributed.world_size())
    registry.check_batch_norm(model, config.data.sizes[0], config.data.batch_size // parts)
    provenance = Provenance([distributed.world_size()], selection=selection)
    provenance.class_names = class_names(train_source, config.data.name)
    if config.model.weights and not distributed.on_main(lambda: run_folder.will_continue(folder, resume)):
        provenance.initial_weights = load_initial_weights(model, config.model, config.data, provenance.class_names)
    task = Classification(config, device, val_loader)
    datasets = functools.partial(describe_datasets, train_source, val_source)
    observe = None
    if config.train.log_images:
        images = [(each.name, each.pixels) for each in sample_images(val_source, config.data, config.train.log_images)]
        observe = build_monitor(model, images, config.data.mean, config.data.std)
    return Built(task, model, loader, provenance, config.model.weights, datasets, observe)


def regularisers(train: TrainConfig) -> dict[str, float]:
    """The rates that are keyword arguments of the model; none for a rate of 0, since not every model has them."""
    rates = {"drop_path_rate": train.drop_path, "drop_rate": train.drop}
    return {name: rate for name, rate in rates.items() if rate}

"""A small training state and its loaders."""

import copy
import sys

import torch

import lip_commands
from helpers import small_config
from lip_resnet import cli
from lip_resnet.commands import train
from lip_resnet.data import EvalLoader, TrainLoader, build_sources
from lip_resnet.models import registry
from lip_resnet.training import run_folder
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state, train_one_epoch

CPU = torch.device("cpu")


def prepare(**changes):
    config = small_config(**changes)
    torch.manual_seed(0)
    model = registry.build_model(config.model, drop_rate=config.train.drop)
    images, val = build_sources(config.data, config.model.num_classes)
    loader = TrainLoader(images, config.data, config.optim.accumulate, config.train.seed)
    val_loader = EvalLoader(val, config.data)
    return config, build_state(model, config, CPU, Classification(config, CPU, val_loader)), loader, val_loader


def how(config):
    """The keywords of ``evaluate``."""
    data, train = config.data, config.train
    return {"precision": train.precision, "channels_last": train.channels_last, "mean": data.mean, "std": data.std}


def run(config, state, loader, norm_excludes=()):
    logged = []
    train_one_epoch(state, loader, config, norm_excludes=norm_excludes, on_step=lambda: None, on_log=logged.append)
    return logged


def run_train(monkeypatch, *arguments: object) -> None:
    """Run train.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        train.main(lip_commands.train_parser(cli.ArgumentParser).parse_intermixed_args())
    finally:
        while run_folder._locks:
            run_folder._locks.pop().close()  # as the end of the process does


def whole_state(state) -> dict[str, torch.Tensor]:
    """Every tensor that a step may change, by name."""
    entries = {f"model.{key}": value for key, value in state.model.state_dict().items()}
    entries |= {f"ema.{key}": value for key, value in state.ema.module.state_dict().items()}
    for index, (_, tensors) in enumerate(sorted(state.optimizer.state_dict()["state"].items())):
        entries |= {f"optimizer.{index}.{key}": value for key, value in tensors.items() if torch.is_tensor(value)}
    entries["window"] = state.window.sums
    return copy.deepcopy({key: value.detach() for key, value in entries.items()})


def same(one, other) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key

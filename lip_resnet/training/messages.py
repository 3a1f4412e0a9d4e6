"""What a run says in words: the lines at its start and its end, and the line of an epoch."""

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_resnet import distributed
from lip_resnet.config import Recipe
from lip_resnet.environment import describe_environment

_LABELS = {"top1": "top-1", "top5": "top-5"}


def describe_setup(
    config: Recipe, model: nn.Module, device: torch.device, datasets: dict[str, dict[str, Any]], total: int, epoch: int
) -> list[str]:
    """Network, device, data and length of a run, a line each.

    Args:
        datasets: ``describe_source`` of the splits "train" and "val".
        total: optimizer steps of the run.
        epoch: optimizer steps of an epoch.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    network = getattr(config.model, "backbone", config.model)
    name = config.model.name if network is config.model else f"{config.model.name} on {network.name}"
    downsampling = network.downsampling
    layers = f", downsampling: {downsampling}" if downsampling else ""
    processes = distributed.world_size()
    each = "1 process" if processes == 1 else f"{processes} processes"
    images = " and ".join(
        f"{dataset['images']:,} {kind} images"
        for kind, dataset in (("training", datasets["train"]), ("validation", datasets["val"]))
    )
    classes = datasets["train"].get("classes")
    return [
        f"network   {name}, {parameters:,} parameters{layers}",
        f"device    {device.type}: {describe_environment()['hardware']}; {each}, {config.train.precision}",
        f"data      {images}" + (f", {classes:,} classes" if classes else ""),
        f"steps     {total:,} of {config.data.batch_size:,} images; an epoch has {epoch:,}",
    ]


def describe_start(folder: Path, source: Path | None, step: int) -> str:
    """The line that says where the run is written and whether it continues."""
    return f"run       {folder}: " + (f"continued from {source} at step {step:,}" if source else "new")


def describe_end(folder: Path, metric: str, last: float, best: float, seconds: float) -> list[str]:
    """How a finished run ended, where its files are, and the command that evaluates it, a line each.

    Args:
        metric: which metric selects the best, such as top1; ``last`` and ``best`` are its values, percent.
        seconds: since this start of the run.
    """
    label, elapsed = _LABELS.get(metric, metric), datetime.timedelta(seconds=round(seconds))
    command = "lip-eval" if Path(sys.argv[0]).name == "lip-train" else "python eval.py"
    return [
        f"finished  {label} {last:.2f}% last, {best:.2f}% best (selected on val); {elapsed} since the start",
        f"files     {folder}: checkpoints/last.pt, checkpoints/best.pt, metrics.jsonl, tensorboard/",
        f"evaluate  {command} --checkpoint {shlex.quote(str(folder))}",
    ]


def describe_epoch(epoch: int, epochs: int, parts: dict[str, dict[str, float]]) -> str:
    """``epoch  3/90 | train loss  2.9310 top-1  37.12% | val loss  2.5519 top-1  43.80% top-5  69.42%``.

    Args:
        epoch: from 0.
        parts: train, val and val_ema, each metric -> value; losses, and metrics in percent.
    """
    count = f"epoch {epoch + 1:>{len(str(epochs))}}/{epochs}"
    return " | ".join([count, *(f"{name} {_values(values)}" for name, values in parts.items() if values)])


def _values(values: dict[str, float]) -> str:
    return " ".join(
        f"loss {value:7.4f}" if name == "loss" else f"{_LABELS.get(name, name)} {value:6.2f}%"
        for name, value in values.items()
    )

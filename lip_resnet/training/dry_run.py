"""A dry run: a recipe's first steps, timed, and the time of the whole run computed from them; nothing is written."""

import datetime
import math
import statistics

import torch

from lip_resnet import memory
from lip_resnet.config import InputError, Recipe
from lip_resnet.training.engine import TrainState, build_state, train_one_epoch, warm_up_ddp
from lip_resnet.training.messages import describe_setup
from lip_resnet.training.out_of_memory import suggest
from lip_resnet.training.run import Built
from lip_resnet.training.task import Loader

STEPS = 3
"""Steps of each image size; the first, which may compile and choose algorithms, is not timed."""


def describe_run(config: Recipe, built: Built, device: torch.device) -> list[str]:
    """Take three steps of every image size of the recipe, and say what was built, its speed, memory and time, in lines.

    The time counts an evaluated image as a third of one that is trained on. A collective.

    Raises:
        OutOfMemory: a batch does not fit; says what does.
        FloatingPointError: a step is not finite.
    """
    changes = {"log_every": 1, "max_steps": None, "on_nonfinite": "stop"}
    steps_config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    state = build_state(built.model, steps_config, device, built.task)
    datasets = built.describe_datasets()
    epoch, loader = len(built.loader), built.loader
    total = min(config.train.epochs * epoch, config.train.max_steps or config.train.epochs * epoch)
    lines = describe_setup(config, state.model, device, datasets, total, epoch)

    rate, seconds = 0.0, 0.0
    with memory.explained(lambda: suggest(state, config, len(loader.source))):
        warm_up_ddp(state, config)
        for size, (first, steps) in _steps_by_size(config, epoch, total).items():
            rate, wait = _measure(state, loader, steps_config, first)
            step = config.data.batch_size / rate
            seconds += step * steps
            speed = f"{rate:,.1f} images/s" + (f" at {size} pixels" if size else "")
            lines.append(f"speed     {speed}: {step:.3f} s a step, {wait:.0%} of it waiting for images")
    if used := memory.describe_peak(device):
        lines.append(f"memory    {used}")
    epochs = math.ceil(total / epoch)
    evaluations = math.ceil(epochs / config.train.eval_every) * (1 if state.ema is None else 2)
    seconds += evaluations * datasets["val"]["images"] / 3 / rate
    clock = datetime.timedelta(seconds=round(seconds))
    lines.append(f"time      {seconds / 3600:,.2f} hours ({clock}) for all steps and {evaluations:,} evaluations")
    return lines


def _steps_by_size(config: Recipe, epoch: int, total: int) -> dict[int, tuple[int, int]]:
    """Side of the training images -> the first epoch that has it, and all steps at this size; 0: of any size."""
    size_at = getattr(config.data, "size_at", lambda _: 0)
    sizes: dict[int, tuple[int, int]] = {}
    for number in range(math.ceil(total / epoch)):
        first, steps = sizes.get(size := size_at(number), (number, 0))
        sizes[size] = first, steps + min(epoch, total - number * epoch)
    return sizes


def _measure(state: TrainState, loader: Loader, config: Recipe, epoch: int) -> tuple[float, float]:
    """Train ``STEPS`` steps from the start of an epoch on: images per second, and the share of time spent waiting."""
    logged: list[dict[str, float]] = []
    state.step = first = epoch * len(loader)
    while len(logged) < STEPS:
        if state.step == first + len(loader):
            state.step = first
        train_one_epoch(
            state, loader, config, on_step=lambda: len(logged) >= STEPS, on_log=lambda values: logged.append(values)
        )
    rates = [values["train/images_per_second"] for values in logged[1:]]
    if not all(rates):
        raise InputError("a step of the dry run had no image that decodes; see data.on_error")
    return statistics.harmonic_mean(rates), statistics.fmean(values["train/data_wait"] for values in logged[1:])

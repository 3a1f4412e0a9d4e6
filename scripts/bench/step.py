"""``benchmark.py step``: the cost of the parts and options of a training step of LIP-ResNet-50.

Before a variant is timed, its losses in two steps are compared with those of the step of ``train.py``.
"""

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.contestants import NETWORKS
from bench.network import build_config, make_batch
from bench.timing import Row, WrongResult, compare, ratio, spread
from lip_resnet.config import Config
from lip_resnet.evaluation.evaluate import autocast
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import TrainState, TrainStep, build_state

BARE, AS_TRAINED = "forward, backward, update", "as train.py"
PARTS: dict[str, tuple[str, ...]] = {
    BARE: (),
    "... and gradient norm": ("norm",),
    "... and gradient norm, counts": ("norm", "counts"),
}
"""Reference rows: steps without the guard, with these parts of ``train.py``'s step."""
VARIANTS: dict[str, tuple[str, ...]] = {
    AS_TRAINED: (),
    "with clipping": ("optim.clip_norm=1e6",),
    "with EMA": ("train.ema_decay=0.9999",),
    "contiguous": ("train.channels_last=false",),
    "torch.compile": ("train.compile=true",),
}
"""Steps of ``train.py`` (with norm, counts and guard), with overrides of the recipe."""
GPU_VARIANTS = {
    f"torch.compile, {mode}": ("train.compile=true", f"train.compile_mode={mode}")
    for mode in ("reduce-overhead", "max-autotune")
}


class BareStep:
    """The reference: normalise, forward, backward, update, and the ``parts`` of the engine's step: norm, counts."""

    def __init__(self, state: TrainState, config: Config, task: Classification, parts: tuple[str, ...]) -> None:
        self.state, self.config, self.task, self.parts = state, config, task, parts

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 and labels (B,) -> loss ()."""
        state = self.state
        images, labels, targets = self.task.prepare(images, labels, state.step, 0)
        with autocast(images.device, self.config.train.precision):
            logits = state.wrapped(images)
        logits = logits.float()
        loss = self.task.loss(logits, targets)
        state.scaler.scale(loss).backward()
        if "counts" in self.parts:
            state.window.add(logits.detach(), labels, loss.detach())
        if "norm" in self.parts:
            nn.utils.get_total_norm([parameter.grad for parameter in state.model.parameters()])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        return loss.detach()


def make_variant(
    name: str, model: nn.Module, config: Config, device: torch.device
) -> tuple[Callable[[], object], Callable[[], float]]:
    """A step to time, and the same step returning its loss, to check."""
    task, batch = Classification(config, device), make_batch(config, device)
    state = build_state(model, config, device, task)
    state.wrapped.train()
    if name in PARTS:
        bare = BareStep(state, config, task, PARTS[name])
        return lambda: bare(*batch.parts[0]), lambda: bare(*batch.parts[0]).item()
    step = TrainStep(state, config)

    def loss() -> float:
        state.window.reset()
        step(batch, config.optim.lr)
        return state.window.reduce()["loss"]

    return lambda: step(batch, config.optim.lr), loss


def make(
    options: argparse.Namespace, batch: int, model: nn.Module, name: str
) -> tuple[Callable[[], object], list[float]]:
    """A variant's step, and its losses in two steps."""
    torch.manual_seed(0)
    overrides = (VARIANTS | GPU_VARIANTS).get(name, ())
    config = build_config(options, batch, "channels_last", ("optim.lr=0.01", *overrides))
    run, loss = make_variant(name, copy.deepcopy(model), config, torch.device(options.device))
    return run, [loss(), loss()]


def prepare(
    options: argparse.Namespace, batch: int, model: nn.Module, truth: list[float], name: str
) -> Callable[[], object]:
    """A variant's step.

    Raises:
        WrongResult: its losses are not ``truth``.
    """
    run, losses = make(options, batch, model, name)
    tolerance = 1e-3 if options.precision == "float32" else 5e-2
    if not all(abs(a - b) < tolerance * b for a, b in zip(losses, truth, strict=True)):
        raise WrongResult(f"losses {losses} for {truth}")
    return run


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every batch and variant."""
    torch.manual_seed(0)
    model = NETWORKS["lip_resnet50"]()
    for batch in options.batch:
        common = {"network": "lip_resnet50", "precision": options.precision, "batch": batch, "size": options.size}
        _, truth = make(options, batch, model, AS_TRAINED)
        build = functools.partial(prepare, options, batch, model, truth)
        times, failed = compare(options.contestants, build, options)
        for name, error in failed.items():
            yield common | {"step": name, "failed": error}
        for name, seconds in times.items():
            row = common | {"step": name} | spread(seconds)
            row["images_per_second"] = batch / statistics.median(seconds)
            row["time / bare"] = ratio(seconds, times[BARE]) if BARE in times else None
            yield row
        print(f"batch {batch}: done", file=sys.stderr)

"""``benchmark.py step``: what the parts and the options of a training step of LIP-ResNet-50 cost.

A variant must train as the step of ``train.py`` does: its losses, of two steps, are compared before it is timed.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.contestants import NETWORKS
from bench.network import build_config, make_batch
from bench.timing import Row, WrongResult, compare, ratio, spread
from lip_resnet.config import Config
from lip_resnet.training.engine import TrainState, TrainStep, autocast, build_state
from lip_resnet.training.objective import Objective

BARE, AS_TRAINED = "forward, backward, update", "as train.py"
PARTS: dict[str, tuple[str, ...]] = {
    BARE: (),
    "... and gradient norm": ("norm",),
    "... and gradient norm, counts": ("norm", "counts"),
}
"""Reference rows, of a step without guard, with these parts of ``train.py``'s."""
VARIANTS: dict[str, tuple[str, ...]] = {
    AS_TRAINED: (),
    "with clipping": ("optim.clip_norm=1e6",),
    "with EMA": ("train.ema_decay=0.9999",),
    "contiguous": ("train.channels_last=false",),
    "torch.compile": ("train.compile=true",),
}
"""Steps of ``train.py`` (with norm, counts and guard), each with overrides of the recipe."""
GPU_VARIANTS = {
    f"torch.compile, {mode}": ("train.compile=true", f"train.compile_mode={mode}")
    for mode in ("reduce-overhead", "max-autotune")
}


class BareStep:
    """The reference: normalise, forward, backward and update; ``parts`` names what else of the engine's step it has."""

    def __init__(self, state: TrainState, config: Config, objective: Objective, parts: tuple[str, ...]) -> None:
        self.state, self.config, self.objective, self.parts = state, config, objective, parts

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss ()."""
        state = self.state
        images, labels, targets = self.objective.prepare(images, labels, state.step, 0)
        with autocast(images.device, self.config.train.precision):
            logits = state.wrapped(images)
        logits = logits.float()
        loss = self.objective.loss(logits, targets)
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
    """A step to time, and the same step for a check, which returns its loss."""
    state, objective, batch = build_state(model, config, device), Objective(config, device), make_batch(config, device)
    state.wrapped.train()
    if name in PARTS:
        bare = BareStep(state, config, objective, PARTS[name])
        return lambda: bare(*batch.parts[0]), lambda: bare(*batch.parts[0]).item()
    step = TrainStep(state, config, objective)

    def loss() -> float:
        state.window.reset()
        step(batch, config.optim.lr)
        return state.window.reduce()["loss"]

    return lambda: step(batch, config.optim.lr), loss


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every batch and variant."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = NETWORKS["lip_resnet50"]()
    tolerance = 1e-3 if options.precision == "float32" else 5e-2
    for batch in options.batch:
        common = {"network": "lip_resnet50", "precision": options.precision, "batch": batch, "size": options.size}

        def make(name: str, batch: int = batch) -> tuple[Callable[[], object], list[float]]:
            torch.manual_seed(0)
            overrides = (VARIANTS | GPU_VARIANTS).get(name, ())
            config = build_config(options, batch, "channels_last", ("optim.lr=0.01", *overrides))
            run, loss = make_variant(name, copy.deepcopy(model), config, device)
            return run, [loss(), loss()]

        _, truth = make(AS_TRAINED)

        def prepare(name: str, make=make, truth=truth) -> Callable[[], object]:
            run, losses = make(name)
            if not all(abs(a - b) < tolerance * b for a, b in zip(losses, truth, strict=True)):
                raise WrongResult(f"losses {losses} for {truth}")
            return run

        times, failed = compare(options.contestants, prepare, options)
        for name, error in failed.items():
            yield common | {"step": name, "failed": error}
        for name, seconds in times.items():
            row = common | {"step": name} | spread(seconds)
            row["images_per_second"] = batch / statistics.median(seconds)
            row["time / bare"] = ratio(seconds, times[BARE]) if BARE in times else None
            yield row
        print(f"batch {batch}: done", file=sys.stderr)

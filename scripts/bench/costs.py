"""``study.py measure``: latency and training time of a study's variants, side by side; networks that cost as much."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.network import make_inference, make_step
from bench.timing import Row, compare, ratio, spread
from lip_resnet import distributed
from lip_resnet.config import Config, InputError
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation.render import render
from lip_resnet.models import registry
from lip_resnet.study.design import Design

KINDS: dict[str, Callable[..., Callable[[], object]]] = {"training": make_step, "inference": make_inference}


def measure(design: Design, candidates: Sequence[str], rounds: int, batch: int | None, clock: str) -> Row:
    """Time a training step and a forward pass of every variant and candidate, in turn, on this machine.

    Args:
        candidates: further models, such as deeper ResNets, with the baseline's recipe.
        rounds: measured rounds.
        batch: images of a step and of a forward pass; None: those of a step of one process of the baseline's recipe.
        clock: of ``bench.timing.CLOCKS``; a GPU has its own.

    Returns:
        ``batch``, ``clock``, ``environment``, and for ``training`` and ``inference``: name -> milliseconds an image
        (median and quartiles), and the ``ratio`` to the baseline, the median over the rounds.

    Raises:
        InputError: a network fails, or CPU time is asked for on a GPU or of several threads, which it would add up.
    """
    recipes, baseline = dict(design.recipes), design.recipes[design.study.baseline]
    if batch is None:
        batch = max(1, baseline.data.batch_size // (design.study.processes * baseline.optim.accumulate))
    for name in candidates:
        network = baseline.model.model_copy(update={"name": name, "args": {}, "downsampling": {}})
        recipes.setdefault(name, baseline.model_copy(update={"model": network}))
    device = distributed.device()
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise InputError("--clock cpu is for one thread on the CPU: set OMP_NUM_THREADS=1 and CUDA_VISIBLE_DEVICES=")
    options = argparse.Namespace(rounds=rounds, clock=clock, device=device.type)
    row: Row = {
        "batch": batch,
        "clock": "gpu" if device.type == "cuda" else clock,
        "environment": describe_environment(),
    }
    for kind, make in KINDS.items():
        times, failed = compare(
            list(recipes), lambda name, make=make: _prepare(recipes[name], make, batch, device), options
        )
        if failed:
            name, error = next(iter(failed.items()))
            raise InputError(f"measure: {name}: {error}")
        row[kind] = {
            name: {key: value / batch for key, value in spread(seconds).items()}
            | {"ratio": ratio(seconds, times[design.study.baseline])}
            for name, seconds in times.items()
        }
    return row


def _prepare(recipe: Config, make: Callable[..., Callable[[], object]], batch: int, device: torch.device) -> Any:
    """A network of a recipe as a function to time; run once."""
    # The time of a step does not depend on its learning rate, but noise must not diverge.
    changes = {"data": recipe.data.model_copy(update={"batch_size": batch})}
    changes["optim"] = recipe.optim.model_copy(update={"lr": 1e-6, "accumulate": 1})
    recipe = recipe.model_copy(update=changes)
    run = make(registry.build_model(recipe.model), recipe, device)
    run()
    return run


def summarize(design: Design, row: Row) -> list[str]:
    """The measurement as a table, and what an equal-latency and an equal-time comparison would train."""
    header = ["network", "training ms/image", "/ baseline", "inference ms/image", "/ baseline"]
    names = list(row["training"])
    lines = [
        [
            name,
            *(text for kind in KINDS for text in (f"{row[kind][name]['ms']:.3f}", f"{row[kind][name]['ratio']:.2f}")),
        ]
        for name in names
    ]
    study, recipe = design.study, design.recipes[design.study.primary]
    epochs = design.recipes[study.baseline].train.epochs * row["training"][study.primary]["ratio"]
    notes = [
        f"equal time: {study.baseline} for {round(epochs)} epochs takes as long as {study.primary} for "
        f"{recipe.train.epochs}: a variant {{train: {{epochs: {round(epochs)}}}}} with may_differ: [train.epochs]"
    ]
    others = {name: row["inference"][name]["ms"] for name in names if name != study.primary}
    wanted = row["inference"][study.primary]["ms"]
    nearest = min(others, key=lambda name: abs(others[name] / wanted - 1))
    notes.append(
        f"equal latency: of these networks {nearest} is nearest to {study.primary}, "
        f"{others[nearest] / wanted:.2f} of its time: a variant {{model: {{name: {nearest}}}}}"
    )
    first = f"batches of {row['batch']} images on {row['environment']['hardware']}:"
    return [first, "", *render(header, lines).rstrip().splitlines(), "", *notes]

"""``benchmark.py model | train | memory``: whole networks, checked, then measured.

They are built and trained by the engine's functions, as in ``train.py``, with the paper's recipe.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bench.contestants import FLOOR, build_network
from bench.timing import LAYOUTS, Row, attempt, compare, ratio, spread
from lip_resnet.config import Config
from lip_resnet.data import Batch
from lip_resnet.evaluation.evaluate import autocast
from lip_resnet.recipe import load_config
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import TrainStep, build_state

RECIPE = Path(__file__).parents[2] / "configs" / "imagenet" / "lip_resnet50_step90.yaml"


def build_config(options: argparse.Namespace, batch: int, layout: str, overrides: tuple[str, ...] = ()) -> Config:
    """The paper's recipe with the command line's options.

    The learning rate is tiny: the floor's gradients are not those of a loss, and its weights must stay finite.
    """
    changes = [
        f"data.batch_size={batch}",
        f"data.size={options.size}",
        f"train.precision={options.precision}",
        f"train.channels_last={layout == 'channels_last'}",
        "optim.lr=1e-6",
    ]
    if getattr(options, "compile", None):
        changes += ["train.compile=true", f"train.compile_mode={options.compile}"]
    return load_config(RECIPE, (*changes, *overrides))


def make_batch(config: Config, device: torch.device) -> Batch:
    """A batch of noise as a loader's, on the device: images (B, 3, size, size) uint8 in channels-last order."""
    size, side = config.data.batch_size, config.data.size
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.randint(config.model.num_classes, (size,), device=device)
    return Batch([(images.contiguous(memory_format=torch.channels_last), labels)], size, 0)


def make_inference(model: nn.Module, config: Config, device: torch.device) -> Callable[[], object]:
    """One forward pass as in an evaluation, of normalised images."""
    task = Classification(config, device)
    model = build_state(model, config, device, task).model.eval()
    images, *_ = task.prepare(*make_batch(config, device).parts[0], 0, 0)

    def infer() -> torch.Tensor:
        with torch.inference_mode(), autocast(device, config.train.precision):
            return model(images)

    return infer


def make_step(model: nn.Module, config: Config, device: torch.device) -> Callable[[], object]:
    """One training step of ``train.py``, on a batch on the device."""
    state, batch = build_state(model, config, device, Classification(config, device)), make_batch(config, device)
    state.wrapped.train()
    step = TrainStep(state, config)
    return lambda: step(batch, config.optim.lr)


def prepare(
    make: Callable[..., Callable[[], object]], config: Config, layout: str, device: torch.device, name: str
) -> Callable[[], object]:
    """A network, checked, as a function to time; run once."""
    run = make(build_network(name, device.type, LAYOUTS[layout]), config, device)
    run()
    return run


def network_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: a forward pass, or a training step."""
    make = make_inference if options.what == "model" else make_step
    device = torch.device(options.device)
    for layout in options.layout:
        for batch in options.batch:
            config = build_config(options, batch, layout)
            common = describe(options, layout, batch) | {"compile": options.compile}
            build = functools.partial(prepare, make, config, layout, device)
            times, failed = compare(options.contestants, build, options)
            for name, error in failed.items():
                yield common | {"model": name, "failed": error}
            for name, seconds in times.items():
                row = common | {"model": name} | spread(seconds)
                if options.what == "model":
                    ordered = sorted(seconds)
                    for p in (90, 99):
                        row[f"ms_p{p}"] = ordered[math.ceil(p / 100 * len(ordered)) - 1] * 1e3
                row["images_per_second"] = batch / statistics.median(seconds)
                for key, other in (("time / resnet50", "resnet50"), ("time / floor", FLOOR)):
                    row[key] = ratio(seconds, times[other]) if other in times else None
                yield row
            print(f"{layout}, batch {batch}: done", file=sys.stderr)


def memory_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: memory of a training step, as ``measure_memory``."""
    device = torch.device(options.device)
    for layout in options.layout:
        for batch in options.batch:
            config, baseline = build_config(options, batch, layout), None
            for name in options.contestants:
                row = describe(options, layout, batch) | {"model": name}
                memory, error = attempt(measure_memory, name, config, layout, device)
                if memory is None:
                    yield row | {"failed": error}
                    continue
                baseline = memory if name == "resnet50" else baseline
                ratios = {
                    f"{key} / resnet50": memory[f"{key}_mib"] / baseline[f"{key}_mib"]
                    for key in ("kept", "peak")
                    if baseline is not None and f"{key}_mib" in memory
                }
                yield row | memory | ratios


def measure_memory(name: str, config: Config, layout: str, device: torch.device) -> Row:
    """MiB that a training step keeps for the backward pass; on a GPU its peak too."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    model = build_network(name, device.type, LAYOUTS[layout])
    step = make_step(model, config, device)
    memory = {"kept_mib": kept_bytes(model, step) / 2**20}
    if device.type == "cuda":  # the second step: in the first, cuDNN's search for algorithms takes more
        torch.cuda.reset_peak_memory_stats()
        step()
        memory["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return memory


def kept_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a training step keeps between forward and backward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    return sum(kept.values())


def describe(options: argparse.Namespace, layout: str, batch: int) -> Row:
    """The columns that all networks of one comparison share."""
    return {"layout": layout, "precision": options.precision, "batch": batch, "size": options.size}

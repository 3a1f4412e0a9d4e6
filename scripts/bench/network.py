"""``benchmark.py model | train | memory``: whole networks, each checked before it is measured.

They are built and trained by the functions of ``train.py``, after the paper's recipe.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bench.contestants import FLOOR, build_network
from bench.timing import LAYOUTS, Row, compare, failure_of, ratio, spread
from lip_resnet.config import Config
from lip_resnet.data import Batch
from lip_resnet.recipe import load_config
from lip_resnet.training.engine import TrainStep, autocast, build_state
from lip_resnet.training.objective import Objective

RECIPE = Path(__file__).parents[2] / "configs" / "imagenet" / "lip_resnet50_step90.yaml"


def build_config(options: argparse.Namespace, batch: int, layout: str, overrides: tuple[str, ...] = ()) -> Config:
    """The paper's recipe with the command line's options.

    The learning rate is tiny: the floor's gradients belong to no loss, and its weights must stay finite.
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
    """Noise as a loader and ``prefetch`` would give it: images (B, 3, size, size) uint8 in channels-last order."""
    size, side = config.data.batch_size, config.data.size
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8, device=device)
    labels = torch.randint(config.model.num_classes, (size,), device=device)
    return Batch([(images.contiguous(memory_format=torch.channels_last), labels)], size, 0)


def make_inference(model: nn.Module, config: Config, device: torch.device) -> Callable[[], object]:
    """One forward pass as an evaluation's, of images that are normalised already."""
    model = build_state(model, config, device).model.eval()
    images, *_ = Objective(config, device).prepare(*make_batch(config, device).parts[0], 0, 0)

    def infer() -> torch.Tensor:
        with torch.inference_mode(), autocast(device, config.train.precision):
            return model(images)

    return infer


def make_step(model: nn.Module, config: Config, device: torch.device) -> Callable[[], object]:
    """One step of ``train.py`` on a batch that is on the device already."""
    state, batch = build_state(model, config, device), make_batch(config, device)
    state.wrapped.train()
    step = TrainStep(state, config, Objective(config, device))
    return lambda: step(batch, config.optim.lr)


def network_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: a forward pass, or a training step."""
    make = make_inference if options.what == "model" else make_step
    device = torch.device(options.device)
    for layout in options.layout:
        for batch in options.batch:
            config = build_config(options, batch, layout)
            common = describe(options, layout, batch) | {"compile": options.compile}

            def prepare(name: str, config: Config = config, layout: str = layout) -> Callable[[], object]:
                run = make(build_network(name, options.device, LAYOUTS[layout]), config, device)
                run()
                return run

            times, failed = compare(options.contestants, prepare, options)
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
    """One row for every layout, batch and network: what a training step keeps, on a GPU its peak as well."""
    device = torch.device(options.device)
    for layout in options.layout:
        for batch in options.batch:
            config, baseline = build_config(options, batch, layout), None
            for name in options.contestants:
                row = describe(options, layout, batch) | {"model": name}

                def measure(name: str = name, row: Row = row, config: Config = config, layout: str = layout) -> None:
                    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                    model = build_network(name, options.device, LAYOUTS[layout])
                    step = make_step(model, config, device)
                    row["kept_mib"] = kept_bytes(model, step) / 2**20
                    if device.type == "cuda":  # not of the first step, whose search for algorithms takes more
                        torch.cuda.reset_peak_memory_stats()
                        step()
                        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20

                failure = failure_of(measure)
                if failure is not None:
                    yield row | {"failed": failure}
                    continue
                baseline = row if name == "resnet50" else baseline
                for key in ("kept", "peak"):
                    if f"{key}_mib" in row and baseline is not None:
                        row[f"{key} / resnet50"] = row[f"{key}_mib"] / baseline[f"{key}_mib"]
                yield row


def kept_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """What a training step keeps between forward and backward, parameters and buffers not counted."""
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
    """What all networks of one comparison have in common."""
    return {"layout": layout, "precision": options.precision, "batch": batch, "size": options.size}

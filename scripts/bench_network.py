"""``benchmark.py model | train | step | memory``: whole networks, each checked before it is timed."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bench_timing import DTYPES, LAYOUTS, Row, failure_of, interleave, ratio, spread
from contestants import FLOOR, build_networks
from torch import Tensor, nn


def network_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: a forward pass, or a training step of SGD with momentum."""
    autocast = autocast_of(options)
    for layout in options.layout:
        models = build_networks(options.contestants, options.device, LAYOUTS[layout])
        for batch in options.batch:
            common = describe(options, layout, batch) | {"compile": options.compile}
            images = make_images(batch, layout, options)
            labels = torch.randint(1000, (batch,), device=options.device)
            steps = {}
            for name, (model, wrong) in models.items():
                step = make_step(model, images, labels, autocast, options)
                failure = wrong or failure_of(step)
                if failure is None:
                    steps[name] = step
                else:
                    yield common | {"model": name, "failed": failure}
            times = interleave(steps, options)
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


def make_step(model: nn.Module, images: Tensor, labels: Tensor, autocast, options: argparse.Namespace) -> Callable:
    """What is timed of one network."""
    call = torch.compile(model, mode=options.compile) if options.compile else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def inference():
        model.eval()
        with torch.inference_mode(), autocast:
            return call(images)

    def train():
        model.train()
        with autocast:
            loss = F.cross_entropy(call(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return inference if options.what == "model" else train


def memory_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: what a training step keeps, on a GPU its peak as well."""
    autocast = autocast_of(options)
    for layout in options.layout:
        models = build_networks(options.contestants, options.device, LAYOUTS[layout])
        for batch in options.batch:
            images, baseline = make_images(batch, layout, options), None
            for name, (model, wrong) in models.items():
                row = describe(options, layout, batch) | {"model": name}
                failure = wrong or failure_of(
                    lambda model=model, row=row: row.update(kept_mib=kept_bytes(model, images, autocast) / 2**20)  # noqa: B023
                )
                model.zero_grad(set_to_none=True)
                if failure is not None:
                    yield row | {"failed": failure}
                    continue
                if options.device == "cuda":
                    row["peak_mib"] = peak_bytes(model, images, autocast) / 2**20
                baseline = row if name == "resnet50" else baseline
                for key in ("kept", "peak"):
                    if f"{key}_mib" in row and baseline is not None:
                        row[f"{key} / resnet50"] = row[f"{key}_mib"] / baseline[f"{key}_mib"]
                yield row


def kept_bytes(model: nn.Module, images: Tensor, autocast: torch.autocast) -> int:
    """What a training step keeps between forward and backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        loss = model.train()(images).float().mean()
    loss.backward()
    return sum(kept.values())


def peak_bytes(model: nn.Module, images: Tensor, autocast: torch.autocast) -> int:
    """The most that a training step holds on the GPU, its own weights and images counted, other networks not.

    Not of the first step, whose search for algorithms takes more.
    """
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), images))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept_bytes(model, images, autocast)
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before + own


def make_images(batch: int, layout: str, options: argparse.Namespace) -> Tensor:
    """Noise, (batch, 3, size, size)."""
    images = torch.randn(batch, 3, options.size, options.size, device=options.device)
    return images.to(memory_format=LAYOUTS[layout])


def autocast_of(options: argparse.Namespace) -> torch.autocast:
    """The networks' precision."""
    low = options.precision in ("bfloat16", "float16")
    return torch.autocast(options.device, DTYPES.get(options.precision), enabled=low)


def describe(options: argparse.Namespace, layout: str, batch: int) -> Row:
    """What all networks of one comparison have in common."""
    return {"layout": layout, "precision": options.precision, "batch": batch, "size": options.size}

"""``benchmark.py step``: what the options of a training step of LIP-ResNet-50 are worth, one changed at a time.

A variant must train as the step of ``train.py`` does: its loss after an update is compared before it is timed.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_network import autocast_of
from bench_timing import LAYOUTS, Row, failure_of, interleave, ratio, spread
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import lip_resnet  # noqa: F401 (registers the network)


class Variant(NamedTuple):
    """The options of a step."""

    layout: str = "channels_last"
    fused: bool = True
    """One kernel for all of SGD; else PyTorch's foreach, a kernel an operation."""
    bucket_views: bool | None = None
    """None: one process; else one of several, its gradients views of what is sent, or copied there."""
    compressed: bool = False
    """Gradients sent in bfloat16."""
    compile: str | None = None
    cudnn_benchmark: bool = True


AS_TRAINED, PARALLEL = "as train.py", "as train.py, of several processes"
VARIANTS = {
    AS_TRAINED: Variant(),
    "contiguous": Variant(layout="contiguous"),
    "foreach optimizer": Variant(fused=False),
    "torch.compile": Variant(compile="default"),
    PARALLEL: Variant(bucket_views=True),
    "of several, no bucket views": Variant(bucket_views=False),
    "of several, bfloat16 gradients": Variant(bucket_views=True, compressed=True),
}
GPU_VARIANTS = {
    "torch.compile, reduce-overhead": Variant(compile="reduce-overhead"),
    "torch.compile, max-autotune": Variant(compile="max-autotune"),
    "no cudnn.benchmark": Variant(cudnn_benchmark=False),
}


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every batch and variant. The processes are one: what sending costs is not measured here."""
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for batch in options.batch:
            yield from batch_rows(batch, options)
            print(f"batch {batch}: done", file=sys.stderr)
    finally:
        dist.destroy_process_group()


def batch_rows(batch: int, options: argparse.Namespace) -> Iterator[Row]:
    """One row for every variant."""
    variants = VARIANTS | GPU_VARIANTS
    torch.manual_seed(0)
    model = timm.create_model("lip_resnet50").to(options.device)
    images = torch.randn(batch, 3, options.size, options.size, device=options.device)
    labels = torch.randint(1000, (batch,), device=options.device)
    common = {"network": "lip_resnet50", "precision": options.precision, "batch": batch, "size": options.size}
    tolerance = 1e-3 if options.precision == "float32" else 5e-2
    truth = _losses(make_step(copy.deepcopy(model), images, labels, Variant(), options))
    steps = {}
    for name in options.contestants:
        step = make_step(copy.deepcopy(model), images, labels, variants[name], options)
        losses: list[float] = []
        failure = failure_of(lambda step=step, losses=losses: losses.extend(_losses(step)))
        if failure is None and not all(abs(a - b) < tolerance * b for a, b in zip(losses, truth, strict=True)):
            failure = f"wrong: losses {losses} for {truth}"
        if failure is None:
            steps[name] = step
        else:
            yield common | {"step": name, "failed": failure}
    times = interleave(steps, options)
    for name, seconds in times.items():
        row = common | {"step": name} | spread(seconds)
        row["images_per_second"] = batch / statistics.median(seconds)
        row["time / as train.py"] = ratio(seconds, times[AS_TRAINED]) if AS_TRAINED in times else None
        yield row


def _losses(step: Callable[[], Tensor]) -> list[float]:
    """Of the first step, and after its update."""
    return [step().item() for _ in range(2)]


def make_step(
    model: nn.Module, images: Tensor, labels: Tensor, variant: Variant, options: argparse.Namespace
) -> Callable[[], Tensor]:
    """What is timed: forward, backward, update; returns the loss."""
    layout, autocast = LAYOUTS[variant.layout], autocast_of(options)
    call = model.train().to(memory_format=layout)
    images = images.to(memory_format=layout)
    if variant.compile:
        model.compile(mode=variant.compile)
    if variant.bucket_views is not None:
        call = DistributedDataParallel(model, gradient_as_bucket_view=variant.bucket_views)
        if variant.compressed:
            call.register_comm_hook(None, bf16_compress_hook)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, fused=variant.fused, foreach=None if variant.fused else True
    )

    def step() -> Tensor:
        # `flags` sets all that it can, and its defaults are not torch's own.
        tf32 = torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True, benchmark=variant.cudnn_benchmark, allow_tf32=tf32):
            with autocast:
                loss = F.cross_entropy(call(images).float(), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step

"""What DistributedDataParallel costs, measured on the processes that torchrun has started, beside ``ddp_model``."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_model import MIB, Cluster, step, traffic

from lip_resnet import distributed, runlog
from lip_resnet.config import InputError
from lip_resnet.engine import autocast, build_state
from lip_resnet.models import registry
from lip_resnet.recipe import parse_config

PROBES = (4096, 32 * MIB)
"""Bytes of the two sums that give latency and bandwidth; the gradient buckets lie between them."""


def fit(times: tuple[float, float], processes: int) -> tuple[float, float]:
    """(seconds a hop, bytes/s) of a ring, whose sum takes 2 (n-1) latency + 2 (n-1)/n bytes / bandwidth, from both
    probes' seconds."""
    hops, share = 2 * (processes - 1), 2 * (processes - 1) / processes
    per_byte = (times[1] - times[0]) / (share * (PROBES[1] - PROBES[0]))
    return max(0.0, times[0] - share * PROBES[0] * per_byte) / hops, 1 / per_byte


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of ``work``, which all processes begin together; the slowest's."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    distributed.gather_rows(torch.zeros(1))
    began = time.perf_counter()
    work()
    settle()
    return distributed.gather_rows(torch.tensor([time.perf_counter() - began], dtype=torch.float64)).max().item()


def _medians(works: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Name -> the seconds of every round; the works take turns in each, and two rounds are not counted."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 2):
        for name, work in works.items():
            seconds = _timed(work, device)
            if number >= 2:
                found[name].append(seconds)
    return found


def measure(name: str, batch: int, size: int, precision: str, rounds: int) -> dict[str, Any]:
    """Time the sums of a network's gradients and its training step with and without them, and predict both.

    Args:
        batch, size: images of each process, and their side.

    Raises:
        InputError: one process only.
    """
    processes = distributed.world_size()
    if processes == 1:
        raise InputError("--measure sums between processes: start it with torchrun --standalone --nproc_per_node=2")
    device = distributed.device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    load_before = os.getloadavg()[0]
    torch.manual_seed(0)
    model = registry.create_model(name)
    load = traffic(model, size)
    recipe = {
        "model": {"name": name},
        "data": {"name": "synthetic", "batch_size": batch * processes},
        "optim": {"lr": 0.1},
        "train": {"epochs": 1, "precision": precision},
    }
    state = build_state(model, parse_config(recipe, "--measure"), device)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)

    def forward() -> torch.Tensor:
        with autocast(device, precision):
            return F.cross_entropy(state.wrapped(images).float(), labels)

    def alone(backward: bool = True) -> None:
        with state.wrapped.no_sync():
            loss = forward()
            if backward:
                loss.backward()

    probes = [torch.zeros(count // 4, device=device) for count in PROBES]
    buckets = [torch.zeros(bucket.bytes // 4, device=device) for bucket in load.buckets]
    seconds = _medians(
        {
            "small": lambda: dist.all_reduce(probes[0]),
            "large": lambda: dist.all_reduce(probes[1]),
            "buckets": lambda: [dist.all_reduce(bucket) for bucket in buckets],
            "forward": lambda: alone(backward=False),
            "alone": alone,
            "together": lambda: forward().backward(),
        },
        device,
        rounds,
    )
    median = {key: statistics.median(values) for key, values in seconds.items()}
    latency, bandwidth = fit((median["small"], median["large"]), processes)
    cluster = Cluster(processes, bandwidth, bandwidth, latency, latency)
    share = max(0.0, 1 - median["forward"] / median["alone"])  # a busy machine can delay the forward alone
    predicted = step(load, median["alone"], cluster, processes, backward=share)
    return {
        "model": name,
        "processes": processes,
        "batch": batch,
        "size": size,
        "precision": precision,
        "rounds": rounds,
        "gradient_bytes": load.gradients,
        "bandwidth": bandwidth,
        "latency": latency,
        "backward_share": share,
        "predicted": {
            "buckets": sum(cluster.all_reduce(bucket.bytes, processes) for bucket in load.buckets),
            "alone": predicted.compute,
            "together": predicted.total,
            "together_without_overlap": predicted.compute + predicted.sent,
        },
        "seconds": seconds,
        "load": load_before,
        "environment": runlog.describe_environment(device.type),
    }

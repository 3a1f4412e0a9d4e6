"""``benchmark.py kernels``: the kernels (on a CPU the operators) of a training step, by their time."""

import argparse
from collections.abc import Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.network import build_config, describe, make_step, prepare
from bench.timing import Row, attempt

WARM_UP, STEPS = 2, 3
MOST = 20
"""Kernels with a row of their own; all others share one."""


def kernel_rows(options: argparse.Namespace) -> Iterator[Row]:
    """For every layout, batch and network one row per kernel, the longest first: milliseconds and calls a step."""
    device = torch.device(options.device)
    for layout in options.layout:
        for batch in options.batch:
            config = build_config(options, batch, layout)
            for name in options.contestants:
                common = describe(options, layout, batch) | {"model": name}
                step, failure = attempt(prepare, make_step, config, layout, device, name)
                totals, failure = (None, failure) if step is None else attempt(_profile, step, device)
                if totals is None:
                    yield common | {"failed": failure}
                    continue
                whole = sum(ms for _, ms, _ in totals)
                rest = totals[MOST:]
                totals[MOST:] = [("all others", sum(ms for _, ms, _ in rest), sum(n for *_, n in rest))] if rest else []
                for kernel, ms, calls in totals:
                    yield common | {"kernel": kernel[:120], "ms": ms, "share": ms / whole, "calls": calls}


def _profile(step, device: torch.device) -> list[tuple[str, float, float]]:
    """(kernel, milliseconds a step, calls a step), the longest first."""
    gpu = device.type == "cuda"
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    totals = [
        (
            event.key,
            (event.self_device_time_total if gpu else event.self_cpu_time_total) / STEPS / 1e3,
            event.count / STEPS,
        )
        for event in trace.key_averages()
        if event.device_type == kind
    ]
    return sorted(totals, key=lambda total: -total[1])

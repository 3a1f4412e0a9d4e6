"""Taking turns with a clock: what the subcommands of ``benchmark.py`` share."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]


def interleave(
    contestants: dict[str, Callable[[], object]], options: argparse.Namespace, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds of every round of every contestant, after two rounds of warm-up.

    On a GPU its own clock counts, and what flushes the L2 cache runs for longer than Python needs to send the work.
    """
    clock, gpu = CLOCKS[options.clock], options.device == "cuda"
    flush = torch.empty(2**28, dtype=torch.int8, device=options.device) if gpu else None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-2, options.rounds):
        for name, run in contestants.items():
            if gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(8):
                    flush.zero_()
                start.record()
                run()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                begin = clock()
                for _ in range(repeats):
                    run()
                seconds = (clock() - begin) / repeats
            if turn >= 0:
                times[name].append(seconds)
    return times


def spread(seconds: list[float]) -> Row:
    """Milliseconds: median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": middle * 1e3, "ms_q1": low * 1e3, "ms_q3": high * 1e3}


def ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of times / others."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def failure_of(run: Callable[[], object]) -> str | None:
    """Why a contestant cannot run: the error's first line; None where it can."""
    try:
        run()
    except RuntimeError as error:  # out of memory, not implemented, and compilers' errors are all RuntimeErrors
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None

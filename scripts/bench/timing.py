"""Interleaved timing, with errors as results: shared by the subcommands of ``benchmark.py``."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]
T = TypeVar("T")


class WrongResult(Exception):
    """A contestant runs, but its result is wrong."""


def interleave(
    contestants: dict[str, Callable[[], object]], options: argparse.Namespace, repeats: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time the contestants in turn, ``options.rounds`` times after two warm-up rounds.

    On a GPU the time is between two CUDA events. The writes before them clear the L2 cache, and run longer than Python
    needs to enqueue the work.

    Returns:
        Contestant -> seconds of every round, and contestant -> error, of each that failed in a round.
    """
    clock, gpu = CLOCKS[options.clock], options.device == "cuda"
    flush = torch.empty(2**28, dtype=torch.int8, device=options.device) if gpu else None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for turn in range(-2, options.rounds):
        for name in list(times):
            seconds, error = attempt(_time, contestants[name], clock, repeats, flush)
            if seconds is None:
                del times[name]
                failed[name] = error
            elif turn >= 0:
                times[name].append(seconds)
    return times, failed


def compare(
    names: list[str], prepare: Callable[[str], Callable[[], object]], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """``interleave`` what ``prepare`` builds and checks for each name; an error of ``prepare`` is a failure too."""
    prepared = {name: attempt(prepare, name) for name in names}
    failed = {name: error for name, (run, error) in prepared.items() if run is None}
    times, failed_in_rounds = interleave({name: run for name, (run, _) in prepared.items() if run}, options)
    return times, failed | failed_in_rounds


def _time(run: Callable[[], object], clock: Callable[[], float], repeats: int, flush: torch.Tensor | None) -> float:
    if flush is None:
        begin = clock()
        for _ in range(repeats):
            run()
        return (clock() - begin) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(8):
        flush.zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(seconds: list[float]) -> Row:
    """Milliseconds: median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": middle * 1e3, "ms_q1": low * 1e3, "ms_q3": high * 1e3}


def ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of ``times / others``."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def attempt(function: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """Call a function: (its result, None), or (None, the error in one line)."""
    try:
        return function(*arguments), None
    except Exception as error:  # out of memory, a compiler's error, a wrong result: each is a result of the benchmark
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0][:200]}"

"""Interleaved timing and rows of measurements: shared by the subcommands of ``benchmark.py``."""

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


class WrongResult(Exception):
    """A contestant runs, but does not compute what it must."""


def interleave(
    contestants: dict[str, Callable[[], object]], options: argparse.Namespace, repeats: int = 1
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time the contestants in turn, ``options.rounds`` times after two warm-up rounds.

    On a GPU the time is between two events in its stream; the writes that clear the L2 cache before it run for longer
    than Python needs to enqueue the work.

    Returns:
        The seconds of every round of each contestant, and the error of each that failed in one.
    """
    clock, gpu = CLOCKS[options.clock], options.device == "cuda"
    flush = torch.empty(2**28, dtype=torch.int8, device=options.device) if gpu else None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for turn in range(-2, options.rounds):
        for name in list(times):
            try:
                seconds = _time(contestants[name], clock, repeats, flush)
            except Exception as error:
                del times[name]
                failed[name] = _describe(error)
                continue
            if turn >= 0:
                times[name].append(seconds)
    return times, failed


def compare(
    names: list[str], prepare: Callable[[str], Callable[[], object]], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As ``interleave``, of what ``prepare`` builds and checks for each name; its errors count as failures."""
    runs: dict[str, Callable[[], object]] = {}
    failed = {}
    for name in names:
        failure = failure_of(lambda name=name: runs.update({name: prepare(name)}))
        if failure is not None:
            failed[name] = failure
    times, failed_later = interleave(runs, options)
    return times, failed | failed_later


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
    """Median over the rounds of times / others."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def failure_of(run: Callable[[], object]) -> str | None:
    """The error of a contestant that cannot run, in one line; None where it can."""
    try:
        run()
    except Exception as error:  # out of memory, a compiler's error, a wrong result: all of them are this row's outcome
        return _describe(error)
    return None


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

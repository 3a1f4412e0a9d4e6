"""The stages of ``benchmark_gpu.py``: parts, each a command with a time-out and a reader of the rows it leaves."""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.contestants import FLOOR, PREVIOUS
from bench.timing import Row

ROOT = Path(__file__).parents[2]
IMAGENET = ROOT / "configs" / "imagenet"
CIFAR = ROOT / "configs" / "cifar10"
PAPER_NETWORKS = ("resnet50", "lip_resnet50", "resnet101", "lip_resnet101", "densenet121", "lip_densenet121")
STEPS = {False: 60, True: 4}
"""Training steps of ``train.py`` on synthetic data, by ``--quick``."""


class Part(NamedTuple):
    """One process of a stage."""

    name: str
    command: list[str] | None
    """None: what it needs is not on this machine, and ``missing`` says what."""
    seconds: float
    """Time-out."""
    read: Callable[[], list[Row]] = list
    """The rows so far; called again and again while the process runs."""
    missing: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012 (read only)


def right(options: argparse.Namespace, folder: Path) -> list[Part]:
    """Is it right: the tests on the device, memcheck of a small run, and ``train.py``."""
    tests, report = "tests/gpu" if options.device == "cuda" else "tests/test_device_checks.py", folder / "tests.xml"
    pytest = [sys.executable, "-m", "pytest", tests, "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout"):
        pytest += ["--timeout", "150"]
    if importlib.util.find_spec("xdist") and options.device == "cuda":  # kernels compile side by side
        pytest += ["-n", str(min(8, _cores())), "--dist", "loadgroup"]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    tiny = ["--sites", "1024x14", "--batch", "1", "--rounds", "2", "--contestants", "lip2d"]
    memcheck = _benchmark("memcheck", "op", *tiny, options=options, folder=folder, seconds=60)
    if sanitizer is None or options.device == "cpu":
        checked = Part("memcheck", None, 0, missing="not available: compute-sanitizer")
    else:
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *(memcheck.command or [])]
        checked = memcheck._replace(command=command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return [
        Part("tests", [*pytest, f"--junitxml={report}"], 270, functools.partial(_tests, report)),
        checked,
        *(_synthetic(name, options, folder, 60) for name in ("lip_resnet50", "resnet50")),
    ]


def fast(options: argparse.Namespace, folder: Path) -> list[Part]:
    """How fast: the operator, training steps, memory, inference, kernels, and ``train.py`` itself."""
    gpu, quick = options.device == "cuda", options.quick
    previous = [f"lip_resnet50, {PREVIOUS}"] if gpu else []
    half = ["--precision", "bfloat16"]
    trained = ["resnet50", "lip_resnet50", FLOOR]
    sizes = ["--batch", "2", "--size", "64"] if quick else []
    rounds = ["--rounds", "2"] if quick else []
    sites = ["--sites", "1024x14", "--batch", "1", *rounds] if quick else []
    measure = functools.partial(_benchmark, options=options, folder=folder)
    forms = ["lip2d", *([PREVIOUS] if gpu else []), "textbook", "avg_pool2d"]
    one_site = sites or ["--sites", "64x112"]  # torch.compile compiles for every site anew
    inference = sizes or ["--batch", "32"]
    parts = [
        measure("op", "op", "--contestants", *forms, *half, *sites, seconds=65),
        measure("train", "train", "--contestants", *trained, *previous, *half, *sizes, *rounds, seconds=105),
        measure("train compiled", "train", "--compile", "--contestants", *trained, *half, *sizes, *rounds, seconds=125),
        _synthetic("lip_resnet50", options, folder, 45),
        measure("memory", "memory", "--contestants", *trained[:2], *half, *sizes, seconds=40),
        measure("inference", "model", "--contestants", *PAPER_NETWORKS, *inference, *rounds, seconds=40),
        measure("kernels", "kernels", "--contestants", "lip_resnet50", *half, *sizes, seconds=30),
        measure(
            "op compiled", "op", "--contestants", "textbook", "textbook, torch.compile", *half, *one_site, seconds=30
        ),
    ]
    # On a CPU compiling alone takes minutes.
    return [part for part in parts if not (quick and part.name == "train compiled")]


def real(options: argparse.Namespace, folder: Path) -> list[Part]:
    """LIP-ResNet-18 and ResNet-18 on real images, by ``train.py`` and ``eval.py``, seed by seed."""
    data, parts = options.data.resolve(), []
    limit = 460 / (2 * options.seeds)
    changes = [
        f"data.root={data}",
        f"train.epochs={options.epochs}",
        "data.batch_size=256",
        f"data.workers={_workers()}",
    ]
    if not (data / "cifar-10-batches-py").is_dir():
        classes = sum(path.is_dir() for path in (data / "train").iterdir())
        side = [f"data.{key}={options.size}" for key in ("size", "eval_size", "eval_resize")]
        changes += ["data.name=folder", f"model.num_classes={classes}", *side]
    if options.quick:
        changes += ["data.batch_size=16", "train.max_steps=4", "train.log_every=2"]
    for seed in range(options.seeds):
        for name in ("lip_resnet18", "resnet18"):
            run = folder / f"{name}-{seed}"
            row = {"model": name, "seed": seed}
            train = _train(CIFAR / f"{name}.yaml", run, [*changes, f"train.seed={seed}"])
            parts.append(Part(f"train {run.name}", train, limit - 20, functools.partial(_log, run, row)))
            evaluate = [
                sys.executable,
                "eval.py",
                "--checkpoint",
                str(run),
                "--output",
                str(folder / f"{run.name}.json"),
            ]
            parts.append(Part(f"eval {run.name}", evaluate, 20, functools.partial(_evaluation, folder, run.name, row)))
    return parts


STAGES = {"right": right, "fast": fast, "real": real}


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers() -> int:
    """Loader processes: all cores but the training process's."""
    return max(1, min(_cores() - 1, 12))


def _benchmark(name: str, what: str, *words: str, options: argparse.Namespace, folder: Path, seconds: float) -> Part:
    output = folder / f"{name.replace(' ', '_')}.jsonl"
    command = [
        sys.executable,
        "scripts/benchmark.py",
        what,
        "--device",
        options.device,
        "--output",
        str(output),
        *words,
    ]
    return Part(name, command, seconds, functools.partial(_lines, output))


def _train(recipe: Path, run: Path, changes: list[str]) -> list[str]:
    return [
        sys.executable,
        "train.py",
        "--config",
        str(recipe),
        "--output",
        str(run),
        "train.precision=bfloat16",
        *changes,
    ]


def _synthetic(name: str, options: argparse.Namespace, folder: Path, seconds: float) -> Part:
    """``train.py`` on noise that costs nothing to load: its images/s beside those of the bare step."""
    steps, batch = STEPS[options.quick], 2 if options.quick else 256
    changes = [
        "data.name=synthetic",
        f"data.batch_size={batch}",
        f"data.images={steps * batch}",
        "data.last_batch=drop",
    ]
    changes += [f"train.max_steps={steps}", f"train.log_every={steps // 4}", f"data.workers={_workers()}"]
    changes += ["data.size=64", "data.eval_size=64", "data.eval_resize=64"] if options.quick else []
    run = folder / f"synthetic-{name}"
    command = _train(IMAGENET / f"{name}_step90.yaml", run, changes)
    return Part(f"train.py {name}", command, seconds, functools.partial(_log, run, {"model": name}))


def _lines(path: Path) -> list[Row]:
    """The complete rows of a file of ``benchmark.py``, without its environment."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines[1:] if line.endswith("\n")]


def _log(run: Path, common: Row) -> list[Row]:
    """The numbers that ``train.py`` has logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [common | json.loads(line) for line in lines if line.endswith("\n")]


def _evaluation(folder: Path, name: str, common: Row) -> list[Row]:
    """The counts of ``eval.py``'s row."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    row = json.loads(path.read_text(encoding="utf-8"))
    return [common | {key: row[key] for key in ("images", "top1", "top5", "loss")}]


def _tests(report: Path) -> list[Row]:
    """One row for each test that failed or was skipped, and one with the counts."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):  # not there yet, or being written
        return []
    rows: list[Row] = []
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            if (problem := case.find(kind)) is not None:
                message = problem.get("message", "").strip().splitlines() or [""]
                rows.append({"test": case.get("name"), "outcome": kind, "message": message[0][:200]})
    seconds = sum(float(case.get("time", 0)) for case in cases)
    return [*rows, {"tests": len(cases), "passed": len(cases) - len(rows), "test_seconds": round(seconds, 1)}]

"""What to run on a new GPU: three stages of at most 8 minutes each on an H100.

    python scripts/benchmark_gpu.py right --output right.jsonl    is it right: tests on the GPU, memcheck, train.py
    python scripts/benchmark_gpu.py fast  --output fast.jsonl     how fast: operator, training steps, memory, inference
    python scripts/benchmark_gpu.py real  --output real.jsonl --data DIR
        LIP-ResNet-18 and ResNet-18 on real images with several seeds, by train.py and eval.py

DIR holds train/ and val/ with class folders, or CIFAR-10 as torchvision stores it (cifar-10-batches-py/). Nothing is
downloaded. Every part of a stage is a process with a time-out of its own; a part that fails is a row marked failed, and
the others go on. The rows, one JSON line each, are appended to the output as they are measured; it is the only file.
At the end a table shows what a model predicts and what is aimed at beside what was measured.

    python scripts/benchmark_gpu.py fast --output fast.jsonl --device cpu --quick    try a stage where there is no GPU
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import quantities, tables
from bench.stages import ROOT, STAGES, Part
from bench.timing import Row

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.environment import describe_environment
from lip_resnet.evaluation.render import render


def parse() -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        InputError: it is not understood, or something that it names is missing.
    """
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.jsonl", help="append every row to this new file"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny images, batches and runs: only to try the stage")
    parser.add_argument("--data", type=Path, metavar="DIR", help="for real: the images")
    parser.add_argument("--size", type=int, default=64, help="for real: side of the images of a folder (default: 64)")
    parser.add_argument("--seeds", type=int, default=3, help="for real: runs of each network (default: 3)")
    parser.add_argument("--epochs", type=int, default=10, help="for real (default: 10)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU; --device cpu --quick tries the stage without one")
    if options.device == "cpu" and not options.quick:
        raise InputError("--device cpu is only for trying a stage: add --quick, or use scripts/benchmark.py")
    if options.stage == "real" and not _has_images(options.data):
        raise InputError(
            f"--data {options.data}; real needs a folder with train/ and val/, or with cifar-10-batches-py/"
        )
    for name, least in (("seeds", 1), ("epochs", 2), ("size", 32)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} {getattr(options, name)}; it must be at least {least}")
    if options.output.suffix != ".jsonl" or options.output.exists() or not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}; it must be a new file in an existing folder, and end in .jsonl")
    return options


def _has_images(data: Path | None) -> bool:
    if data is None:
        return False
    return (data / "cifar-10-batches-py").is_dir() or all((data / split).is_dir() for split in ("train", "val"))


def run_part(part: Part, folder: Path, write: Callable[[Row], None]) -> None:
    """Run a part to its end or its time-out, and write its rows as they come, then one with its seconds."""
    if part.command is None:
        write({"part": part.name, "failed": part.missing})
        return
    written, start = 0, time.monotonic()
    log = folder / f"{part.name.replace(' ', '_')}.log"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.environment}
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while True:
                running = process.poll() is None
                for row in part.read()[written:]:
                    write({"part": part.name, **row})
                    written += 1
                if not running or time.monotonic() - start > part.seconds:
                    break
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
    end: Row = {"part": part.name, "seconds": round(time.monotonic() - start, 1)}
    if running:
        end["failed"] = f"not done after {part.seconds:.0f} seconds"
    elif process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        end["failed"] = f"exit code {process.returncode}: {lines[-1][:200]}"
    write(end)


def report(stage: str, hardware: str, rows: list[Row]) -> str:
    """Tables of a stage: its parts, then the quantities of ``fast`` or the accuracies of ``real``."""
    parts = [[row["part"], str(row.get("seconds", "-")), row.get("failed", "done")] for row in rows if _ends_part(row)]
    texts = [render(["part", "seconds", "result"], parts)]
    failures = [row for row in rows if "failed" in row and not _ends_part(row)]
    texts += [f"failed: {json.dumps(row)}" for row in failures]
    texts += [f"{row['outcome']}: {row['test']}: {row['message']}" for row in rows if "outcome" in row]
    if stage == "fast":
        gpu, (method, predicted) = quantities.gpu_of(hardware), quantities.predictions()
        lines = []
        for quantity in quantities.QUANTITIES:
            values = predicted.get((gpu or "H100", quantity.name)), quantity.measure(rows)
            lines.append([quantity.name, tables.show(values[0]), quantity.target, tables.show(values[1])])
        header = ["quantity", f"predicted, {gpu or 'H100'}", "target", f"measured, {hardware}"]
        texts += [render(header, lines), f"Predicted: {method}"]
    if stage == "real":
        texts += [accuracies(rows)]
    return "\n".join(texts)


def accuracies(rows: list[Row]) -> str:
    """Top-1 by seed and network, their means, and the mean of LIP's lead over the seeds that both have."""
    top1: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["part"].startswith("eval") and "top1" in row:
            top1.setdefault(row["model"], {})[row["seed"]] = row["top1"]
    lines = [
        [name, " ".join(f"{value:.2f}" for value in values.values()), f"{statistics.fmean(values.values()):.2f}"]
        for name, values in top1.items()
    ]
    lip, base = (top1.get(name, {}) for name in ("lip_resnet18", "resnet18"))
    leads = [lip[seed] - base[seed] for seed in lip if seed in base]
    if leads:
        lines.append(["lead", " ".join(f"{lead:+.2f}" for lead in leads), f"{statistics.fmean(leads):+.2f}"])
    return render(["network", "top-1 of each seed (%)", "mean"], lines)


def _ends_part(row: Row) -> bool:
    return row.keys() <= {"part", "seconds", "failed"}


def main() -> None:
    options = parse()
    environment = describe_environment(options.device) | {"stage": options.stage, "quick": options.quick}
    environment["command"] = ["python", "scripts/benchmark_gpu.py", options.stage]  # no paths of this machine
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary, open(options.output, "x", encoding="utf-8") as file:

        def write(row: Row) -> None:
            rows.append(tables.shorten(row))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()

        write({"environment": environment})
        for part in STAGES[options.stage](options, Path(temporary)):
            patience = 10 if options.device == "cpu" else 1  # the time-outs are a GPU's
            run_part(part._replace(seconds=patience * part.seconds), Path(temporary), write)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(report(options.stage, environment["hardware"], rows[1:]), end="")


if __name__ == "__main__":
    cli.launch(main)

"""What data parallel training costs:  python scripts/scaling.py --model lip_resnet50 --step-ms 133 --batch 256

A step's time on n GPUs from its time on one, the network's gradient bytes and the links between the GPUs; with
--measure, under torchrun, the same prediction beside what this machine really does. docs/scaling.md explains the model.
"""

import argparse
import functools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddp_measure
import numpy as np
import torch
from ddp_model import Cluster, Traffic, smallest_batch, step, traffic
from torch import nn

from lip_resnet import checkpoint, distributed, models
from lip_resnet.config import InputError

FOLDER = Path(__file__).parents[1] / "benchmarks"
IMAGES = 1_281_167
ARCHIVE_BYTES = 147_897_477_120
"""Of ImageNet's training archive: 115 KB an image."""
# The tables of docs/scaling.md. The times are assumptions: 2,500 images/s for ResNet-50, the others by multiply-adds.
DOCUMENTED = [
    *("--model", "resnet50", "lip_resnet50", "resnet101", "lip_resnet101"),
    *("--step-ms", "102", "133", "195", "226", "--batch", "256", "--gpus", "8", "16", "64", "256"),
    *("--compression", "float32", "bfloat16"),
]
DOCUMENTED_PARTS = [
    *("--model", "lip_resnet50", "--step-ms", "133", "--batch", "256", "--gpus", "16", "64", "256"),
    *("--bandwidth", "1.25", "--accumulate", "1", "2", "4", "16"),
]
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def table(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown, numbers to the right."""
    cells = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *lines)]
    return [cells[0], "|---|" + "--:|" * (len(header) - 1), *cells[1:]]


def build(name: str) -> nn.Module:
    """A network that is never computed."""
    with torch.device("meta"):
        return models.create_model(name)


@functools.cache
def sent(name: str) -> Traffic:
    """What a network sends, counted once."""
    return traffic(build(name))


def measured_step(path: Path, name: str) -> tuple[float, int] | None:
    """(milliseconds, images) of a network's training step in a file of ``benchmark.py train``; None: no such row.

    Raises:
        InputError: no such file, or another kind of file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return next(((row["ms"], row["batch"]) for row in rows if row["model"] == name and "ms" in row), None)
    except OSError as error:
        raise InputError(f"--step-from {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--step-from {path}: not a file that benchmark.py train wrote") from None


def network_table(names: Sequence[str]) -> list[str]:
    """What each network sends and keeps."""
    header = ["network", "parameters (M)", "gradients (MB)", "buckets (MB)", "ready at (% of backward)"]
    header += ["weights + gradients + momentum (GB)", "with LAMB and EMA (GB)"]
    lines = []
    for name in names:
        load, count = sent(name), models.count_parameters(build(name))
        sizes = ", ".join(f"{bucket.bytes / 1e6:.1f}" for bucket in load.buckets)
        ready = ", ".join(f"{bucket.ready:.0%}".rstrip("%") for bucket in load.buckets)
        memory = [f"{count * 4 * tensors / 1e9:.2f}" for tensors in (3, 5)]
        lines.append([name, f"{count / 1e6:.2f}", f"{load.gradients / 1e6:.1f}", sizes, ready, *memory])
    return table(header, lines)


@dataclass(frozen=True)
class Case:
    """One network with its time on one GPU."""

    name: str
    milliseconds: float
    batch: int
    source: str


def step_table(cases: Sequence[Case], options: argparse.Namespace) -> list[str]:
    """A line for a network, link and way of sending; a column for each number of GPUs."""
    header = ["network", "one GPU alone", "GB/s between nodes", "sent as", "parts"]
    header += [f"{gpus} GPUs" for gpus in options.gpus]
    lines = []
    for case in cases:
        load = sent(case.name)
        for bandwidth in options.bandwidth:
            for dtype in options.compression:
                for parts in options.accumulate:
                    cells = []
                    for gpus in options.gpus:
                        how = {"accumulate": parts, "shrink": _BYTES[dtype] / 4, "backward": options.backward}
                        found = step(load, case.milliseconds / 1e3, cluster(options, bandwidth), gpus, **how)
                        rate = gpus * parts * case.batch / found.total
                        cells.append(f"+{found.exposed * 1e3:.1f} ms, {found.efficiency:.1%}, {rate / 1e3:.1f}k/s")
                    alone = f"{parts * case.milliseconds:g} ms ({case.source}, batch {case.batch})"
                    lines.append([case.name, alone, f"{bandwidth:g}", dtype, parts, *cells])
    return table(header, lines)


def cluster(options: argparse.Namespace, bandwidth: float) -> Cluster:
    """The GPUs that the options describe, with ``bandwidth`` GB/s between nodes."""
    return Cluster(options.node, options.inside * 1e9, bandwidth * 1e9)


def limit_table(cases: Sequence[Case], options: argparse.Namespace) -> list[str]:
    """Where communication begins to rule: the smallest batch a GPU at 90% efficiency."""
    header = ["network", "gradients as", *(f"{bandwidth:g} GB/s" for bandwidth in options.bandwidth)]
    lines = []
    for case in cases:
        load, seconds = sent(case.name), case.milliseconds / 1e3 / case.batch
        for dtype, shrink in (("float32", 1.0), ("bfloat16", 0.5)):
            batches = [
                smallest_batch(
                    load, seconds, cluster(options, bandwidth), max(options.gpus), 0.9,
                    shrink=shrink, backward=options.backward,
                )
                for bandwidth in options.bandwidth
            ]  # fmt: skip
            lines.append([f"{case.name} ({case.source})", dtype, *batches])
    return table(header, lines)


def data_table(cases: Sequence[Case], options: argparse.Namespace) -> list[str]:
    """What a node must load: cores by the loader's measured speed, bytes by ImageNet's mean file."""
    record = (FOLDER.parent / "results" / "data_cpu.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in record.splitlines()]
    speed = {row["loader"]: row["per_core"] for row in rows if "loader" in row}
    decoders = {decode: speed[f"ours, decode: {decode}"] for decode in ("fast", "exact")}
    header = ["network", "images/s a node", *(f"cores, `{decode}`" for decode in decoders)]
    header += ["GB/s read", "Gbit/s", "workers a process, `fast`"]
    lines = []
    for case in cases:
        rate = options.node * case.batch / case.milliseconds * 1e3
        cores = [math.ceil(rate / per_core) for per_core in decoders.values()]
        size = rate * ARCHIVE_BYTES / IMAGES
        workers = math.ceil(cores[0] / options.node)
        lines.append(
            [
                f"{case.name} ({case.source})",
                f"{rate:,.0f}",
                *cores,
                f"{size / 1e9:.2f}",
                f"{size * 8 / 1e9:.1f}",
                workers,
            ]
        )
    return table(header, lines)


def rates_table() -> list[str]:
    """Learning rates and warm-up by batch; sources in docs/scaling.md."""
    header = ["batch", "steps an epoch", "steps in 90", "SGD", "warm-up (epochs)"]
    header += ["LARS", "warm-up (epochs)", "LAMB", "warm-up (epochs)"]
    lars = {8192: ("10", "5"), 16384: ("25", "5"), 32768: ("29", "18")}
    lines = []
    for batch in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768):
        sgd = (f"{0.1 * batch / 256:g}", "5" if batch > 256 else "0") if batch <= 8192 else ("-", "-")
        lamb = (f"{0.04 * math.sqrt(batch / 32768):.4f}", f"{20 * batch / 32768:.3g}")
        steps = IMAGES // batch
        lines.append([f"{batch:,}", f"{steps:,}", f"{90 * steps:,}", *sgd, *lars.get(batch, ("-", "-")), *lamb])
    return table(header, lines)


def measured(found: dict[str, Any]) -> str:
    """--measure's figures: predicted and observed, with the machine."""
    seconds = {name: np.array(values) * 1e3 for name, values in found["seconds"].items()}
    seconds["added"] = seconds["together"] - seconds["alone"]  # round by round: what else the machine did cancels

    def line(what: str, predicted: float | None, name: str) -> list[str]:
        low, middle, high = np.percentile(seconds[name], (25, 50, 75))
        ratio = "-" if predicted is None else f"{middle / (predicted * 1e3):.2f}"
        given = "-" if predicted is None else f"{predicted * 1e3:.1f}"
        return [what, given, f"{middle:.1f}", f"{low:.1f} to {high:.1f}", ratio]

    foreseen = found["predicted"]
    header = ["what", "predicted (ms)", "observed (ms)", "quartiles", "observed / predicted"]
    lines = [
        line("step without its sums (`no_sync`)", None, "alone"),
        line("all buckets summed, nothing else running", foreseen["buckets"], "buckets"),
        line("step under DDP, sums beside the backward pass", foreseen["together"], "together"),
        line("step under DDP, sums after it", foreseen["together_without_overlap"], "together"),
        line("what DDP adds, sums beside", foreseen["together"] - foreseen["alone"], "added"),
        line("what DDP adds, sums after", foreseen["together_without_overlap"] - foreseen["alone"], "added"),
    ]
    facts = found["environment"]
    told = (
        f"{found['model']}, {found['gradient_bytes'] / 1e6:.1f} MB of gradients, batch {found['batch']} a process, "
        f"{found['size']} pixels, {found['precision']}; {found['processes']} processes. Fitted to sums of 4 KiB and "
        f"32 MiB: {found['bandwidth'] / 1e9:.2f} GB/s, {found['latency'] * 1e6:.0f} us a hop; backward pass: "
        f"{found['backward_share']:.0%} of the step. {facts['hardware']}, torch {facts['torch']}, {found['rounds']} "
        f"rounds, load {found['load']:.1f} before the run, {facts['date'][:10]}; `{facts['command']}`"
    )
    return "\n".join([*table(header, lines), "", told])


def command(options: argparse.Namespace) -> str:
    """How to measure this again."""
    words = [f"torchrun --standalone --nproc_per_node={distributed.world_size()} scripts/scaling.py --measure"]
    words += [f"--model {options.model[0]}"]
    words += [f"--{key} {getattr(options, key)}" for key in ("batch", "size", "precision", "rounds")]
    return " ".join(words) + " --output FILE"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--model", nargs="+", default=["lip_resnet50"], help="timm names, LIP's among them")
    found.add_argument("--step-ms", nargs="+", type=float, help="a step on one GPU, one number for each model")
    found.add_argument("--batch", type=int, default=256, help="images a GPU (and part) in such a step")
    found.add_argument("--step-from", type=Path, help="a file of benchmark.py train: its steps in place of --step-ms")
    found.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 16, 64, 256])
    found.add_argument("--node", type=int, default=8, help="GPUs in a node (default: 8)")
    found.add_argument("--inside", type=float, default=200, help="GB/s of a GPU inside its node (default: 200)")
    found.add_argument("--bandwidth", nargs="+", type=float, default=[1.25, 12.5, 50], help="GB/s between nodes")
    found.add_argument("--compression", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    found.add_argument("--accumulate", nargs="+", type=int, default=[1], help="parts of a step")
    found.add_argument("--backward", type=float, default=2 / 3, help="the backward pass's share of a step")
    found.add_argument("--measure", action="store_true", help="under torchrun: measure, and compare with the model")
    found.add_argument("--size", type=int, default=64, help="of --measure's images (default: 64)")
    found.add_argument("--precision", default="float32", choices=list(_BYTES), help="of --measure (default: float32)")
    found.add_argument("--rounds", type=int, default=9, help="of --measure (default: 9)")
    found.add_argument("--output", type=Path, help="write the tables (--measure: the figures, as JSON); must not exist")
    return found


def check(options: argparse.Namespace) -> None:
    """Refuse what makes no sense, one line each."""
    for key in ("step_ms", "gpus", "bandwidth", "accumulate", "batch", "node", "inside", "size", "rounds"):
        given = getattr(options, key)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if any(not (value > 0 and math.isfinite(value)) for value in values):
            raise InputError(f"--{key.replace('_', '-')} {' '.join(map(str, values))}: each must be above 0 and finite")
    if not 0 < options.backward < 1:
        raise InputError(f"--backward {options.backward:g}: a share of the step, above 0 and below 1")
    split = [gpus for gpus in options.gpus if gpus > options.node and gpus % options.node]
    if split:
        raise InputError(f"--gpus {split[0]}: more than a node's, so a multiple of --node {options.node}")
    if options.output is not None and options.output.exists():
        raise InputError(f"--output {options.output} exists; choose another")
    if options.measure and len(options.model) > 1:
        raise InputError(f"--measure takes one model; --model has {len(options.model)}")
    if not options.measure and options.step_ms is None and options.step_from is None:
        raise InputError("give --step-ms or --step-from FILE: what one GPU needs for a step is not guessed")
    if options.step_ms is not None and len(options.step_ms) != len(options.model):
        raise InputError(f"--step-ms has {len(options.step_ms)} numbers for {len(options.model)} models")


def find_cases(options: argparse.Namespace) -> list[Case]:
    """Each network's time: measured where ``--step-from`` has it, else as ``--step-ms`` says."""
    cases = []
    for position, name in enumerate(options.model):
        row = None if options.step_from is None else measured_step(options.step_from, name)
        if row is not None:
            cases.append(Case(name, *row, "measured"))
        elif options.step_ms is not None:
            cases.append(Case(name, options.step_ms[position], options.batch, "assumed"))
        else:
            raise InputError(f"--step-from {options.step_from}: no measured row of {name}; give --step-ms for it")
    return cases


def tables(options: argparse.Namespace) -> dict[str, str]:
    """Name -> Markdown of everything that the options ask for."""
    cases = find_cases(options)
    found = {
        "networks": network_table(options.model),
        "steps": step_table(cases, options),
        "limits": limit_table(cases, options),
        "data": data_table(cases, options),
        "rates": rates_table(),
    }
    return {name: "\n".join(lines) for name, lines in found.items()}


def sections() -> dict[str, Callable[[], str]]:
    """The generated parts of docs/scaling.md; steps come from benchmarks/train_gpu.json once that exists."""
    gpu, record = FOLDER / "train_gpu.json", FOLDER / "scaling_cpu.json"
    measured_steps = ["--step-from", str(gpu)] if gpu.is_file() else []

    def made(arguments: list[str]) -> dict[str, str]:
        return tables(parser().parse_args([*arguments, *measured_steps]))

    main_tables = functools.cache(lambda: made(DOCUMENTED))
    names = ("networks", "steps", "limits", "data", "rates")
    found = {f"scaling-{name}": lambda name=name: main_tables()[name] for name in names}
    found["scaling-parts"] = lambda: made(DOCUMENTED_PARTS)["steps"]
    for name, arguments in (("command", DOCUMENTED), ("parts-command", DOCUMENTED_PARTS)):
        found[f"scaling-{name}"] = lambda arguments=arguments: f"    python scripts/scaling.py {shlex.join(arguments)}"
    found["scaling-measured"] = lambda: measured(json.loads(record.read_text(encoding="utf-8")))
    return found


def main() -> None:
    options = parser().parse_args()
    check(options)
    if options.measure:
        found = ddp_measure.measure(options.model[0], options.batch, options.size, options.precision, options.rounds)
        found["environment"]["command"] = command(options)
        text = json.dumps(found, indent=1) + "\n"
        if distributed.is_main():
            print(measured(found))
    else:
        text = "\n\n".join(tables(options).values()) + "\n"
        print(text, end="")
    if options.output is not None and distributed.is_main():
        checkpoint.write_atomically(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    distributed.launch(main)

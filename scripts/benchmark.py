"""Measure speed and memory of LIP and its baselines.

    python scripts/benchmark.py op      lip2d at every site of LIP-ResNet-50, forward and forward + backward
    python scripts/benchmark.py model   inference: images per second, latency percentiles
    python scripts/benchmark.py train   training steps: images per second
    python scripts/benchmark.py step    the cost of the parts and options of a training step
    python scripts/benchmark.py kernels the kernels of a training step that take most of its time
    python scripts/benchmark.py memory  a training step: bytes kept for the backward pass; on a GPU the peak as well
    python scripts/benchmark.py data    loaders: images per second of ours, timm's and torchvision's

    python scripts/benchmark.py op --batch 8 --sites 64x112 128x56 --layout contiguous channels_last
    python scripts/benchmark.py train --precision bfloat16 --compile --contestants resnet50 lip_resnet50
    python scripts/benchmark.py COMMAND --help

Every result is checked before it is timed. After a warm-up all contestants run in turn in each round, so that other
load on the machine affects them equally; a ratio is the median of the rounds' ratios. A training step is the engine's,
built as in train.py. Each row is appended to the output, as a JSON line, as soon as it is measured; at the end all rows
are printed as Markdown. A contestant that fails, or whose result is wrong, is a row marked failed.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench import data, kernels, network, op, step, tables
from bench.contestants import DEFAULT_NETWORKS, FORMS, GPU_ONLY, NETWORKS, SITES
from bench.timing import CLOCKS, LAYOUTS, Row

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.environment import describe_environment
from lip_resnet.files import to_json
from lip_resnet.ops import dispatch

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
CONTESTANTS = {
    **{"op": FORMS, "model": NETWORKS, "train": NETWORKS, "memory": NETWORKS, "kernels": NETWORKS},
    "step": step.PARTS | step.VARIANTS | step.GPU_VARIANTS,
}
ROWS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "op": op.op_rows,
    "model": network.network_rows,
    "train": network.network_rows,
    "step": step.step_rows,
    "kernels": kernels.kernel_rows,
    "memory": network.memory_rows,
    "data": data.data_rows,
}


def parse() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        InputError: it is not understood.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="|".join(ROWS))
    gpu = torch.cuda.is_available()
    for what in ROWS:
        add = commands.add_parser(what).add_argument
        add("--output", type=Path, metavar="FILE.jsonl", help="append every row to this new file")
        add("--force", action="store_true", help="replace an existing file")
        if what not in ("memory", "kernels"):
            add("--rounds", type=int, default=51 if what == "model" and gpu else 9)
        if what == "data":
            add("--data", type=Path, help="a folder with images at any depth (default: generated photographs)")
            add("--workers", type=int, default=2, help="loader processes (default: 2; at most one per core)")
            add("--batch", type=int, default=64)
            add("--images", type=int, default=1024, help="images of a round (default: 1024; files are repeated)")
            add("--gpu", type=float, default=2500, help="images/s of the GPU to feed (default: 2500)")
            continue
        choices = list(CONTESTANTS[what])
        precisions = ("float32", "bfloat16", "float16") if what == "op" else ("float32", "tf32", "bfloat16", "float16")
        add("--contestants", nargs="+", choices=choices, metavar="NAME", help="default: all")
        add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
        add("--precision", choices=precisions, default="float32")
        add("--batch", type=int, nargs="+", help="default: 256 on a GPU, 8 on the CPU; model: 1, 32")
        add("--threads", type=int, help="of the CPU; default: PyTorch's")
        if what == "op":
            add("--sites", nargs="+", choices=SITES, default=list(SITES), metavar="SITE")
        else:
            add("--size", type=int, default=224, help="of the images, in pixels")
        if what != "step":
            add("--layout", nargs="+", choices=LAYOUTS, default=["channels_last"])
        if what not in ("memory", "kernels"):
            clock = "cpu: this process's CPU time, of all its threads, for a busy machine"
            add("--clock", choices=CLOCKS, default="wall", help=clock)
        if what in ("model", "train"):
            add("--compile", nargs="?", const="default", choices=COMPILE_MODES)
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Check the options and fill in defaults that depend on others.

    Raises:
        InputError: a value is out of range, the device is missing, or the output cannot be written.
    """
    if options.what == "data":
        options.device, options.precision, options.threads, batches = "cpu", "float32", 1, [options.batch]
    else:
        gpu = options.device == "cuda"
        if gpu and not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch sees no GPU")
        if options.batch is None:
            small = [1, 32] if gpu else [1]
            options.batch = (small if options.what == "model" else []) + [256 if gpu else 8]
        if options.contestants is None:
            names = DEFAULT_NETWORKS if CONTESTANTS[options.what] is NETWORKS else CONTESTANTS[options.what]
            excluded = set() if gpu else GPU_ONLY | step.GPU_VARIANTS.keys()
            options.contestants = [name for name in names if name not in excluded]
        batches = options.batch
    for name, value, least in (
        *(("batch", batch, 1) for batch in batches),
        ("threads", options.threads, 1),
        ("rounds", getattr(options, "rounds", None), 2),
        ("size", getattr(options, "size", None), 33),
        ("workers", getattr(options, "workers", None), 1),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} {value}; it must be at least {least}")
    path = options.output
    if path is not None:
        if path.suffix != ".jsonl":
            raise InputError(f"--output {path}; its name must end in .jsonl")
        if path.exists() and not options.force:
            raise InputError(f"{path} exists; choose another --output or add --force")
        if not path.parent.is_dir():
            raise InputError(f"--output {path}: no folder {path.parent}")


def main() -> None:
    options = parse()
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = options.precision == "tf32"
    words = sys.argv[1:]
    if options.what == "data":  # the folder of the images does not belong in a record
        words = ["DIR" if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]
    environment = describe_environment(options.device) | {
        "command": ["python", "scripts/benchmark.py", *words],
        "lip_kernels": os.environ.get("LIP_KERNELS", "auto"),
        "fused_kernel": dispatch.available(options.device),
        "load": round(os.getloadavg()[0], 2),
    }
    rows: list[Row] = []
    with open(options.output or os.devnull, "w", encoding="utf-8") as file:
        for row in itertools.chain([{"environment": environment}], ROWS[options.what](options)):
            rows.append(tables.shorten(row))
            file.write(to_json(rows[-1]) + "\n")
            file.flush()
    print(tables.markdown(rows[1:], environment), end="")


if __name__ == "__main__":
    cli.launch(main)

"""Speed and memory of LIP, side by side with what it is measured against.

    python scripts/benchmark.py op      lip2d at every site of LIP-ResNet-50, forward and forward + backward
    python scripts/benchmark.py model   inference: images per second, latency percentiles
    python scripts/benchmark.py train   training steps: images per second
    python scripts/benchmark.py memory  a training step: bytes kept for the backward pass; on a GPU the peak as well

    python scripts/benchmark.py op --batch 8 --sites 64x112 128x56 --layout contiguous channels_last
    python scripts/benchmark.py train --precision bfloat16 --compile --contestants resnet50 lip_resnet50
    python scripts/benchmark.py COMMAND --help

Every result is checked before it is timed. All contestants take turns within each round, after a warm-up, so that what
else the machine does meets them alike; a ratio is the median of the rounds' ratios. Rows are printed as Markdown. A
contestant that cannot run, or whose numbers are wrong, is a row that says so.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import performance
import torch
import torch.nn.functional as F
from contestants import FLOOR, FORMS, NETWORKS, SITES, TOLERANCES, WINDOW, build_networks, relative_error
from torch import Tensor, nn

from lip_resnet import checkpoint, distributed, kernels, runlog
from lip_resnet.config import InputError
from lip_resnet.kernels import plain

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
Row = dict[str, Any]


# ---- timing ----


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


# ---- subcommands: each yields rows ----


def copy_bandwidth(batch: int, options: argparse.Namespace) -> float:
    """Bytes per second, read and written, of copying the largest site's features."""
    x = torch.randn(batch, 64, 112, 112, device=options.device)
    to = torch.empty_like(x)
    return 2 * x.nbytes / statistics.median(interleave({"copy": lambda: to.copy_(x)}, options, 3)["copy"])


def op_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch, site, direction and form."""
    for batch in options.batch:
        bandwidth = copy_bandwidth(batch, options)
        for layout in options.layout:
            for site in options.sites:
                common = {"layout": layout, "precision": options.precision, "batch": batch, "site": site}
                yield from (common | row for row in site_rows(options, layout, batch, site, bandwidth))
                print(f"batch {batch}, {layout}, {site}: done", file=sys.stderr)


def site_rows(options: argparse.Namespace, layout: str, batch: int, site: str, bandwidth: float) -> Iterator[Row]:
    (channels, size), dtype = SITES[site], DTYPES[options.precision]

    def make(values: Tensor) -> Tensor:
        return values.to(options.device, dtype).to(memory_format=LAYOUTS[layout])

    x, logits = (make(t).requires_grad_() for t in (torch.randn(batch, channels, size, size),
                                                    12 * torch.rand(batch, channels, size, size)))  # fmt: skip
    truth = plain.stable(x.double(), logits.double(), WINDOW)
    dy = make(torch.randn(truth.shape))
    truths = (truth, *torch.autograd.grad(truth, (x, logits), dy.double()))

    def forward(form):
        with torch.no_grad():
            return form(x, logits)

    def both(form):
        y = form(x, logits)
        return y, *torch.autograd.grad(y, (x, logits), dy, allow_unused=True)

    errors, running = {}, {}
    for name in options.contestants:
        failure = failure_of(lambda name=name: both(FORMS[name]))
        if failure is None and name != "avg_pool2d":
            errors[name] = max(relative_error(v, t) for v, t in zip(both(FORMS[name]), truths, strict=True))
            if not errors[name] < TOLERANCES[dtype] and name != "textbook":
                failure = f"wrong: relative error {errors[name]:.1e}"
        if failure is None:
            running[name] = FORMS[name]
        else:
            yield {"form": name, "failed": failure}
    # bytes that must move: forward x, logits -> y and one float32 a window; backward all these, dy -> dx, dlogits
    inputs, outputs, kept = x.nbytes, dy.nbytes, 4 * dy.numel()
    counted = {"forward": 2 * inputs + outputs + kept, "forward + backward": 6 * inputs + 3 * outputs + 2 * kept}
    for (direction, size_in_bytes), step in zip(counted.items(), (forward, both), strict=True):
        steps = {name: lambda form=form: step(form) for name, form in running.items()}  # noqa: B023 (called within)
        times = interleave(steps, options, repeats=max(1, int(4e6 / x.numel())))
        for name, seconds in times.items():
            row = {"direction": direction, "form": name} | spread(seconds)
            row["speedup"] = ratio(times["textbook"], seconds) if "textbook" in times else None
            row["share_of_copy_bound"] = size_in_bytes / bandwidth / statistics.median(seconds)
            yield row | {"relative_error": errors.get(name)}


def network_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: a forward pass, or a training step of SGD with momentum."""
    autocast = autocast_of(options)
    for layout in options.layout:
        models = build_networks(options.contestants, options.device, LAYOUTS[layout])
        for batch in options.batch:
            common = describe(options, layout, batch) | {"compile": options.compile}
            images = make_images(batch, layout, options)
            labels = torch.randint(1000, (batch,), device=options.device)
            steps = {}
            for name, (model, wrong) in models.items():
                step = make_step(model, images, labels, autocast, options)
                failure = wrong or failure_of(step)
                if failure is None:
                    steps[name] = step
                else:
                    yield common | {"model": name, "failed": failure}
            times = interleave(steps, options)
            for name, seconds in times.items():
                row = common | {"model": name} | spread(seconds)
                if options.what == "model":
                    ordered = sorted(seconds)
                    for p in (90, 99):
                        row[f"ms_p{p}"] = ordered[math.ceil(p / 100 * len(ordered)) - 1] * 1e3
                row["images_per_second"] = batch / statistics.median(seconds)
                for key, other in (("time / resnet50", "resnet50"), ("time / floor", FLOOR)):
                    row[key] = ratio(seconds, times[other]) if other in times else None
                yield row
            print(f"{layout}, batch {batch}: done", file=sys.stderr)


def make_step(model: nn.Module, images: Tensor, labels: Tensor, autocast, options: argparse.Namespace) -> Callable:
    """What is timed of one network."""
    call = torch.compile(model, mode=options.compile) if options.compile else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

    def inference():
        model.eval()
        with torch.inference_mode(), autocast:
            return call(images)

    def train():
        model.train()
        with autocast:
            loss = F.cross_entropy(call(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return inference if options.what == "model" else train


def memory_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch and network: what a training step keeps, on a GPU its peak as well."""
    autocast = autocast_of(options)
    for layout in options.layout:
        models = build_networks(options.contestants, options.device, LAYOUTS[layout])
        for batch in options.batch:
            images, baseline = make_images(batch, layout, options), None
            for name, (model, wrong) in models.items():
                row = describe(options, layout, batch) | {"model": name}
                if options.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                failure = wrong or failure_of(
                    lambda model=model, row=row: row.update(kept_mib=kept_bytes(model, images, autocast) / 2**20)  # noqa: B023
                )
                model.zero_grad(set_to_none=True)
                if failure is not None:
                    yield row | {"failed": failure}
                    continue
                if options.device == "cuda":
                    row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                baseline = row if name == "resnet50" else baseline
                for key in ("kept", "peak"):
                    if f"{key}_mib" in row and baseline is not None:
                        row[f"{key} / resnet50"] = row[f"{key}_mib"] / baseline[f"{key}_mib"]
                yield row


def kept_bytes(model: nn.Module, images: Tensor, autocast: torch.autocast) -> int:
    """What a training step keeps between forward and backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        loss = model.train()(images).float().mean()
    loss.backward()
    return sum(kept.values())


def make_images(batch: int, layout: str, options: argparse.Namespace) -> Tensor:
    """Noise, (batch, 3, size, size)."""
    images = torch.randn(batch, 3, options.size, options.size, device=options.device)
    return images.to(memory_format=LAYOUTS[layout])


def autocast_of(options: argparse.Namespace) -> torch.autocast:
    """The networks' precision."""
    low = options.precision in ("bfloat16", "float16")
    return torch.autocast(options.device, DTYPES.get(options.precision), enabled=low)


def describe(options: argparse.Namespace, layout: str, batch: int) -> Row:
    """What all networks of one comparison have in common."""
    return {"layout": layout, "precision": options.precision, "batch": batch, "size": options.size}


# ---- the command ----


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = distributed.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="op|model|train|memory")
    for what in ("op", "model", "train", "memory"):
        command = commands.add_parser(what)
        gpu = torch.cuda.is_available()
        choices = list(FORMS if what == "op" else NETWORKS)
        precisions = ("float32", "bfloat16", "float16") if what == "op" else ("float32", "tf32", "bfloat16", "float16")
        command.add_argument("--contestants", nargs="+", choices=choices, default=choices, metavar="NAME")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
        command.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["channels_last"])
        command.add_argument("--precision", choices=precisions, default="float32")
        command.add_argument("--batch", type=int, nargs="+", help="default: 256 on a GPU, 8 on the CPU; model: 1, 32")
        command.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
        command.add_argument("--output", type=Path, nargs="+", default=[], help="files to write, .json or .md")
        command.add_argument("--force", action="store_true", help="replace them where they exist")
        if what == "op":
            command.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES), metavar="SITE")
        else:
            command.add_argument("--size", type=int, default=224, help="of the images, in pixels")
        if what != "memory":
            command.add_argument("--rounds", type=int, default=51 if what == "model" and gpu else 9)
            clock = "cpu: this process's time alone, of all its threads, for a busy machine"
            command.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
        if what in ("model", "train"):
            command.add_argument("--compile", nargs="?", const="default", choices=COMPILE_MODES)
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Complete the options.

    Raises:
        InputError: they cannot be met here.
    """
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU")
    if options.batch is None:
        small = [1, 32] if gpu else [1]
        options.batch = (small if options.what == "model" else []) + [256 if gpu else 8]
    for name, value, least in (
        *(("batch", batch, 1) for batch in options.batch),
        ("threads", options.threads, 1),
        ("rounds", getattr(options, "rounds", None), 2),
        ("size", getattr(options, "size", None), 33),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} {value}; it must be at least {least}")
    for path in options.output:
        if path.suffix not in (".json", ".md"):
            raise InputError(f"--output {path}; its name must end in .json or .md")
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
    environment = runlog.describe_environment(options.device) | {
        "command": ["python", "scripts/benchmark.py", *sys.argv[1:]],
        "lip_kernels": os.environ.get("LIP_KERNELS", "auto"),
        "fused_kernel": kernels.available(options.device),
        "load": round(os.getloadavg()[0], 2),
    }
    make_rows = {"op": op_rows, "model": network_rows, "train": network_rows, "memory": memory_rows}[options.what]
    rows = list(make_rows(options))
    text = performance.markdown(rows, environment)
    print(text, end="")
    for path in options.output:
        content = text if path.suffix == ".md" else performance.to_json(rows, environment)
        checkpoint.write_atomically(path, lambda file, content=content: file.write(content.encode()))


if __name__ == "__main__":
    distributed.launch(main)

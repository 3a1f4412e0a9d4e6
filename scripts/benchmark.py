"""Speed and memory of LIP, side by side with what it is measured against.

    python scripts/benchmark.py op      lip2d at every site of LIP-ResNet-50
    python scripts/benchmark.py model   inference: images per second and latency percentiles
    python scripts/benchmark.py train   training steps: images per second
    python scripts/benchmark.py memory  a training step: bytes kept for the backward pass; on a GPU the peak as well

Every result is checked before it is timed. All contestants of a row run in turn within each round, after a warm-up, so
that what else the machine does meets them alike; a ratio is the median of the rounds' ratios. ``--output NAME``
writes NAME.json and NAME.md. A contestant that cannot run is a row that says why.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lip_resnet
from lip_resnet import kernels, lip2d
from lip_resnet.kernels import plain
from lip_resnet.logits import BottleneckHead, Gate, InstanceNorm2d
from lip_resnet.pooling import LIP2d

# Channels and height = width of the features that LIP-ResNet-50 pools at 224x224: the stem, then main path and shortcut
# of stages 2 to 4.
SITES = ((64, 112), (128, 56), (256, 56), (256, 28), (512, 28), (512, 14), (1024, 14))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


def textbook(x: Tensor, logits: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """The operator as the reference writes it; overflows for large logits and in float16."""
    weight = logits.exp()
    return F.avg_pool2d(x * weight, kernel_size, stride, padding) / F.avg_pool2d(weight, kernel_size, stride, padding)


class TextbookLIP(LIP2d):
    """A LIP layer with the textbook operator."""

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        logits = self.logits(trunk if isinstance(self.logits, BottleneckHead) else x)
        return textbook(x, logits, self.kernel_size, self.stride, self.padding)


class FloorLIP(LIP2d):
    """Average pooling in LIP's place; the logit branch still runs, forward and backward."""

    def forward(self, x: Tensor, trunk: Tensor | None = None) -> Tensor:
        logits = self.logits(trunk if isinstance(self.logits, BottleneckHead) else x)
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding) + 0 * logits[:, :, :1, :1].mean()


def textbook_network(name: str) -> nn.Module:
    """LIP-ResNet as the reference runs it: textbook operator, PyTorch's instance norm, the same weights."""
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, TextbookLIP(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, InstanceNorm2d):
                norm = nn.InstanceNorm2d(child.num_features, affine=True)
                norm.load_state_dict(child.state_dict())
                setattr(parent, key, norm)
    return model


def floor_network(name: str) -> nn.Module:
    """The convolution floor: every convolution of LIP-ResNet, identity for its instance norms and gates, no weights in
    the pooling. What LIP-ResNet costs above it is not the convolutions' arithmetic."""
    model = timm.create_model(name)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, LIP2d):
                setattr(parent, key, FloorLIP(child.logits, child.kernel_size, child.stride, child.padding))
            elif isinstance(child, (InstanceNorm2d, Gate)):
                setattr(parent, key, nn.Identity())
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "resnetblur50": lambda: timm.create_model("resnetblur50"),
    "lip_resnet50": lambda: timm.create_model("lip_resnet50"),
    "lip_resnet50, textbook": lambda: textbook_network("lip_resnet50"),
    "lip_resnet50, convolution floor": lambda: floor_network("lip_resnet50"),
    "lip_resnet50, logits recomputed": lambda: timm.create_model("lip_resnet50", recompute_logits=True),
}


# ---- timing ----

CLOCK = time.perf_counter


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, device: str, repeats: int = 1) -> dict:
    """Seconds of every round of every contestant, after two rounds of warm-up. On a GPU the L2 cache is flushed."""
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device == "cuda" else None
    times = {name: [] for name in contestants}
    for turn in range(-2, rounds):
        for name, run in contestants.items():
            if flush is not None:
                flush.zero_()
                torch.cuda.synchronize()
            start = CLOCK()
            for _ in range(repeats):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append((CLOCK() - start) / repeats)
    return times


def summary(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Milliseconds (median, quartiles) and the median over rounds of baseline / own."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    ratio = statistics.median(b / t for b, t in zip(baseline, times, strict=True))
    return {"ms": middle * 1e3, "ms_q1": low * 1e3, "ms_q3": high * 1e3, "speedup": ratio}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error over norm of the truth."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def try_out(run: Callable[[], object]) -> str | None:
    """Why a contestant cannot run: the error's first line; None where it can."""
    try:
        run()
    except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:  # compilers raise RuntimeErrors
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


# ---- subcommands: each returns rows ----


def copy_bandwidth(options: argparse.Namespace) -> float:
    """Bytes per second, read and written, of copying the largest site's features."""
    x = torch.randn(options.batch, *(64, 112, 112), device=options.device)
    to = torch.empty_like(x)
    times = interleave({"copy": lambda: to.copy_(x)}, 21, options.device, 3)["copy"]
    return 2 * x.numel() * x.element_size() / statistics.median(times)


def benchmark_op(options: argparse.Namespace) -> list[dict]:
    """Forward, and forward + backward, at every site, layout and precision asked for."""
    bandwidth = copy_bandwidth(options)
    compiled = torch.compile(textbook)
    average = lambda x, logits: F.avg_pool2d(x, 3, 2, 1)  # noqa: E731 (one of many)
    forms = {
        "textbook": textbook,
        "lip2d": lip2d,
        "plain form": lambda x, logits: plain.pool(x.float(), logits.float(), (3, 2, 1)).to(x.dtype),
        "textbook, torch.compile": compiled,
        "avg_pool2d": average,
    }
    rows = []
    for layout in options.layout:
        for channels, size in SITES:
            shape, dtype = (options.batch, channels, size, size), DTYPES[options.precision]
            make = lambda t: t.to(options.device, dtype).to(memory_format=LAYOUTS[layout]).requires_grad_()  # noqa: E731, B023
            x, logits = make(torch.randn(shape)), make(12 * torch.rand(shape))
            truth = plain.stable(x.double(), logits.double(), (3, 2, 1))
            dy = torch.randn_like(truth).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            truths = (truth, *torch.autograd.grad(truth, (x, logits), dy.double()))

            def forward(form, x=x, logits=logits):
                with torch.no_grad():
                    return form(x, logits)

            def both(form, x=x, logits=logits, dy=dy):
                y = form(x, logits)
                return y, *torch.autograd.grad(y, (x, logits), dy, allow_unused=True)

            common = {"layout": layout, "precision": options.precision, "batch": options.batch}
            common |= {"site": f"{channels}x{size}x{size}"}
            errors, running = {}, {}
            for name, form in forms.items():
                failure = try_out(lambda form=form: both(form))
                if failure:
                    rows.append(common | {"form": name, "failed": failure})
                    continue
                if name != "avg_pool2d":
                    pairs = zip(both(form), truths, strict=True)
                    errors[name] = max(relative_error(value, t) for value, t in pairs)
                    if name != "textbook" and not errors[name] < TOLERANCE[dtype]:
                        sys.exit(f"{common}: {name} is wrong: relative error {errors[name]:.2e}")
                running[name] = form
            # bytes that must move: forward x, logits -> y, r; backward also dy, dx, dlogits
            inputs, outputs = x.numel() * x.element_size(), truth.numel() * x.element_size()
            saved = truth.numel() * 4
            counted = {"forward": 2 * inputs + outputs + saved, "both": 6 * inputs + 3 * outputs + 2 * saved}
            repeats = max(1, int(4e6 * (options.batch if options.device == "cuda" else 1) / x.numel()))
            for mode, step in (("forward", forward), ("both", both)):
                times = interleave(
                    {name: lambda form=form: step(form) for name, form in running.items()},  # noqa: B023
                    options.rounds,
                    options.device,
                    1 if options.device == "cuda" else repeats,
                )
                for name in running:
                    row = common | {"mode": mode, "form": name} | summary(times[name], times["textbook"])
                    row["copy_bound_share"] = counted[mode] / bandwidth / (row["ms"] / 1e3)
                    rows.append(row | {"relative_error": errors.get(name)})
            print(f"{common['layout']} {common['site']} done", file=sys.stderr)
    return rows


def build(options: argparse.Namespace, layout: str) -> dict[str, nn.Module]:
    """The networks, checked: LIP agrees with the textbook network, the floor has LIP's convolutions."""
    models = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        models[name] = make()
    lip, reference, floor = (models[name] for name in list(NETWORKS)[2:5])
    for module in lip.modules():  # not the average pooling that LIP starts as
        if isinstance(module, LIP2d):
            nn.init.normal_(module.logits.conv.weight, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    reference.load_state_dict(lip.state_dict())
    images, flops = torch.randn(1, 3, 96, 96), []
    for model in (lip, reference, floor):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(images)
        flops.append(counter.get_total_flops())
    with torch.no_grad():
        error = relative_error(lip(images), reference(images))
    if error > 1e-3 or len(set(flops)) > 1:
        sys.exit(f"the networks are not comparable: relative error {error:.2e}, multiply-adds {flops}")
    for name, model in models.items():
        model.to(options.device, memory_format=LAYOUTS[layout])
        if options.compile:
            models[name] = torch.compile(model)
    return models


def network_rows(options: argparse.Namespace, layout: str, batch: int, kind: str) -> list[dict]:
    """One row a network: a forward pass or a whole training step (SGD with momentum), each in turn."""
    models, device = build(options, layout), options.device
    images = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=LAYOUTS[layout])
    labels = torch.randint(1000, (batch,), device=device)
    autocast = torch.autocast(device, DTYPES[options.precision], enabled=options.precision != "float32")

    def inference(model):
        with torch.inference_mode(), autocast:
            return model(images)

    def train(model, optimizer):
        with autocast:
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    common = {"layout": layout, "precision": options.precision, "batch": batch, "compile": options.compile}
    rows, steps = [], {}
    for name, model in models.items():
        if kind == "train":
            optimizer = torch.optim.SGD(model.train().parameters(), 0.01, momentum=0.9)
            step = lambda model=model, optimizer=optimizer: train(model, optimizer)  # noqa: E731
        else:
            model.eval()
            step = lambda model=model: inference(model)  # noqa: E731
        failure = try_out(step)
        if failure:
            rows.append(common | {"model": name, "failed": failure})
        else:
            steps[name] = step
    times = interleave(steps, options.rounds, device)
    for name, seconds in times.items():
        row = common | {"model": name} | summary(seconds, seconds)
        del row["speedup"]
        row["images_per_second"] = batch / statistics.median(seconds)
        if kind == "model":
            ordered = sorted(seconds)
            row |= {
                f"ms_p{p}": ordered[min(math.ceil(p / 100 * len(ordered)), len(ordered)) - 1] * 1e3 for p in (90, 99)
            }
        for against in ("resnet50", "lip_resnet50, convolution floor"):
            if against in times:
                pairs = zip(seconds, times[against], strict=True)
                row[f"time / {against.split(', ')[-1]}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def memory_rows(options: argparse.Namespace, layout: str, batch: int) -> list[dict]:
    """Bytes that each network keeps between forward and backward (weights not counted), and a GPU's peak."""
    images = torch.randn(batch, 3, options.size, options.size, device=options.device)
    images = images.to(memory_format=LAYOUTS[layout])
    autocast = torch.autocast(options.device, DTYPES[options.precision], enabled=options.precision != "float32")
    rows = []
    for name, model in build(options, layout).items():
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def keep(t, own=own, kept=kept):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        row = {"layout": layout, "precision": options.precision, "batch": batch, "model": name}
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step(model=model, keep=keep):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
                loss = model.train()(images).float().mean()
            loss.backward()

        failure = try_out(step)
        model.zero_grad(set_to_none=True)
        if failure:
            rows.append(row | {"failed": failure})
            continue
        row["kept_mib"] = sum(kept.values()) / 2**20
        row["kept / resnet50"] = row["kept_mib"] / (rows[0]["kept_mib"] if rows else row["kept_mib"])
        if options.device == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row["peak / resnet50"] = row["peak_mib"] / (rows[0]["peak_mib"] if rows else row["peak_mib"])
        rows.append(row)
    return rows


def environment(options: argparse.Namespace) -> dict:
    """Hardware, versions and the command: what a figure is worth nothing without."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lip_resnet": commit.stdout.strip() or getattr(lip_resnet, "__version__", "unknown"),
        "fused_kernel": kernels.available(options.device),
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(rows: list[dict], env: dict) -> str:
    """The rows as a table, with their environment in front."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda v: "" if v is None else f"{v:.3g}" if isinstance(v, float) and v < 1000 else str(v)  # noqa: E731
    lines = [f"- {key}: {value}" for key, value in env.items()]
    lines += ["", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(show(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("op", "model", "train", "memory"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["channels_last"])
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="model takes several; op, the first")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time alone, for a busy machine"
    )
    parser.add_argument("--compile", action="store_true", help="put the networks through torch.compile")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"argument --rounds: {options.rounds}; it must be at least 2")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu":
        global CLOCK
        CLOCK = time.process_time
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    env, batches = environment(options), options.batch
    if options.what == "op":
        options.batch = batches[0]
        rows = benchmark_op(options)
    elif options.what == "memory":
        rows = [row for layout in options.layout for row in memory_rows(options, layout, batches[0])]
    else:
        pairs = [(layout, batch) for layout in options.layout for batch in batches]
        rows = [row for layout, batch in pairs for row in network_rows(options, layout, batch, options.what)]
    text = markdown(rows, env)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()

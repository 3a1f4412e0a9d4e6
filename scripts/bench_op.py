"""``benchmark.py op``: forms of the operator at the sites of LIP-ResNet-50, each checked before it is timed."""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from bench_timing import DTYPES, LAYOUTS, Row, failure_of, interleave, ratio, spread
from contestants import FORMS, SITES, TOLERANCES, WINDOW, compile_anew, relative_error
from torch import Tensor

from lip_resnet.ops import reference


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


def truth_of(x: Tensor, logits: Tensor, make: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """y, dx and dlogits in float64, and the dy (made by ``make``) that they are of; a few images at a time."""
    parts = []
    for own in zip(x.split(16), logits.split(16), strict=True):
        inputs = [t.double().requires_grad_() for t in own]
        y = reference.stable(*inputs, WINDOW)
        dy = make(torch.randn(y.shape))
        parts.append((y.detach(), *torch.autograd.grad(y, inputs, dy.double()), dy))
    *truths, dy = (torch.cat(part) for part in zip(*parts, strict=True))
    return *truths, make(dy)


def site_rows(options: argparse.Namespace, layout: str, batch: int, site: str, bandwidth: float) -> Iterator[Row]:
    (channels, size), dtype = SITES[site], DTYPES[options.precision]

    def make(values: Tensor) -> Tensor:
        return values.to(options.device, dtype).to(memory_format=LAYOUTS[layout])

    x, logits = (make(t).requires_grad_() for t in (torch.randn(batch, channels, size, size),
                                                    12 * torch.rand(batch, channels, size, size)))  # fmt: skip
    *truths, dy = truth_of(x.detach(), logits.detach(), make)
    compile_anew()

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

"""``benchmark.py op``: forms of the operator at the sites of LIP-ResNet-50, each checked before it is timed."""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.contestants import FORMS, SITES, TOLERANCES, WINDOW, compile_anew
from bench.timing import DTYPES, LAYOUTS, Row, WrongResult, failure_of, interleave, ratio, spread
from lip_resnet.ops import reference


def copy_bandwidth(batch: int, options: argparse.Namespace) -> float:
    """Bytes per second, read and written, of copying the largest site's features."""
    x = torch.randn(batch, 64, 112, 112, device=options.device)
    to = torch.empty_like(x)
    times, _ = interleave({"copy": lambda: to.copy_(x)}, options, 3)
    return 2 * x.nbytes / statistics.median(times["copy"])


def op_rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row for every layout, batch, site, direction and form."""
    for batch in options.batch:
        bandwidth = copy_bandwidth(batch, options)
        for layout in options.layout:
            for site in options.sites:
                common = {"layout": layout, "precision": options.precision, "batch": batch, "site": site}
                yield from (common | row for row in site_rows(options, layout, batch, site, bandwidth))
                print(f"batch {batch}, {layout}, {site}: done", file=sys.stderr)


def check_form(outputs: tuple[Tensor, ...], x: Tensor, logits: Tensor, dy: Tensor) -> float:
    """The largest relative error of a form's (y, dx, dlogits) against float64 on the same device, 16 images at a time.

    The square root of the summed squared errors over that of the summed squared truths, of each of the three.
    """
    squares = torch.zeros(2, 3, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), 16):
        images = slice(start, start + 16)
        inputs = [t[images].detach().double().requires_grad_() for t in (x, logits)]
        y = reference.stable(*inputs, WINDOW)
        truths = (y.detach(), *torch.autograd.grad(y, inputs, dy[images].double()))
        for index, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
            squares[0, index] += (output[images].detach().double() - truth).square().sum()
            squares[1, index] += truth.square().sum()
    return (squares[0] / squares[1]).sqrt().max().item()


def site_rows(options: argparse.Namespace, layout: str, batch: int, site: str, bandwidth: float) -> Iterator[Row]:
    (channels, size), dtype = SITES[site], DTYPES[options.precision]

    def make(draw: Callable[..., Tensor], *shape: int) -> Tensor:
        return draw(*shape, device=options.device).to(dtype, memory_format=LAYOUTS[layout])

    x = make(torch.randn, batch, channels, size, size).requires_grad_()
    logits = make(lambda *shape, device: 12 * torch.rand(*shape, device=device), *x.shape).requires_grad_()
    dy = make(torch.randn, batch, channels, size // 2, size // 2)
    compile_anew()

    def forward(form):
        with torch.no_grad():
            return form(x, logits)

    def both(form):
        y = form(x, logits)
        return y, *torch.autograd.grad(y, (x, logits), dy, allow_unused=True)

    errors: dict[str, float] = {}
    running = {}

    def check(name: str) -> None:
        outputs = both(FORMS[name])
        if name != "avg_pool2d":
            errors[name] = check_form(outputs, x, logits, dy)
            if not errors[name] < TOLERANCES[dtype] and name != "textbook":
                raise WrongResult(f"relative error {errors[name]:.1e}")

    for name in options.contestants:
        failure = failure_of(lambda name=name: check(name))
        if failure is None:
            running[name] = FORMS[name]
        else:
            yield {"form": name, "failed": failure}
    # bytes that must move: forward x, logits -> y and one float32 a window; backward all these, dy -> dx, dlogits
    inputs, outputs, kept = x.nbytes, dy.nbytes, 4 * dy.numel()
    counted = {"forward": 2 * inputs + outputs + kept, "forward + backward": 6 * inputs + 3 * outputs + 2 * kept}
    for (direction, size_in_bytes), step in zip(counted.items(), (forward, both), strict=True):
        steps = {name: lambda form=form: step(form) for name, form in running.items()}  # noqa: B023 (called within)
        times, failed = interleave(steps, options, repeats=max(1, int(4e6 / x.numel())))
        for name, error in failed.items():
            yield {"direction": direction, "form": name, "failed": error}
        for name, seconds in times.items():
            row = {"direction": direction, "form": name} | spread(seconds)
            row["speedup"] = ratio(times["textbook"], seconds) if "textbook" in times else None
            row["share_of_copy_bound"] = size_in_bytes / bandwidth / statistics.median(seconds)
            yield row | {"relative_error": errors.get(name)}

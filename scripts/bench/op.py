"""``benchmark.py op``: implementations of the operator at the sites of LIP-ResNet-50, checked, then timed."""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.contestants import FORMS, SITES, TOLERANCES, WINDOW, reset_compile
from bench.timing import DTYPES, LAYOUTS, Row, WrongResult, attempt, interleave, ratio, spread
from lip_resnet.ops import reference


def copy_bandwidth(batch: int, options: argparse.Namespace) -> float:
    """Bytes per second, read plus written, of copying the largest site's features."""
    x = torch.randn(batch, 64, 112, 112, device=options.device)
    target = torch.empty_like(x)
    times, _ = interleave({"copy": lambda: target.copy_(x)}, options, 3)
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
    """The largest of the relative errors of a form's y, dx and dlogits.

    Each is the norm of the error over the norm of the truth, computed in float64 on the same device, 16 images at a
    time.
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
    """One row for every direction and form; ``bandwidth`` is ``copy_bandwidth``'s."""
    (channels, size), dtype = SITES[site], DTYPES[options.precision]

    def make(draw: Callable[..., Tensor], *shape: int) -> Tensor:
        return draw(*shape, device=options.device).to(dtype, memory_format=LAYOUTS[layout])

    x = make(torch.randn, batch, channels, size, size).requires_grad_()
    logits = make(lambda *shape, device: 12 * torch.rand(*shape, device=device), *x.shape).requires_grad_()
    dy = make(torch.randn, batch, channels, size // 2, size // 2)
    reset_compile()

    def forward(form):
        with torch.no_grad():
            return form(x, logits)

    def both(form):
        y = form(x, logits)
        return y, *torch.autograd.grad(y, (x, logits), dy, allow_unused=True)

    errors: dict[str, float] = {}

    def check(name: str) -> None:
        outputs = both(FORMS[name])
        if name != "avg_pool2d":
            errors[name] = check_form(outputs, x, logits, dy)
            if not errors[name] < TOLERANCES[dtype] and name != "textbook":
                raise WrongResult(f"relative error {errors[name]:.1e}")

    failures = {name: attempt(check, name)[1] for name in options.contestants}
    for name, failure in failures.items():
        if failure is not None:
            yield {"form": name, "failed": failure}
    # Bytes that must move. Forward: x, logits -> y and one float32 per window; backward: these and dy -> dx, dlogits.
    inputs, outputs, kept = x.nbytes, dy.nbytes, 4 * dy.numel()
    traffic = {"forward": 2 * inputs + outputs + kept, "forward + backward": 6 * inputs + 3 * outputs + 2 * kept}
    for (direction, size_in_bytes), step in zip(traffic.items(), (forward, both), strict=True):
        steps = {name: functools.partial(step, FORMS[name]) for name, failure in failures.items() if failure is None}
        times, failed = interleave(steps, options, repeats=max(1, int(4e6 / x.numel())))
        for name, error in failed.items():
            yield {"direction": direction, "form": name, "failed": error}
        for name, seconds in times.items():
            row = {"direction": direction, "form": name} | spread(seconds)
            row["speedup"] = ratio(times["textbook"], seconds) if "textbook" in times else None
            row["share_of_copy_bound"] = size_in_bytes / bandwidth / statistics.median(seconds)
            yield row | {"relative_error": errors.get(name)}

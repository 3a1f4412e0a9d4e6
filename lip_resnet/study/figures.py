"""A study's figures as SVG text: differences with intervals, accuracy against cost, learning curves, classes."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lip_resnet.study.costs import pareto
from lip_resnet.study.results import Comparison, Result

STYLE = Path(__file__).parents[1] / "figures.mplstyle"
"""The one style of every figure of the project; readable on light and dark pages."""


def draw(paint: Callable[[Axes], None], width: float = 6.4, height: float = 3.4) -> str:
    """An SVG image of one pair of axes, as text; arguments as for ``draw_file``."""
    text = draw_file(paint, "svg", width, height).decode()
    return text[text.index("<svg") :]


def draw_file(paint: Callable[[Axes], None], kind: str, width: float, height: float) -> bytes:
    """An image of one pair of axes as a svg, png or pdf file; the same bytes every time.

    A pdf is for paper: its text is dark, and its fonts are embedded as TrueType, which publishers require.

    Args:
        paint: draws into the axes.
        width, height: in inches; 100 pixels of an SVG an inch.
    """
    paper: Any = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "0.1")
    paper |= {"axes.edgecolor": "0.3", "pdf.fonttype": 42}
    with matplotlib.rc_context(paper if kind == "pdf" else None, fname=STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.subplots())
        buffer = io.BytesIO()
        undated = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer"), "png": ("Software",)}
        figure.savefig(buffer, format=kind, dpi=200, metadata=dict.fromkeys(undated[kind]))
    return buffer.getvalue()


def differences(comparisons: Sequence[Comparison], baseline: str) -> str:
    """Each variant's difference to the baseline: every seed, the mean, and its 95% interval, which one seed has not."""

    def paint(axes: Axes) -> None:
        names = [each.variant for each in comparisons]
        for line, each in enumerate(comparisons):
            paired = each.paired
            axes.plot(paired.differences, [line + 0.2] * len(paired.differences), "o", ms=4, alpha=0.7, color="C0")
            if paired.interval is not None:
                axes.plot(paired.interval, [line, line], "-", lw=2.5, color="C1")
            axes.plot([paired.mean], [line], "D", ms=6, color="C1")
        axes.axvline(0, lw=1, ls="--", color="0.5")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"top-1 difference to {baseline} (points): seeds, mean, 95% interval")

    return draw(paint, height=1.1 + 0.42 * len(comparisons))


def accuracy_against_cost(points: Mapping[str, tuple[float, float, float | None]], cost: str) -> str:
    """Accuracy over cost, with the Pareto front: the variants that no other beats in both.

    Args:
        points: variant -> (cost, mean top-1 in percent, its standard deviation over seeds or None).
        cost: the axis's label.
    """
    front = pareto({name: (x, y) for name, (x, y, _) in points.items()})

    def paint(axes: Axes) -> None:
        for rank, (name, (x, y, deviation)) in enumerate(sorted(points.items(), key=lambda item: item[1][:2])):
            colour = "C1" if name in front else "C0"
            axes.errorbar([x], [y], yerr=deviation, fmt="o", ms=7, color=colour, capsize=3)
            beside = (8, 5 if rank % 2 else -12)  # networks of nearly the same cost are neighbours
            axes.annotate(name, (x, y), xytext=beside, textcoords="offset points", fontsize="small")
        line = sorted(points[name][:2] for name in front)
        axes.plot([x for x, _ in line], [y for _, y in line], "-", lw=1, color="C1", label="Pareto front")
        axes.set_xlabel(cost)
        axes.set_ylabel("top-1 (%)")
        axes.margins(x=0.25, y=0.2)
        axes.legend(loc="lower right")

    return draw(paint, height=4.0)


def learning_curves(
    results: Mapping[str, Mapping[int, Result]], label: str = "epoch", minutes: Mapping[str, float] | None = None
) -> str:
    """Validation top-1 over epochs, or over minutes of training: the mean of the seeds, and one standard deviation.

    Args:
        results: variant -> seed -> result.
        label: of the axis.
        minutes: variant -> minutes of its whole training; those that it lacks are taken from the training log. None:
            over epochs.
    """

    def paint(axes: Axes) -> None:
        for number, (name, of_seeds) in enumerate(results.items()):
            curves = [result.curve for result in of_seeds.values() if result.curve]
            if not curves:
                continue
            length = min(map(len, curves))
            top1 = np.array([[each.top1 for each in curve[:length]] for curve in curves])
            along = np.array([each.epoch + 1 for each in curves[0][:length]])
            if minutes is not None and name in minutes:
                along = along * minutes[name] / (curves[0][-1].epoch + 1)
            elif minutes is not None:
                along = np.mean([[each.minutes for each in curve[:length]] for curve in curves], axis=0)
            seeds = f"{len(curves)} seed" + "s" * (len(curves) > 1)
            axes.plot(along, top1.mean(0), "o-", ms=3, color=f"C{number}", label=f"{name} ({seeds})")
            if len(curves) > 1:
                low, high = (top1.mean(0) + sign * top1.std(0, ddof=1) for sign in (-1, 1))
                axes.fill_between(along, low, high, alpha=0.2, color=f"C{number}", lw=0)
        axes.set_xlabel(label)
        axes.set_ylabel("validation top-1 (%)")
        axes.legend(loc="lower right")

    return draw(paint, height=4.0)


def classes(names: Sequence[str], ours: Sequence[float], variant: str, baseline: str) -> str:
    """Difference in accuracy by class, sorted; the extreme ones are named.

    Args:
        names, ours: a class's name, and its difference in points.
    """
    order = np.argsort(ours)
    values = np.asarray(ours)[order]

    def paint(axes: Axes) -> None:
        axes.bar(range(len(values)), values, width=0.9, color=np.where(values < 0, "C1", "C0").tolist())
        axes.axhline(0, lw=0.8, color="0.5")
        if len(values) <= 20:
            axes.set_xticks(range(len(values)), [names[index].replace("$", r"\$") for index in order])
            if max(map(len, names)) > 3:
                axes.tick_params(axis="x", rotation=60)
        else:
            axes.set_xticks([])
        axes.set_xlabel(f"class, sorted ({len(values)})")
        axes.set_ylabel(f"{variant} less {baseline} (points)")

    return draw(paint, height=3.4)

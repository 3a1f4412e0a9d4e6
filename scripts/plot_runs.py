"""Plot learning curves of runs:  python scripts/plot_runs.py RUNS... --output FIGURE.pdf

One curve for each recipe: the mean over its seeds, with a band of one standard deviation. Runs whose recipes differ
only in train.seed, or in what changes no result, are one recipe.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lip_resnet import cli
from lip_resnet.config import Effect, InputError, Recipe
from lip_resnet.files import write_atomically
from lip_resnet.recipe import load_recipe

KINDS = ("pdf", "svg", "png")
DEFAULTS = ("val/top1", "val/AP")
LABELS = {
    "val/top1": "validation top-1 (%)",
    "val/top5": "validation top-5 (%)",
    "val/loss": "validation loss",
    "val/AP": "validation AP (%)",
    "train/loss": "training loss",
    "train/top1": "training top-1 (%)",
}
AXES = {"epochs": "epoch", "minutes": "time in training steps (minutes)"}


class Curve(NamedTuple):
    """A run's values of one metric."""

    run: str
    seed: int
    key: dict[str, Any]
    """Keys of its recipe that change results, without the seed."""
    x: NDArray[np.float64]
    """(n,): epochs, or minutes."""
    y: NDArray[np.float64]
    """(n,): NaN where it was not finite."""


def parse() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    add("--output", type=Path, required=True, metavar="FILE", help="a new .pdf, .svg or .png file")
    add("--metric", help="a name in metrics.jsonl, such as train/loss (default: val/top1, or val/AP of detection)")
    add("--x", choices=AXES, default="epochs", help="the horizontal axis (default: epochs)")
    add("--force", action="store_true", help="replace an existing --output")
    options = parser.parse_args()
    if options.output.suffix.removeprefix(".") not in KINDS:
        raise InputError(f"--output {options.output}: the file's name must end in .pdf, .svg or .png")
    if options.output.exists() and not options.force:
        raise InputError(f"{options.output} exists; choose another --output or add --force")
    if not options.output.resolve().parent.is_dir():
        raise InputError(f"--output {options.output}: {options.output.parent} is not a directory")
    return options


def main() -> None:
    options = parse()
    runs = list(dict.fromkeys(options.runs))
    read = {run: read_run(Path(run)) for run in runs}
    metric = options.metric or choose_metric({run: lines for run, (_, lines) in read.items()})
    groups = group([read_curve(run, *read[run], metric, options.x) for run in runs])
    kind = options.output.suffix.removeprefix(".")
    content = draw(groups, LABELS.get(metric, metric), AXES[options.x], kind)
    write_atomically(options.output, lambda file: file.write(content))
    for label, curves in groups.items():
        seeds = ", ".join(str(curve.seed) for curve in curves)
        print(f"{label}: {len(curves)} {'run' if len(curves) == 1 else 'runs'}, seed {seeds}")
    print(options.output)


def read_run(run: Path) -> tuple[Recipe, list[dict[str, Any]]]:
    """Recipe and lines of metrics.jsonl of a run folder; a last line that a kill has truncated is left out.

    Raises:
        InputError: it is no run folder.
    """
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (run / name).is_file()]
    if missing:
        raise InputError(f"{run}: not a run folder of train.py: it holds no {missing[0]}")
    *texts, _ = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        lines = [json.loads(text) for text in texts]
    except ValueError as error:
        raise InputError(f"{run / 'metrics.jsonl'}: a line is not JSON") from error
    return load_recipe(run / "config.yaml"), lines


def choose_metric(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The first of ``DEFAULTS`` that every run has.

    Raises:
        InputError: there is none: a run is not evaluated yet, or they are of classification and detection.
    """
    present = {run: [name for name in DEFAULTS if any(name in line for line in lines)] for run, lines in runs.items()}
    for name in DEFAULTS:
        if all(name in names for names in present.values()):
            return name
    for run, names in present.items():
        if not names:
            raise InputError(f"{run} has no evaluation yet; --metric train/loss plots its training loss")
    (first, (one, *_)), *others = present.items()
    other, (theirs, *_) = next((run, names) for run, names in others if one not in names)
    raise InputError(f"{first} has {one} and {other} has {theirs}: one figure shows one metric; plot them separately")


def read_curve(run: str, config: Recipe, lines: list[dict[str, Any]], metric: str, x: str) -> Curve:
    """The curve of one run.

    Raises:
        InputError: the run has no such metric, or its epochs or minutes are not known.
    """
    named = [line for line in lines if metric in line]
    if not named:
        names = sorted({name for line in lines for name in line} - {"step", "epoch"})
        raise InputError(f"{run} has no {metric}; it has {', '.join(names) or 'no numbers yet'}")
    steps = np.array([line["step"] for line in named], dtype=float)
    position = epochs_of(run, lines, steps) if x == "epochs" else minutes_of(run, config, lines, steps)
    values = np.array([np.nan if line[metric] is None else line[metric] for line in named], dtype=float)
    key = config.values(Effect.WEIGHTS) | config.values(Effect.EVALUATION) | {"data.root": config.data.root}
    return Curve(run, key.pop("train.seed"), key, position, values)


def epochs_of(run: str, lines: list[dict[str, Any]], steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steps -> epochs, whose length the last evaluation tells."""
    ends = {line["epoch"] + 1: line["step"] for line in lines if any(name.startswith("val") for name in line)}
    if not ends:
        raise InputError(f"{run} has no evaluation yet, so the length of its epochs is not known; use --x minutes")
    last = max(ends)
    return steps * last / ends[last]


def minutes_of(
    run: str, config: Recipe, lines: list[dict[str, Any]], steps: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Steps -> minutes, of the training steps alone, by the speeds in the log."""
    name = "train/images_per_second"
    speeds = {line["step"]: line[name] for line in lines if line.get(name)}
    if not speeds:
        raise InputError(f"{run} has no {name}, so its minutes are not known; use --x epochs")
    ends = [0, *sorted(speeds)]
    seconds = [(end - start) * config.data.batch_size / speeds[end] for start, end in itertools.pairwise(ends)]
    return np.interp(steps, ends, np.cumsum([0, *seconds])) / 60


def group(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Label -> the curves of one recipe, in the order given, by seed.

    Raises:
        InputError: two runs have the same recipe and seed.
    """
    groups: list[list[Curve]] = []
    for curve in curves:
        same = next((each for each in groups if each[0].key == curve.key), None)
        if same is None:
            groups.append([curve])
            continue
        if twin := next((other for other in same if other.seed == curve.seed), None):
            raise InputError(
                f"{twin.run} and {curve.run} are runs of one recipe and seed {curve.seed}; give one of them"
            )
        same.append(curve)
    keys = [each[0].key for each in groups]
    differing = [name for name in keys[0] if any(key.get(name) != keys[0][name] for key in keys)]
    if len({key["model.name"] for key in keys}) == len(keys):
        differing = ["model.name"]
    labels = [label(key, differing) if differing else key["model.name"] for key in keys]
    return {text: sorted(each, key=lambda curve: curve.seed) for text, each in zip(labels, groups, strict=True)}


def label(key: dict[str, Any], differing: Sequence[str]) -> str:
    """The network's name, and the other keys by which the recipes differ."""
    others = [f"{name}={shorten(key[name])}" for name in differing if name != "model.name"]
    return ", ".join([key["model.name"], *others])


def shorten(value: Any) -> str:
    """A key's value without quotes; of a path its last part."""
    text = json.dumps(value).replace('"', "") if not isinstance(value, str) else value
    return text.rstrip("/").rpartition("/")[2]


def draw(groups: dict[str, list[Curve]], y: str, x: str, kind: str) -> bytes:
    """The figure as a file of this kind."""
    try:
        from lip_resnet.study import figures
    except ImportError as error:
        raise InputError('figures need the package matplotlib: pip install "lip-resnet[study]"') from error

    def paint(axes: Any) -> None:
        for number, (text, curves) in enumerate(groups.items()):
            length = min(len(curve.y) for curve in curves)
            horizontal = np.mean([curve.x[:length] for curve in curves], axis=0)
            values = np.array([curve.y[:length] for curve in curves])
            mean, colour = values.mean(0), f"C{number % 8}"
            seeds = f"{len(curves)} seeds" if len(curves) > 1 else f"seed {curves[0].seed}"
            marker = "o-" if length <= 40 else "-"
            axes.plot(horizontal, mean, marker, ms=3, color=colour, label=f"{text} ({seeds})")
            if len(curves) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(horizontal, mean - spread, mean + spread, alpha=0.2, color=colour, lw=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xlim(left=0)
        axes.legend()

    return figures.draw_file(paint, kind, 6.4, 4.0)


if __name__ == "__main__":
    cli.launch(main)

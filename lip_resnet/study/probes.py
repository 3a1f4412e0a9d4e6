"""Robustness in a study's report: the rows of probe.py, and of ImageNet-C, beside its cells."""

import statistics as plain
from pathlib import Path
from typing import Any

from lip_resnet.config import InputError
from lip_resnet.evaluation.protocol import difference
from lip_resnet.evaluation.robustness import figures
from lip_resnet.study.design import Design
from lip_resnet.study.pages import Section, format_interval
from lip_resnet.study.results import Result
from lip_resnet.study.statistics import compare_paired

Values = dict[str, dict[str, dict[int, float]]]
"""Figure -> variant -> seed -> value, in percent."""


def load_probes(results: dict[str, dict[int, Result]]) -> Values:
    """The figures of every probe-NAME.json and eval-imagenet-c.json of finished cells.

    Raises:
        InputError: a file is of other weights than its cell's row, or differs from another cell's file of that name in
            images or settings.
    """
    values: Values = {}
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for variant, of_seeds in results.items():
        for seed, result in of_seeds.items():
            for file, row in result.probes.items():
                path = result.cell.folder / file
                _check(path, row, result.row, *first.setdefault(file, (path, row)))
                for name, value in figures(row).items():
                    values.setdefault(name, {}).setdefault(variant, {})[seed] = value
    return values


def _check(path: Path, row: dict[str, Any], cell: dict[str, Any], other: Path, theirs: dict[str, Any]) -> None:
    for key in ("seed", "step", "weights"):
        if row.get(key) != cell.get(key):
            what = f"{path}: of {key} {row.get(key)}, the cell's row of {cell.get(key)}"
            raise InputError(f"{what}; remove the file and probe again")
    differs = difference({**row["protocol"], "training": None}, {**theirs["protocol"], "training": None})
    if differs is None and row.get("dataset") != theirs.get("dataset"):
        differs = "other images"
    if differs:
        raise InputError(f"{path} and {other} cannot be compared: {differs}; probe all cells alike")


def robustness_section(design: Design, results: dict[str, dict[int, Result]]) -> Section | None:
    """A table of every figure and variant, with the paired difference to the baseline; None without probes."""
    values = load_probes(results)
    rows = []
    for name, by_variant in values.items():
        baseline = by_variant.get(design.study.baseline, {})
        for variant in [design.study.baseline, *design.compared]:
            ours = by_variant.get(variant, {})
            if not ours:
                continue
            shown = f"{plain.fmean(ours.values()):.2f}"
            shown += f" ± {plain.stdev(ours.values()):.2f}" if len(ours) > 1 else ""
            row = [name, variant, str(len(ours)), shown, "-", "-"]
            seeds = sorted(ours.keys() & baseline.keys())
            if seeds and variant != design.study.baseline:
                paired = compare_paired([ours[seed] - baseline[seed] for seed in seeds])
                row[-2:] = [f"{paired.mean:+.2f}", format_interval(paired.interval)]
            rows.append(row)
    if not rows:
        return None
    text = (
        "Probes (python scripts/probe.py robustness FOLDER) of the finished cells, in percent: mean and standard "
        "deviation over seeds, and differences to the baseline paired by seed, with 95% intervals by the paired t "
        "test. They describe the networks; none was declared before the runs, so the intervals are not adjusted and no "
        "verdict follows from them.",
    )
    return Section("Robustness", text, (["probe (%)", "variant", "seeds", "value", "difference", "95% interval"], rows))

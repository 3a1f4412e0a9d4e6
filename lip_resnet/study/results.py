"""What a study's finished cells show: rows, predictions and learning curves, checked to be comparable, and compared."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lip_resnet.config import InputError
from lip_resnet.evaluation.predictions import Predictions, read_predictions
from lip_resnet.evaluation.protocol import difference
from lip_resnet.evaluation.rows import read_rows
from lip_resnet.study import statistics
from lip_resnet.study.cells import read_record
from lip_resnet.study.design import Cell, Design
from lip_resnet.study.statistics import Paired


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    cell: Cell
    row: dict[str, Any]
    predictions: Predictions
    curve: list[tuple[float, float]]
    """(epoch, val top-1) at each evaluation in training; NaN where its logits were not finite."""
    images_per_second: float | None
    """Median of the training log; None where it has none."""
    seconds: float | None
    """Of training and evaluation, over all starts."""


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline."""

    variant: str
    seeds: list[int]
    """Finished for both."""
    paired: Paired
    p: float | None
    """What decides: of the paired t test, for one of the family adjusted by Holm."""
    bootstrap: tuple[float, float] | None
    """Crossed bootstrap interval over seeds and images; None for one seed."""
    mcnemar: list[tuple[int, int, float]]
    """For each seed: images that only this variant has right, that only the baseline has, p."""
    verdict: str


def load_results(design: Design) -> dict[str, dict[int, Result]]:
    """Variant -> seed -> result, of the finished cells.

    Raises:
        InputError: no cell is finished, a file cannot be read, or cells were evaluated on other images or by another
            protocol.
    """
    results: dict[str, dict[int, Result]] = {name: {} for name in design.recipes}
    first: Result | None = None
    for cell in design.cells():
        if not cell.finished:
            continue
        result = _load(cell)
        first = first or result
        _check_same_images(result, first)
        results[cell.variant][cell.seed] = result
    if first is None:
        raise InputError(
            f"{design.folder}: no cell is finished yet; go on with: python scripts/study.py run STUDY.yaml"
        )
    return results


def _load(cell: Cell) -> Result:
    row = read_rows([str(cell.row)])[0]
    if row.get("seed") != cell.seed:
        raise InputError(f"{cell.row}: a row of seed {row.get('seed')}; this cell's is {cell.seed}")
    predictions = read_predictions(cell.predictions)
    if len(predictions.images) != row["images"] or int(predictions.right.sum()) != row["correct1"]:
        raise InputError(f"{cell.predictions}: not the predictions of {cell.row}; remove both, and run the study again")
    lines = []
    metrics = cell.folder / "metrics.jsonl"
    if metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    speeds = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
    tops = [(line["epoch"], line["val/top1"]) for line in lines if "val/top1" in line]
    curve = [(epoch, math.nan if top1 is None else top1) for epoch, top1 in tops]  # null: logits were not finite
    speed = float(np.median(speeds)) if speeds else None
    return Result(cell, row, predictions, curve, speed, read_record(cell).get("seconds"))


def _check_same_images(result: Result, first: Result) -> None:
    """Refuse results of other images, another order, or another evaluation."""
    ours, theirs = result.predictions, first.predictions
    where = f"{result.cell.predictions} and {first.cell.predictions}"
    if ours.images != theirs.images:
        what = "the same images in another order" if sorted(ours.images) == sorted(theirs.images) else "other images"
        raise InputError(f"{where} are of {what}; all cells of a study are evaluated on one set")
    if not np.array_equal(ours.label, theirs.label):
        raise InputError(f"{where} have other labels for the same images")
    protocols = [{**each.row["protocol"], "training": None} for each in (result, first)]
    if (differs := difference(protocols[0], protocols[1])) is not None:
        raise InputError(f"{result.cell.row} and {first.cell.row} were evaluated by different protocols: {differs}")


def right(results: dict[int, Result], seeds: list[int]) -> NDArray[np.bool_]:
    """(seeds, images): whether the run of a seed is right about an image."""
    return np.stack([results[seed].predictions.right for seed in seeds])


def compare(design: Design, results: dict[str, dict[int, Result]]) -> list[Comparison]:
    """Every variant with a finished seed in common with the baseline, the declared comparison first.

    The declared comparison is tested by itself; the others are one family, whose p values Holm adjusts.
    """
    baseline = results[design.study.baseline]
    shared = {name: sorted(results[name].keys() & baseline.keys()) for name in design.compared}
    paired = {
        name: statistics.compare_paired([results[name][s].row["top1"] - baseline[s].row["top1"] for s in seeds])
        for name, seeds in shared.items()
        if seeds
    }
    family = [name for name in paired if name != design.study.primary and paired[name].p_t is not None]
    adjusted = dict(zip(family, statistics.holm([paired[name].p_t or 0.0 for name in family]), strict=True))
    comparisons = []
    for name, each in paired.items():
        seeds = shared[name]
        ours, theirs = right(results[name], seeds), right(baseline, seeds)
        p = adjusted.get(name, each.p_t)
        comparisons.append(
            Comparison(
                name,
                seeds,
                each,
                p,
                statistics.crossed_bootstrap(ours, theirs) if len(seeds) > 1 else None,
                [statistics.mcnemar(one, other) for one, other in zip(ours, theirs, strict=True)],
                statistics.verdict(each, p),
            )
        )
    return comparisons

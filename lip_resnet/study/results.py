"""What a study's finished cells show: rows, predictions and learning curves, checked to be comparable, and compared."""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lip_resnet.config import InputError
from lip_resnet.evaluation.predictions import read_predictions
from lip_resnet.evaluation.protocol import difference
from lip_resnet.evaluation.robustness import check_probe, read_probe
from lip_resnet.evaluation.rows import check_row, read_rows
from lip_resnet.study import statistics
from lip_resnet.study.cells import read_record
from lip_resnet.study.design import CONFIRMATORY_SEEDS, EXPORTED_CELLS, Cell, Design
from lip_resnet.study.statistics import Paired

EXPORTED_PREDICTIONS = "predictions.csv.gz"
"""In an exported study: columns ``image``, ``label``, and top-1 of every finished cell under its name."""


class Validation(NamedTuple):
    """A validation during training."""

    epoch: float
    top1: float
    """In percent; NaN where the logits were not finite."""
    minutes: float
    """Of training until then, by the training log; without validations."""


@dataclass(frozen=True)
class Result:
    """One finished cell; n images in the order of the set."""

    cell: Cell
    row: dict[str, Any]
    images: list[str]
    label: NDArray[np.int64]
    """(n,)"""
    top1: NDArray[np.int64]
    """(n,)"""
    curve: list[Validation]
    images_per_second: float | None
    """Median of the training log; None where it has none."""
    seconds: float | None
    """Of training and evaluation, over all starts."""
    probes: dict[str, dict[str, Any]]
    """File name -> row, of probe.py and of ImageNet-C."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,): whether top-1 is the label."""
        return self.top1 == self.label


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline."""

    variant: str
    seeds: list[int]
    """Finished for both."""
    paired: Paired
    p: float | None
    """What decides: of the paired t test, for one of the family adjusted by Holm."""
    p_sign_flip: float | None
    """Of the sign-flip test, for one of the family adjusted by Holm."""
    bootstrap: tuple[float, float] | None
    """Crossed bootstrap interval over seeds and images; None for one seed."""
    mcnemar: list[tuple[int, int, float]]
    """For each seed: images that only this variant has right, that only the baseline has, p."""
    verdict: str


def load_results(design: Design) -> dict[str, dict[int, Result]]:
    """Variant -> seed -> result, of the finished cells of a study's folder, or of one that ``export`` has written.

    Raises:
        InputError: no cell is finished, a file cannot be read, or cells were evaluated on other images or by another
            protocol.
    """
    results: dict[str, dict[int, Result]] = {name: {} for name in design.recipes}
    first: Result | None = None
    for result in _read_exported(design) if design.exported else _read_cells(design):
        first = first or result
        _check(result, first)
        results[result.cell.variant][result.cell.seed] = result
    if first is None:
        raise nothing_finished(design)
    return results


def nothing_finished(design: Design) -> InputError:
    """The error of a report or export of a study without a finished cell."""
    line = f"{design.folder}: no cell is finished yet; go on with: python scripts/study.py run STUDY.yaml"
    for cell, message in load_failed(design).items():
        return InputError(f"{line}; failed: {cell}: {message}")
    return InputError(line)


def load_failed(design: Design) -> dict[str, str]:
    """Cell -> its last message, of the cells that have failed and are not finished."""
    if design.exported:
        return {
            str(cell): line.get("message", "")
            for cell, line in exported_cells(design).items()
            if line["status"] == "failed"
        }
    records = {str(cell): read_record(cell) for cell in design.cells() if not cell.finished}
    return {name: record["message"] for name, record in records.items() if record.get("status") == "failed"}


def describe_verdict(
    design: Design, declared: str | None, seeds: Mapping[str, int], finished: int, failed: Mapping[str, str]
) -> list[str]:
    """The question, the declared comparison in words, and what limits it.

    Args:
        declared: the sentence of the declared comparison; None: no seed of it is finished.
        seeds, finished, failed: as for ``state_lines``.
    """
    study = design.study
    unknown = f"**No verdict yet**: no seed of both {study.primary} and {study.baseline} is finished."
    lines = [*([study.question] if study.question else []), declared or unknown]
    return lines + state_lines(design, seeds, finished, failed)


def state_lines(design: Design, seeds: Mapping[str, int], finished: int, failed: Mapping[str, str]) -> list[str]:
    """What limits a verdict: few seeds, cells that are not finished, cells that failed.

    Args:
        seeds: of each comparison.
        finished: number of cells.
        failed: as ``load_failed``.
    """
    lines, few = [], [name for name, count in seeds.items() if count < CONFIRMATORY_SEEDS]
    if few or not seeds:
        whose = f" of {', '.join(few)}" if len(few) < len(seeds) else ""
        lines.append(
            f"**Exploratory**: fewer than {CONFIRMATORY_SEEDS} seeds{whose}. A difference of this kind is a reason to "
            "run more seeds, not a result."
        )
    if finished < (cells := len(design.cells())):
        lines.append(
            f"**Not complete**: {finished} of {cells} cells are finished; the table shows how many of each. The "
            "verdict may change until all are."
        )
    if failed:
        messages = "; ".join(f"{cell}: {message}" for cell, message in failed.items())
        lines.append(f"**Failed cells**, which no figure includes: {messages}.")
    return lines


def _read_cells(design: Design) -> Iterator[Result]:
    """The finished cells of a study's folder."""
    for cell in design.cells():
        if not cell.finished:
            continue
        row = read_rows([str(cell.row)])[0]
        predictions = read_predictions(cell.predictions)
        curve, speed = _read_log(cell.folder / "metrics.jsonl", design.recipes[cell.variant].data.batch_size)
        paths = [*sorted(cell.folder.glob("probe-*.json")), *cell.folder.glob("eval-imagenet-c.json")]
        probes = {path.name: read_probe(path) for path in paths}
        seconds = read_record(cell).get("seconds")
        yield Result(cell, row, predictions.images, predictions.label, predictions.top1, curve, speed, seconds, probes)


def _read_log(path: Path, batch_size: int) -> tuple[list[Validation], float | None]:
    """The learning curve, and the median of images/s, of a training log; empty and None where there is none."""
    curve: list[Validation] = []
    speeds: list[float] = []
    step, minutes = 0, 0.0
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in map(json.loads, lines):
            if speed := line.get("train/images_per_second"):
                speeds.append(speed)
                minutes += (line["step"] - step) * batch_size / speed / 60
                step = line["step"]
            if "val/top1" in line:  # null: the logits were not finite
                top1 = math.nan if line["val/top1"] is None else line["val/top1"]
                curve.append(Validation(line["epoch"], top1, round(minutes, 3)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the log of a training: {error}") from error
    return curve, float(np.median(speeds)) if speeds else None


def _read_exported(design: Design) -> Iterator[Result]:
    """The finished cells of an exported study."""
    cells, predictions = design.folder / EXPORTED_CELLS, design.folder / EXPORTED_PREDICTIONS
    images, label, top1 = _read_exported_predictions(predictions)
    for cell, line in exported_cells(design).items():
        if line["status"] != "done":
            continue
        source = f"{cells}: {cell}"
        if str(cell) not in top1:
            raise InputError(f"{predictions}: lacks {cell}, which {cells.name} has; export the study again")
        try:
            curve = [Validation(each[0], math.nan if each[1] is None else each[1], each[2]) for each in line["curve"]]
            row = check_row(line["row"], source)
            probes = {name: check_probe(probe, f"{source}: {name}") for name, probe in line["probes"].items()}
            speed, seconds = line["images_per_second"], line["seconds"]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{source}: not a cell of an exported study: {error}") from error
        yield Result(cell, row, images, label, top1[str(cell)], curve, speed, seconds, probes)


def exported_cells(design: Design) -> dict[Cell, dict[str, Any]]:
    """Cell -> its line in an exported study: ``status``, done or failed, and what ``export`` has written of it.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    path = design.folder / EXPORTED_CELLS
    cells = {str(cell): cell for cell in design.cells()}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_name = {f"{line['variant']}/seed{line['seed']}": line for line in lines}
        if others := by_name.keys() - cells.keys():
            raise ValueError(f"{min(others)} is no cell of study.yaml")
        if unknown := {line["status"] for line in lines} - {"done", "failed"}:
            raise ValueError(f"status {min(unknown)!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the cells of an exported study: {error}") from error
    return {cells[name]: line for name, line in by_name.items()}


def _read_exported_predictions(path: Path) -> tuple[list[str], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Images, their labels (n,), and cell -> top-1 (n,)."""
    try:
        text = gzip.decompress(path.read_bytes()).decode()
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        images = list(columns.pop("image"))
        return (
            images,
            np.array(columns.pop("label"), dtype=np.int64),
            {name: np.array(column, dtype=np.int64) for name, column in columns.items()},
        )
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, csv.Error, zlib.error) as error:
        raise InputError(f"{path}: not the predictions of an exported study: {error}") from error


def _check(result: Result, first: Result) -> None:
    """Refuse a result whose files do not belong together, and results of other images, order, or evaluation."""
    cell, row = result.cell, result.row
    if row.get("seed") != cell.seed:
        raise InputError(f"{cell.row}: a row of seed {row.get('seed')}; this cell's is {cell.seed}")
    if len(result.images) != row["images"] or int(result.right.sum()) != row["correct1"]:
        raise InputError(f"{cell.predictions}: not the predictions of {cell.row}; remove both, and run the study again")
    where = f"{cell.predictions} and {first.cell.predictions}"
    if result.images != first.images:
        same = sorted(result.images) == sorted(first.images)
        what = "the same images in another order" if same else "other images"
        raise InputError(f"{where} are of {what}; all cells of a study are evaluated on one set")
    if not np.array_equal(result.label, first.label):
        raise InputError(f"{where} have other labels for the same images")
    protocols = [{**each.row["protocol"], "training": None} for each in (result, first)]
    if (differs := difference(protocols[0], protocols[1])) is not None:
        raise InputError(f"{cell.row} and {first.cell.row} were evaluated by different protocols: {differs}")


def right(results: dict[int, Result], seeds: list[int]) -> NDArray[np.bool_]:
    """(seeds, images): whether the run of a seed is right about an image."""
    return np.stack([results[seed].right for seed in seeds])


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
    family = {name: each for name, each in paired.items() if name != design.study.primary}
    of_t = _adjust({name: each.p_t for name, each in family.items()})
    of_sign_flip = _adjust({name: each.p_sign_flip for name, each in family.items()})
    comparisons = []
    for name, each in paired.items():
        seeds = shared[name]
        ours, theirs = right(results[name], seeds), right(baseline, seeds)
        p = of_t.get(name, each.p_t)
        comparisons.append(
            Comparison(
                name,
                seeds,
                each,
                p,
                of_sign_flip.get(name, each.p_sign_flip),
                statistics.crossed_bootstrap(ours, theirs) if len(seeds) > 1 else None,
                [statistics.mcnemar(one, other) for one, other in zip(ours, theirs, strict=True)],
                statistics.verdict(each, p),
            )
        )
    return comparisons


def _adjust(p_values: dict[str, float | None]) -> dict[str, float]:
    """Holm's adjusted p values of a family, of those that have one."""
    known = {name: p for name, p in p_values.items() if p is not None}
    return dict(zip(known, statistics.holm(list(known.values())), strict=True))

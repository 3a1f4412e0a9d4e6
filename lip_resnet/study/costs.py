"""What a study's networks cost: parameters, multiply-adds, and the times that ``study.py measure`` has written."""

import json
import math
import statistics as plain
from collections.abc import Callable
from typing import Any

from lip_resnet.config import InputError
from lip_resnet.study.design import Design
from lip_resnet.study.pages import Section, format_interval
from lip_resnet.study.results import Result
from lip_resnet.study.statistics import compare_paired

COSTS = "costs.json"
KINDS = ("training", "inference")
NEAR = 0.25
"""A variant is at equal cost if it costs as much as the primary one up to this share."""

Results = dict[str, dict[int, Result]]


def read_costs(design: Design) -> dict[str, Any] | None:
    """costs.json of a study's folder, checked; None if it has none.

    Raises:
        InputError: it cannot be read, or is not what ``study.py measure`` writes.
    """
    path, baseline = design.folder / COSTS, design.study.baseline
    try:
        costs = json.loads(path.read_text(encoding="utf-8"))
        for kind in KINDS:
            if baseline not in costs[kind]:
                raise ValueError(f"no {kind} time of the baseline {baseline}")
            for name, row in costs[kind].items():
                for key in ("ms", "ratio"):
                    if type(row[key]) not in (int, float) or not 0 < row[key] < math.inf:
                        raise ValueError(f"{kind} {name}: {key} is {row[key]!r}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        line = f"{path}: not a measurement of study.py measure ({what})"
        raise InputError(f"{line}; measure again, or remove it") from error
    return costs


def measures(design: Design, results: Results) -> dict[str, dict[str, float]]:
    """What a variant costs, by each measure: ``multiply-adds`` of one image (G), ``inference`` (ms an image), and
    ``training`` of a whole run (minutes); measure -> variant -> cost, of the finished variants that have one.
    """
    costs = read_costs(design) or {kind: {} for kind in KINDS}
    values: dict[str, dict[str, float]] = {"multiply-adds": {}, "inference": {}, "training": {}}
    for name, of_seeds in results.items():
        if not of_seeds:
            continue
        row = next(iter(of_seeds.values())).row
        values["multiply-adds"][name] = row["macs"] / 1e9
        network = design.recipes[name].model
        same = next(each for each, recipe in design.recipes.items() if recipe.model == network)
        if same in costs["inference"]:
            values["inference"][name] = costs["inference"][same]["ms"]  # one network is as quick as itself
        if name in costs["training"] and row.get("step"):
            images = row["step"] * design.recipes[name].data.batch_size
            ms = costs["training"][name]["ratio"] * costs["training"][design.study.baseline]["ms"]
            values["training"][name] = images * ms / 6e4
    return values


def cost_table(design: Design, results: Results) -> tuple[list[str], list[list[str]]]:
    """Sizes, measured times, and the fronts of accuracy against each measure on which a variant stands."""
    costs, of_measure = read_costs(design), measures(design, results)
    baseline = design.study.baseline
    fronts = {name: pareto(points(costs, results)) for name, costs in of_measure.items() if len(costs) > 1}
    header = ["variant", "parameters (M)", "multiply-adds (G)"]
    if costs:
        header += ["training step (ms/image)", "inference (ms/image)", "whole training (min)"]
    header += ["log (images/s)", "cell (min)", "Pareto front"]
    rows = []
    for name in [baseline, *design.compared]:
        if not results[name]:
            continue
        first = next(iter(results[name].values()))
        row = [name, f"{first.row['params'] / 1e6:.2f}", f"{of_measure['multiply-adds'][name]:.3f}"]
        if costs:
            for kind in KINDS:  # a variant that was added after the measurement has no times
                time = costs[kind].get(name)
                row.append(f"{time['ms']:.2f} ({time['ratio']:.2f})" if time else "-")
            minutes = of_measure["training"]
            row.append(f"{minutes[name]:.1f} ({relative(minutes, name, baseline)})" if name in minutes else "-")
        row.append(_show(plain.median, [result.images_per_second for result in results[name].values()], "{:.0f}"))
        row.append(_show(plain.fmean, [(result.seconds or 0) / 60 for result in results[name].values()], "{:.1f}"))
        row.append(", ".join(measure for measure, front in fronts.items() if name in front) or "-")
        rows.append(row)
    return header, rows


def cost_notes(design: Design) -> tuple[str, ...]:
    """What the columns of ``cost_table`` mean."""
    text = "Multiply-adds are of one image."
    if costs := read_costs(design):
        clock = {"cpu": ", CPU time of one thread", "gpu": ", between CUDA events"}.get(costs.get("clock", ""), "")
        batch = f", batches of {costs['batch']} images" if "batch" in costs else ""
        text += (
            " A training step and inference were measured by study.py measure, all networks in turn"
            f"{batch}{clock}; a whole training is the images of a run at that speed; in brackets: relative to the "
            "baseline."
        )
    else:
        text += " study.py measure adds the measured times of all networks."
    text += " Speed in the training log and minutes of a cell change with other work on the machine."
    return (f"{text} Pareto front: no variant has as much top-1 at less cost, by the means alone.",)


def relative(costs: dict[str, float], name: str, other: str) -> str:
    """``1.25``: the cost of a variant over another's; a dash where one has none."""
    return f"{costs[name] / costs[other]:.2f}" if name in costs and other in costs else "-"


def _show(average: Callable[[list[float]], float], values: list[float | None], form: str) -> str:
    known = [value for value in values if value]
    return form.format(average(known)) if known else "-"


def points(costs: dict[str, float], results: Results) -> dict[str, tuple[float, float]]:
    """Variant -> (cost, mean top-1)."""
    return {
        name: (cost, plain.fmean(each.row["top1"] for each in results[name].values())) for name, cost in costs.items()
    }


def pareto(points: dict[str, tuple[float, float]]) -> set[str]:
    """Names of the points (cost, accuracy) that no other point beats: at most its cost, at least its accuracy."""
    return {
        name
        for name, (x, y) in points.items()
        if not any((a <= x and b >= y) and (a < x or b > y) for a, b in points.values())
    }


def equal_costs(design: Design, results: Results) -> Section | None:
    """The primary variant against those that cost as much, by each measure; None without such a variant."""
    primary, rows = design.study.primary, []
    for measure, costs in measures(design, results).items():
        for name, cost in costs.items():
            seeds = sorted(results[primary].keys() & results[name].keys())
            if name == primary or not seeds or primary not in costs or abs(cost / costs[primary] - 1) > NEAR:
                continue
            paired = compare_paired([results[primary][s].row["top1"] - results[name][s].row["top1"] for s in seeds])
            row = [measure, name, relative(costs, name, primary), str(len(seeds))]
            rows.append([*row, f"{paired.mean:+.2f}", format_interval(paired.interval)])
    if not rows:
        return None
    text = (
        f"{primary} against every variant whose cost is within {NEAR:.0%} of its own: paired over seeds, with 95% "
        "intervals by the paired t test. None is the declared comparison: no verdict follows.",
    )
    header = ["at equal", "variant", f"its cost / {primary}'s", "seeds", f"{primary} less it (points)", "95% interval"]
    return Section("At equal cost", text, (header, rows))

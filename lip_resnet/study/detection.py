"""The report of a study of detectors: AP over paired seeds, with intervals over seeds and over images too."""

import csv
import io
import json
import statistics as plain
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lip_resnet.config import InputError
from lip_resnet.evaluation.average_precision import METRICS, average_precision, bootstrap, interval
from lip_resnet.evaluation.matching import Matches, read_matches
from lip_resnet.evaluation.protocol import difference
from lip_resnet.evaluation.rows import check_row, read_rows
from lip_resnet.files import write_text
from lip_resnet.study.cells import read_record
from lip_resnet.study.design import Cell, Design
from lip_resnet.study.pages import Section, equals_p, format_interval, format_p, in_words, to_html, to_markdown
from lip_resnet.study.results import describe_verdict, exported_cells, load_failed, nothing_finished
from lip_resnet.study.statistics import Paired, compare_paired, holm, verdict

EXPORTED_MATCHES = "matches.npz"
"""In an exported study: the matches of every finished cell under its name."""
SAMPLES = 1000
"""Of the bootstrap over seeds and images."""


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    cell: Cell
    row: dict[str, Any]
    matches: Matches
    seconds: float | None
    """Of training and evaluation, over all starts."""


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, over the seeds that are finished for both."""

    variant: str
    paired: dict[str, Paired]
    """For each of ``METRICS`` that the set has."""
    p: float | None
    """Of the paired t test of AP; for one of the family adjusted by Holm."""
    over_images: dict[str, tuple[float, float] | None]
    """AP and APs: the interval of the difference over seeds and images together; none of one seed."""

    @property
    def verdict(self) -> str:
        """On AP."""
        return verdict(self.paired["AP"], self.p)


def load_results(design: Design) -> dict[str, dict[int, Result]]:
    """Variant -> seed -> result, of the finished cells of a study's folder, or of one that ``export`` has written.

    Raises:
        InputError: no cell is finished, a file cannot be read, or cells were evaluated on other images or by another
            protocol.
    """
    results: dict[str, dict[int, Result]] = {name: {} for name in design.recipes}
    first: Result | None = None
    for result in _read_exported(design) if design.exported else _read_cells(design):
        cell, row, matches = result.cell, result.row, result.matches
        if row.get("seed") != cell.seed:
            raise InputError(f"{cell.row}: a row of seed {row.get('seed')}; this cell's is {cell.seed}")
        if abs(average_precision(matches)["AP"] - row["AP"]) > 1e-6:
            raise InputError(f"{cell.predictions}: not the matches of {cell.row}; remove both, and run the study again")
        results[cell.variant][cell.seed] = result
        first = first or result
        for name in ("image_ids", "category_ids", "object_image", "object_label", "counted"):
            if not np.array_equal(getattr(matches, name), getattr(first.matches, name)):
                what = "other images or objects; all cells of a study are evaluated on one set"
                raise InputError(f"{cell.predictions} and {first.cell.predictions} are of {what}")
        protocols = [{**each.row["protocol"], "training": None} for each in (result, first)]
        if (differs := difference(protocols[0], protocols[1])) is not None:
            raise InputError(f"{cell.row} and {first.cell.row} were evaluated by different protocols: {differs}")
    if first is None:
        raise nothing_finished(design)
    return results


def _read_cells(design: Design) -> Iterator[Result]:
    """The finished cells of a study's folder."""
    for cell in filter(lambda cell: cell.finished, design.cells()):
        row, matches = read_rows([str(cell.row)])[0], read_matches(cell.predictions)
        yield Result(cell, row, matches, read_record(cell).get("seconds"))


def _read_exported(design: Design) -> Iterator[Result]:
    """The finished cells of an exported study."""
    for cell, line in exported_cells(design).items():
        if line["status"] == "done":
            row = check_row(line.get("row"), f"{design.folder}: {cell}")
            yield Result(cell, row, read_matches(design.folder / EXPORTED_MATCHES, f"{cell}/"), line.get("seconds"))


def compare(design: Design, results: dict[str, dict[int, Result]]) -> list[Comparison]:
    """Every variant with a finished seed in common with the baseline, the declared comparison first."""
    baseline = results[design.study.baseline]
    shared = {name: sorted(results[name].keys() & baseline.keys()) for name in design.compared}
    shared = {name: seeds for name, seeds in shared.items() if seeds}
    paired = {name: _paired(results[name], baseline, seeds) for name, seeds in shared.items()}
    family = [name for name in paired if name != design.study.primary and paired[name]["AP"].p_t is not None]
    adjusted = dict(zip(family, holm([paired[name]["AP"].p_t or 0.0 for name in family]), strict=True))
    return [
        Comparison(
            name,
            paired[name],
            adjusted.get(name, paired[name]["AP"].p_t),
            _over_images(results[name], baseline, seeds, paired[name]) if len(seeds) > 1 else {},
        )
        for name, seeds in shared.items()
    ]


def _paired(ours: dict[int, Result], theirs: dict[int, Result], seeds: list[int]) -> dict[str, Paired]:
    pairs = {name: [(ours[seed].row[name], theirs[seed].row[name]) for seed in seeds] for name in METRICS}
    return {
        name: compare_paired([one - other for one, other in values])
        for name, values in pairs.items()
        if None not in values[0]
    }


def _over_images(
    ours: dict[int, Result], theirs: dict[int, Result], seeds: list[int], paired: dict[str, Paired]
) -> dict[str, tuple[float, float] | None]:
    """Intervals of the mean difference, resampling seeds and images independently (Owen 2007, "pigeonhole")."""
    values = bootstrap([group[seed].matches for group in (ours, theirs) for seed in seeds], samples=SAMPLES)
    drawn = np.random.default_rng(0).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=SAMPLES).T
    differences = {name: each[: len(seeds)] - each[len(seeds) :] for name, each in values.items()}
    means = {name: (each * drawn).sum(0) / len(seeds) for name, each in differences.items()}
    return {name: interval(each, paired[name].mean) for name, each in means.items() if name in paired}


def make_sections(
    design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]
) -> list[Section]:
    """The parts of a report, the verdict first."""
    return [
        _verdict(design, results, comparisons),
        _figures(design, results, comparisons),
        _differences(design, comparisons),
        _cost(results),
        _protocol(design, results),
    ]


def write_report(design: Design) -> list[str]:
    """As ``report.write_report``."""
    results = load_results(design)
    comparisons = compare(design, results)
    sections = make_sections(design, results, comparisons)
    for name, text in (
        ("report.md", to_markdown(sections)),
        ("report.html", to_html(sections)),
        ("report.csv", to_csv(results, comparisons)),
    ):
        write_text(design.folder / name, text)
    return [*sections[0].text, *(str(design.folder / name) for name in ("report.md", "report.html", "report.csv"))]


def _verdict(design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]) -> Section:
    study = design.study
    declared = next((each for each in comparisons if each.variant == study.primary), None)
    text = None if declared is None else sentence(declared, study.baseline)
    seeds = {each.variant: len(each.paired["AP"].differences) for each in comparisons}
    lines = describe_verdict(design, text, seeds, sum(map(len, results.values())), load_failed(design))
    return Section(f"{design.folder.name}: {study.primary} against {study.baseline}", tuple(lines))


def sentence(comparison: Comparison, baseline: str) -> str:
    """A comparison as one sentence: verdict on AP, difference, intervals and tests."""
    paired = comparison.paired["AP"]
    text = f"{in_words(comparison.verdict, comparison.variant, baseline)}: {paired.mean:+.2f} AP"
    if paired.p_t is None:
        return f"{text}, one seed."
    if paired.interval is None:
        seeds = len(paired.differences)
        return f"{text} in each of {seeds} seeds, so no interval (sign-flip test p {equals_p(paired.p_t)})."
    text += f", 95% interval {format_interval(paired.interval)} (paired t over {len(paired.differences)} seeds, "
    flip = "" if paired.p_sign_flip is None else f"; exact sign-flip test p {equals_p(paired.p_sign_flip)}"
    text += f"p {equals_p(paired.p_t)}{flip})"
    return f"{text}; over seeds and images {format_interval(comparison.over_images['AP'])}."


def _figures(design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]) -> Section:
    by_name = {each.variant: each for each in comparisons}
    rows = []
    for name in [design.study.baseline, *design.compared]:
        if not results[name]:
            continue
        row = [name, str(len(results[name])), *(_mean(results[name], metric) for metric in METRICS)]
        verdict = "baseline" if name == design.study.baseline else "-"
        rows.append([*row, by_name[name].verdict if name in by_name else verdict])
    text = (
        "COCO's AP of the last weights, in percent: mean and standard deviation over seeds. The verdict is on AP, by "
        "the paired t test (adjusted by Holm for all but the declared comparison).",
    )
    return Section("AP", text, (["variant", "seeds", *METRICS, "verdict"], rows))


def _differences(design: Design, comparisons: list[Comparison]) -> Section:
    rows = [
        [
            each.variant,
            metric,
            f"{paired.mean:+.2f}",
            format_interval(paired.interval),
            format_p(each.p if metric == "AP" else paired.p_t),
            format_p(paired.p_sign_flip),
            format_interval(each.over_images.get(metric)),
        ]
        for each in comparisons
        for metric, paired in each.paired.items()
    ]
    text = (
        f"To {design.study.baseline}, in points, paired by seed. AP alone was declared: p of the others is not "
        "adjusted, and no verdict follows from it. The last interval is a bootstrap over seeds and images together: it "
        "includes what other images of the same kind would change, and is too narrow where few seeds differ by much. "
        "The verdict is that of the t test.",
    )
    header = ["variant", "figure", "difference", "95% interval", "p (paired t)", "p (sign flip)"]
    return Section("Differences", text, ([*header, "interval over seeds and images"], rows))


def _cost(results: dict[str, dict[int, Result]]) -> Section:
    rows = []
    for name, of_seeds in results.items():
        seconds = [each.seconds for each in of_seeds.values() if each.seconds is not None]
        if of_seeds:
            row = next(iter(of_seeds.values())).row
            minutes = f"{plain.fmean(seconds) / 60:.1f}" if seconds else "-"
            rows.append([name, f"{row['params'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}", minutes])
    text = (
        "Multiply-adds are of the backbone with its feature pyramid, for one square image of the shorter side. Minutes "
        "of a cell change with other work on the machine.",
    )
    return Section("Cost", text, (["variant", "parameters (M)", "multiply-adds (G)", "minutes a cell"], rows))


def _protocol(design: Design, results: dict[str, dict[int, Result]]) -> Section:
    row = next(each.row for of_seeds in results.values() for each in of_seeds.values())
    recipe, versions = design.recipes[design.study.baseline], row["environment"]
    fragments = design.study.variants.items()
    variants = [f"{name}: {json.dumps(keys) if keys else 'the base recipe'}" for name, keys in fragments]
    text = (
        f"Base recipe {design.study.base}: {row['detector']}, {recipe.train.epochs} epochs, batch "
        f"{recipe.data.batch_size}, learning rate {recipe.optim.lr:g}, shorter side {recipe.data.size} pixels; "
        f"evaluated on {row['images']:,} images. Variants: {'; '.join(variants)}.",
        f"Hardware: {versions['hardware']}. torch {versions['torch']}, torchvision {versions['torchvision']}.",
        "What such a study shows holds for this data, size, budget and recipe.",
    )
    return Section("Protocol", text)


def to_csv(results: dict[str, dict[int, Result]], comparisons: list[Comparison]) -> str:
    """One line for each variant and figure, a number in each column, full precision."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    columns = ["variant", "figure", "seeds", "mean", "deviation", "difference", "interval_low", "interval_high", "p_t"]
    lines.writerow([*columns, "p_sign_flip", "bootstrap_low", "bootstrap_high", "verdict"])
    by_name = {each.variant: each for each in comparisons}
    for name, of_seeds in results.items():
        for metric in METRICS if of_seeds else ():
            values = [each.row[metric] for each in of_seeds.values()]
            if None in values:
                continue
            line = [name, metric, len(values), plain.fmean(values), plain.stdev(values) if len(values) > 1 else None]
            if (each := by_name.get(name)) is not None:
                paired, over_images = each.paired[metric], each.over_images.get(metric)
                line += [paired.mean, *(paired.interval or (None, None)), paired.p_t, paired.p_sign_flip]
                line += [*(over_images or (None, None)), each.verdict if metric == "AP" else None]
            lines.writerow(["" if value is None else value for value in line])
    return buffer.getvalue()


def _mean(of_seeds: dict[int, Result], metric: str) -> str:
    values = [each.row[metric] for each in of_seeds.values()]
    if None in values:
        return "-"
    return f"{plain.fmean(values):.2f}" + (f" ± {plain.stdev(values):.2f}" if len(values) > 1 else "")

"""The report of a study: report.md, report.html (self-contained), report.csv, and the figures as SVG files."""

import csv
import io
import json
import statistics as plain
from pathlib import Path
from typing import Any

import numpy as np

from lip_resnet.config import InputError
from lip_resnet.files import write_text
from lip_resnet.study import detection, statistics
from lip_resnet.study.cells import read_record
from lip_resnet.study.design import CONFIRMATORY_SEEDS, Design
from lip_resnet.study.pages import Section, format_interval, to_html, to_markdown
from lip_resnet.study.probes import robustness_section
from lip_resnet.study.results import Comparison, Result, compare, load_results, right
from lip_resnet.study.statistics import Paired


def write_report(design: Design) -> list[str]:
    """Write the report of the cells that are finished into the study's folder; returns lines for the terminal.

    Raises:
        InputError: no cell is finished, cells are not comparable, matplotlib is not installed, or a file cannot be
            written.
    """
    if design.detection:
        return detection.write_report(design)
    results = load_results(design)
    comparisons = compare(design, results)
    sections = build_sections(design, results, comparisons)
    folder = design.folder
    try:
        (folder / "figures").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot write there: {error.strerror}") from error
    for section in sections:
        if section.figure:
            write_text(folder / "figures" / f"{section.figure[0]}.svg", section.figure[2])
    write_text(folder / "report.md", to_markdown(sections))
    write_text(folder / "report.html", to_html(sections))
    write_text(folder / "report.csv", to_csv(design, results, comparisons))
    return [*sections[0].text, *(str(folder / name) for name in ("report.md", "report.html", "report.csv"))]


def build_sections(
    design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]
) -> list[Section]:
    """The report's content, in order; the verdict first."""
    try:
        from lip_resnet.study import figures
    except ImportError as error:
        raise InputError('a report needs the package matplotlib: pip install "lip-resnet[study]"') from error
    study = design.study
    title = f"{design.folder.name}: {study.primary} against {study.baseline}"
    sections = [
        Section(title, tuple(_verdict(design, comparisons))),
        Section("Accuracy", _accuracy_notes(comparisons), _accuracy_table(design, results, comparisons)),
    ]
    if comparisons:
        sections.append(_tests(design, comparisons))
        figure = figures.differences(comparisons, study.baseline)
        sections.append(
            Section(
                "Differences", figure=("differences", f"Top-1 difference of each variant to {study.baseline}", figure)
            )
        )
    done = {name: of_seeds for name, of_seeds in results.items() if of_seeds}
    points = {name: (_macs(of_seeds), *_mean_deviation(of_seeds)) for name, of_seeds in done.items()}
    sections.append(
        Section(
            "Cost",
            (
                "Multiply-adds are of one image. Training images/s are the median of the training log; other work on "
                "the machine changes them. Times beside the baseline's are measured in turn by study.py measure.",
            ),
            _cost_table(design, done),
            (
                "accuracy_against_cost",
                "Top-1 over multiply-adds, with the Pareto front",
                figures.accuracy_against_cost(points, "multiply-adds of one image (G)"),
            ),
        )
    )
    if any(len(result.curve) > 1 for of_seeds in done.values() for result in of_seeds.values()):
        curves = figures.learning_curves(done)
        sections.append(Section("Learning curves", figure=("learning_curves", "Validation top-1 over epochs", curves)))
    if (robustness := robustness_section(design, results)) is not None:
        sections.append(robustness)
    if comparisons:
        sections.append(_classes(design, results, comparisons[0]))
        sections.append(_one_by_one(comparisons))
    sections.append(_protocol(design, results))
    return sections


def _verdict(design: Design, comparisons: list[Comparison]) -> list[str]:
    """The declared comparison in words, and what it is based on."""
    study, cells = design.study, design.cells()
    finished, failed = sum(cell.finished for cell in cells), _failed(design)
    lines = []
    declared = next((each for each in comparisons if each.variant == study.primary), None)
    if declared is None:
        lines.append(f"**No verdict yet**: no seed of both {study.primary} and {study.baseline} is finished.")
    else:
        lines.append(sentence(declared, study.baseline))
    fewest = min((len(each.seeds) for each in comparisons), default=0)
    if fewest < CONFIRMATORY_SEEDS:
        lines.append(
            f"**Exploratory**: fewer than {CONFIRMATORY_SEEDS} seeds. A difference of this kind is a reason to run "
            "more seeds, not a result."
        )
    if finished < len(cells):
        lines.append(
            f"**Not complete**: {finished} of {len(cells)} cells are finished; the table shows how many of each."
        )
    if failed:
        lines.append(f"**Failed cells**: {'; '.join(failed)}.")
    return lines


def sentence(comparison: Comparison, baseline: str) -> str:
    """A comparison as one sentence: verdict, difference, interval and tests."""
    paired, seeds = comparison.paired, len(comparison.seeds)
    words = {
        "better": f"{comparison.variant} is better than {baseline}",
        "worse": f"{comparison.variant} is worse than {baseline}",
        "not distinguishable": f"{comparison.variant} and {baseline} are not distinguishable",
    }.get(comparison.verdict, f"{comparison.variant} against {baseline}: too few seeds to say")
    text = f"**{words}**: {paired.mean:+.2f} points top-1"
    if paired.interval is None or paired.p_t is None:
        return f"{text}, one seed."
    text += f", 95% interval {paired.interval[0]:+.2f} to {paired.interval[1]:+.2f} (paired t over {seeds} seeds, "
    text += f"p = {_p(paired.p_t)}"
    text += ")." if paired.p_sign_flip is None else f"; exact sign-flip test p = {_p(paired.p_sign_flip)})."
    if _disagree(paired):
        least = statistics.smallest_sign_flip(seeds)
        text += f" The two tests disagree; the sign-flip test cannot go below {_p(least)} with {seeds} seeds."
    return text


def _disagree(paired: Paired) -> bool:
    """Whether one of the two tests rejects at 5% and the other does not."""
    if paired.p_t is None or paired.p_sign_flip is None:
        return False
    return (paired.p_t < statistics.ALPHA) != (paired.p_sign_flip < statistics.ALPHA)


def _failed(design: Design) -> list[str]:
    records = [(cell, read_record(cell)) for cell in design.cells() if not cell.finished]
    return [f"{cell}: {record['message']}" for cell, record in records if record.get("status") == "failed"]


def _accuracy_notes(comparisons: list[Comparison]) -> tuple[str, ...]:
    notes = [
        "Top-1 of the last weights: mean and standard deviation over seeds. Differences to the baseline are paired by "
        "seed, with 95% intervals by the paired t test."
    ]
    disagree = [each.variant for each in comparisons if _disagree(each.paired)]
    if disagree:
        notes.append(f"The t test and the sign-flip test disagree at 5% for {', '.join(disagree)}.")
    return tuple(notes)


def _accuracy_table(
    design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]
) -> tuple[list[str], list[list[str]]]:
    header = ["variant", "seeds", "top-1 (%)", "difference", "95% interval", "p", "verdict"]
    rows = []
    by_name = {each.variant: each for each in comparisons}
    for name in [design.study.baseline, *design.compared]:
        if not results[name]:
            continue
        mean, deviation = _mean_deviation(results[name])
        row = [name, str(len(results[name])), f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")]
        each = by_name.get(name)
        if each is None:
            row += ["-"] * 3 + ["baseline" if name == design.study.baseline else "-"]
        else:
            row += [f"{each.paired.mean:+.2f}", format_interval(each.paired.interval), _p(each.p), each.verdict]
        rows.append(row)
    return header, rows


def _tests(design: Design, comparisons: list[Comparison]) -> Section:
    """Every test of a comparison, and the interval that includes the choice of the images."""
    family = sum(each.variant != design.study.primary for each in comparisons)
    text = (
        f"{design.study.primary} is the declared comparison, tested by itself; the others are a family of {family}, "
        "whose p values are adjusted by Holm. The sign-flip test is exact and assumes no distribution, but has few "
        "values. The last interval is a bootstrap over seeds and images together: it includes what other images of the "
        "same kind would change."
    )
    header = ["variant", "p (paired t)", "p (Holm)", "p (sign flip)", "interval over seeds and images"]
    rows = [
        [
            each.variant,
            _p(each.paired.p_t),
            "declared" if each.variant == design.study.primary else _p(each.p),
            _p(each.paired.p_sign_flip),
            format_interval(each.bootstrap),
        ]
        for each in comparisons
    ]
    return Section("Tests", (text,), (header, rows))


def _cost_table(design: Design, done: dict[str, dict[int, Result]]) -> tuple[list[str], list[list[str]]]:
    """Sizes, the speed in the training log, and the times of costs.json, if ``study.py measure`` has written it."""
    header = ["variant", "parameters (M)", "multiply-adds (G)", "training images/s", "minutes a cell"]
    path = design.folder / "costs.json"
    costs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kinds = [kind for kind in ("training", "inference") if kind in costs]
    header += [f"{kind} time / baseline" for kind in kinds]
    rows = []
    for name, of_seeds in done.items():
        first = next(iter(of_seeds.values()))
        speeds = [result.images_per_second for result in of_seeds.values() if result.images_per_second]
        seconds = [result.seconds for result in of_seeds.values() if result.seconds]
        rows.append(
            [
                name,
                f"{first.row['params'] / 1e6:.2f}",
                f"{_macs(of_seeds):.3f}",
                f"{plain.median(speeds):.0f}" if speeds else "-",
                f"{plain.fmean(seconds) / 60:.1f}" if seconds else "-",
                # a variant that was added after the measurement has no times
                *(f"{costs[kind][name]['ratio']:.2f}" if name in costs[kind] else "-" for kind in kinds),
            ]
        )
    return header, rows


def _classes(design: Design, results: dict[str, dict[int, Result]], comparison: Comparison) -> Section:
    """Accuracy by class of the first comparison."""
    from lip_resnet.study import figures

    baseline, variant = results[design.study.baseline], results[comparison.variant]
    labels = next(iter(variant.values())).predictions.label
    gain = (right(variant, comparison.seeds).mean(0) - right(baseline, comparison.seeds).mean(0)) * 100
    present = np.unique(labels)
    by_class = [float(gain[labels == label].mean()) for label in present]
    names = _class_names(next(iter(variant.values())), present)
    order = np.argsort(by_class)
    text = "Most gained: " + ", ".join(f"{names[index]} {by_class[index]:+.1f}" for index in order[::-1][:5])
    text += "; most lost: " + ", ".join(f"{names[index]} {by_class[index]:+.1f}" for index in order[:5])
    text += (
        f" (points, mean over {len(comparison.seeds)} seeds). Single classes are few images: no test is made of them."
    )
    figure = figures.classes(names, by_class, comparison.variant, design.study.baseline)
    alternative = f"Difference in accuracy of {comparison.variant} and {design.study.baseline} by class"
    return Section("Classes", (text,), figure=("classes", alternative, figure))


def _class_names(result: Result, labels: np.ndarray) -> list[str]:
    """The folder of a class's first image, where images lie in class folders; else its number."""
    predictions = result.predictions
    first = {label: int(np.argmax(predictions.label == label)) for label in labels}
    folders = {label: Path(predictions.images[index]).parts for label, index in first.items()}
    if all(len(parts) > 1 for parts in folders.values()) and len({parts[0] for parts in folders.values()}) == len(
        labels
    ):
        return [folders[label][0] for label in labels]
    return [str(label) for label in labels]


def _one_by_one(comparisons: list[Comparison]) -> Section:
    """McNemar's test of every pair of runs."""
    rows = [
        [each.variant, str(seed), f"{difference:+.2f}", str(ours), str(theirs), _p(p)]
        for each in comparisons
        for seed, difference, (ours, theirs, p) in zip(each.seeds, each.paired.differences, each.mcnemar, strict=True)
    ]
    text = (
        "McNemar's exact test of one pair of runs asks whether these two runs differ on other images. It says nothing "
        "of another training: it is a detail, never the verdict."
    )
    header = ["variant", "seed", "difference", "only it is right", "only the baseline", "p (McNemar)"]
    return Section("Seed by seed", (text,), (header, rows))


def _protocol(design: Design, results: dict[str, dict[int, Result]]) -> Section:
    """What was run, and on what."""
    first = next(result for of_seeds in results.values() for result in of_seeds.values())
    row, recipe = first.row, design.recipes[design.study.baseline]
    machines = sorted({result.row["environment"]["hardware"] for each in results.values() for result in each.values()})
    versions = row["environment"]
    variants = [
        f"{name}: {json.dumps(fragment) if fragment else 'the base recipe'}"
        for name, fragment in design.study.variants.items()
    ]
    text = (
        f"Base recipe {design.study.base}: {recipe.train.epochs} epochs, batch {recipe.data.batch_size}, "
        f"{recipe.optim.name} with learning rate {recipe.optim.lr:g}, {recipe.data.size} pixels, "
        f"{recipe.train.precision}; evaluated on {row['images']:,} images. Variants: {'; '.join(variants)}.",
        f"Hardware: {'; '.join(machines)}. torch {versions['torch']}, timm {versions['timm']}.",
        "Seeds are paired: runs of one seed share the order of the images and their augmentation. What such a study "
        "shows holds for this data, size, budget and recipe.",
    )
    return Section("Protocol", text)


def _macs(of_seeds: dict[int, Result]) -> float:
    return next(iter(of_seeds.values())).row["macs"] / 1e9


def _mean_deviation(of_seeds: dict[int, Result]) -> tuple[float, float | None]:
    values = [result.row["top1"] for result in of_seeds.values()]
    return plain.fmean(values), plain.stdev(values) if len(values) > 1 else None


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<.0001" if value < 1e-4 else f"{value:.4f}".lstrip("0") if value < 1 else "1"


def to_csv(design: Design, results: dict[str, dict[int, Result]], comparisons: list[Comparison]) -> str:
    """One line for each variant, a number in each column, full precision."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    columns = ["variant", "seeds", "top1_mean", "top1_deviation", "difference", "interval_low", "interval_high", "p_t"]
    columns += ["p_decides", "p_sign_flip", "bootstrap_low", "bootstrap_high", "verdict", "params", "macs"]
    lines.writerow(columns)
    by_name = {each.variant: each for each in comparisons}
    for name, of_seeds in results.items():
        if not of_seeds:
            continue
        row = next(iter(of_seeds.values())).row
        values: list[Any] = [name, len(of_seeds), *_mean_deviation(of_seeds)]
        each = by_name.get(name)
        if each is None:
            values += [None] * 8 + ["baseline" if name == design.study.baseline else None]
        else:
            low, high = each.paired.interval or (None, None)
            bootstrap = each.bootstrap or (None, None)
            values += [each.paired.mean, low, high, each.paired.p_t, each.p, each.paired.p_sign_flip, *bootstrap]
            values.append(each.verdict)
        lines.writerow(["" if value is None else value for value in [*values, row["params"], row["macs"]]])
    return buffer.getvalue()

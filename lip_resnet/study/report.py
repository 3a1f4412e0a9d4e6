"""The report of a study: report.md, report.html (self-contained), report.csv, and the figures as SVG files."""

import csv
import io
import json
import statistics as plain
from typing import Any

from lip_resnet.config import InputError
from lip_resnet.files import write_text
from lip_resnet.study import costs, detection, statistics
from lip_resnet.study.costs import Results
from lip_resnet.study.design import Design
from lip_resnet.study.details import classes_section, seeds_section
from lip_resnet.study.pages import Section, equals_p, format_interval, format_p, in_words, to_html, to_markdown
from lip_resnet.study.probes import robustness_section
from lip_resnet.study.results import Comparison, Result, compare, describe_verdict, load_failed, load_results


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
        for name, _, svg in section.figures:
            write_text(folder / "figures" / f"{name}.svg", svg)
    write_text(folder / "report.md", to_markdown(sections))
    write_text(folder / "report.html", to_html(sections))
    write_text(folder / "report.csv", to_csv(design, results, comparisons))
    notes = [line for section in sections if section.title == "Differences" for line in section.text]
    return [*sections[0].text, *notes, *(str(folder / name) for name in ("report.md", "report.html", "report.csv"))]


def build_sections(design: Design, results: Results, comparisons: list[Comparison]) -> list[Section]:
    """The report's content, in order; the verdict first."""
    try:
        import lip_resnet.study.figures  # noqa: F401
    except ImportError as error:
        raise InputError('a report needs the package matplotlib: pip install "lip-resnet[study]"') from error
    study = design.study
    title = f"{design.folder.name}: {study.primary} against {study.baseline}"
    sections = [
        Section(title, tuple(verdict_lines(design, results, comparisons))),
        Section("Accuracy", _accuracy_notes(comparisons), accuracy_table(design, results, comparisons)),
    ]
    if comparisons:
        sections += [_tests(design, comparisons), _differences(design, comparisons)]
    sections.append(
        Section(
            "Cost",
            costs.cost_notes(design),
            costs.cost_table(design, results),
            tuple(draw_costs(design, results)),
        )
    )
    if (equal := costs.equal_costs(design, results)) is not None:
        sections.append(equal)
    if curves := draw_curves(design, results):
        sections.append(Section("Learning curves", figures=tuple(curves)))
    if (robustness := robustness_section(design, results)) is not None:
        sections.append(robustness)
    if comparisons:
        sections += [classes_section(design, results, comparisons[0]), seeds_section(comparisons)]
    sections.append(_protocol(design, results))
    return sections


def draw_costs(design: Design, results: Results) -> list[tuple[str, str, str]]:
    """Accuracy against each measure that several variants have: file name, alternative text, SVG."""
    from lip_resnet.study import figures

    axes = {
        "multiply-adds": ("accuracy_against_cost", "multiply-adds of one image (G)"),
        "inference": ("accuracy_against_latency", "inference time (ms an image)"),
        "training": ("accuracy_against_training", "time of a whole training (minutes at the measured step)"),
    }
    drawn = []
    for measure, of_variants in costs.measures(design, results).items():
        if len(of_variants) < 2 and measure != "multiply-adds":
            continue
        name, label = axes[measure]
        points = {each: (cost, *mean_deviation(results[each])) for each, cost in of_variants.items()}
        alternative = f"Top-1 over {label}, with the Pareto front"
        drawn.append((name, alternative, figures.accuracy_against_cost(points, label)))
    return drawn


def draw_curves(design: Design, results: Results) -> list[tuple[str, str, str]]:
    """Learning curves over epochs and over minutes; none where no cell has two validations."""
    from lip_resnet.study import figures

    done = {name: of_seeds for name, of_seeds in results.items() if of_seeds}
    if not any(len(result.curve) > 1 for of_seeds in done.values() for result in of_seeds.values()):
        return []
    minutes, how = costs.measures(design, results)["training"], "at the measured time of a step"
    if not minutes.keys() >= done.keys():
        minutes, how = {}, "by the training log"
    label = f"minutes of training ({how})"
    return [
        ("learning_curves", "Validation top-1 over epochs", figures.learning_curves(done)),
        (
            "learning_curves_minutes",
            f"Validation top-1 over {label}",
            figures.learning_curves(done, label, minutes),
        ),
    ]


def verdict_lines(design: Design, results: Results, comparisons: list[Comparison]) -> list[str]:
    """``describe_verdict`` of a study."""
    declared = next((each for each in comparisons if each.variant == design.study.primary), None)
    text = None if declared is None else sentence(declared, design.study.baseline)
    seeds = {each.variant: len(each.seeds) for each in comparisons}
    return describe_verdict(design, text, seeds, sum(map(len, results.values())), load_failed(design))


def sentence(comparison: Comparison, baseline: str) -> str:
    """A comparison as one sentence: verdict, difference, interval and tests."""
    paired, seeds = comparison.paired, len(comparison.seeds)
    text = f"{in_words(comparison.verdict, comparison.variant, baseline)}: {paired.mean:+.2f} points top-1"
    if paired.p_t is None:
        return f"{text}, one seed."
    if paired.interval is None:
        return f"{text} in each of {seeds} seeds, so no interval (sign-flip test p {equals_p(paired.p_t)})."
    text += f", 95% interval {paired.interval[0]:+.2f} to {paired.interval[1]:+.2f} (paired t over {seeds} seeds, "
    text += f"p {equals_p(paired.p_t)}"
    text += ")." if paired.p_sign_flip is None else f"; exact sign-flip test p {equals_p(paired.p_sign_flip)})."
    if _disagree(comparison):
        least = statistics.smallest_sign_flip(seeds)
        text += f" The two tests disagree; the sign-flip test cannot go below {format_p(least)} with {seeds} seeds."
    if comparison.verdict == "not distinguishable" and paired.deviation:
        shown = statistics.detectable_difference(paired.deviation, seeds)
        text += f" So many seeds show a true difference of {shown:.1f} points with 80% power."
    return text


def _disagree(comparison: Comparison) -> bool:
    """Whether one of the two tests rejects at 5% and the other does not, each adjusted for a family."""
    if comparison.p is None or comparison.p_sign_flip is None:
        return False
    return (comparison.p < statistics.ALPHA) != (comparison.p_sign_flip < statistics.ALPHA)


def _accuracy_notes(comparisons: list[Comparison]) -> tuple[str, ...]:
    notes = [
        "Top-1 of the last weights: mean and standard deviation over seeds. Differences to the baseline are paired by "
        "seed, with 95% intervals by the paired t test."
    ]
    if disagree := [each for each in comparisons if _disagree(each)]:
        names = ", ".join(f"{each.variant} ({format_p(each.p)} and {format_p(each.p_sign_flip)})" for each in disagree)
        notes.append(f"The t test, which decides, and the sign-flip test disagree at 5% for {names}.")
    return tuple(notes)


def accuracy_table(
    design: Design, results: Results, comparisons: list[Comparison]
) -> tuple[list[str], list[list[str]]]:
    """Every variant with its difference to the baseline and the verdict: header and rows."""
    header = ["variant", "seeds", "top-1 (%)", "difference", "95% interval", "p", "verdict"]
    rows = []
    by_name = {each.variant: each for each in comparisons}
    for name in [design.study.baseline, *design.compared]:
        if not results[name]:
            continue
        mean, deviation = mean_deviation(results[name])
        row = [name, str(len(results[name])), f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")]
        each = by_name.get(name)
        if each is None:
            row += ["-"] * 3 + ["baseline" if name == design.study.baseline else "-"]
        else:
            row += [f"{each.paired.mean:+.2f}", format_interval(each.paired.interval), format_p(each.p), each.verdict]
        rows.append(row)
    return header, rows


def _tests(design: Design, comparisons: list[Comparison]) -> Section:
    """Every test of a comparison, and the interval that includes the choice of the images."""
    family = sum(each.variant != design.study.primary for each in comparisons)
    text = [
        f"{design.study.primary} is the declared comparison, tested by itself; the others are a family of {family}, "
        "whose p values are adjusted by Holm. The sign-flip test is exact and assumes no distribution, but has few "
        "values. The last interval is a bootstrap over seeds and images together: it includes what other images of the "
        "same kind would change.",
    ]
    if counts := sorted({len(each.seeds) for each in comparisons} & statistics.BOOTSTRAP_COVERAGE.keys()):
        held = ", ".join(f"{statistics.BOOTSTRAP_COVERAGE[count]:.1f}% with {count} seeds" for count in counts)
        text.append(
            f"In a simulation of 1,000 studies (docs/studies.md) the bootstrap's interval held the truth in {held}; "
            "95% is meant."
        )
    header = ["variant", "p (paired t)", "p (t, Holm)", "p (sign flip)", "p (sign flip, Holm)"]
    header += ["interval over seeds and images"]
    rows = []
    for each in comparisons:
        declared = each.variant == design.study.primary
        rows.append(
            [
                each.variant,
                format_p(each.paired.p_t),
                "declared" if declared else format_p(each.p),
                format_p(each.paired.p_sign_flip),
                "declared" if declared else format_p(each.p_sign_flip),
                format_interval(each.bootstrap),
            ]
        )
    return Section("Tests", tuple(text), (header, rows))


def _differences(design: Design, comparisons: list[Comparison]) -> Section:
    """The figure of differences and intervals, or one line where there is no interval to draw."""
    from lip_resnet.study import figures

    baseline = design.study.baseline
    if all(len(each.seeds) < 2 for each in comparisons):
        line = f"No figure of differences: intervals need two finished seeds of {baseline} and a variant, there is one."
        return Section("Differences", (line,))
    alternative = f"Top-1 difference of each variant to {baseline}"
    return Section("Differences", figures=(("differences", alternative, figures.differences(comparisons, baseline)),))


def _protocol(design: Design, results: Results) -> Section:
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


def mean_deviation(of_seeds: dict[int, Result]) -> tuple[float, float | None]:
    """Mean and standard deviation of top-1 over seeds; no deviation of one."""
    values = [result.row["top1"] for result in of_seeds.values()]
    return plain.fmean(values), plain.stdev(values) if len(values) > 1 else None


def to_csv(design: Design, results: Results, comparisons: list[Comparison]) -> str:
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
        values: list[Any] = [name, len(of_seeds), *mean_deviation(of_seeds)]
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

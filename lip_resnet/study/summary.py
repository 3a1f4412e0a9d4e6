"""The page of results: every exported study in short, and the shipped studies that have no result yet."""

import re
from collections.abc import Sequence
from pathlib import Path

from lip_resnet.evaluation.render import render
from lip_resnet.study import costs, detection, statistics
from lip_resnet.study.design import CONFIRMATORY_SEEDS, Design, load_design, load_record
from lip_resnet.study.pages import Section, to_markdown
from lip_resnet.study.probes import robustness_section
from lip_resnet.study.report import accuracy_table, draw_costs, draw_curves, mean_deviation, verdict_lines
from lip_resnet.study.results import Comparison, compare, load_results


def results_page(folders: Sequence[Path], studies: Sequence[Path], figures: str) -> str:
    """Markdown: a section for each exported study, then a table of the studies without results.

    Args:
        folders: exported studies.
        studies: shipped study files; one is named as its export.
        figures: where the page has its figures, as ``draw_figures`` names them.
    """
    designs = {path.stem: load_design(path) for path in studies}
    parts = [_study(folder, designs.get(folder.name), figures) for folder in folders]
    names = {folder.name for folder in folders}
    planned = [
        f"- `{name}` ({len(design.cells())} cells): {design.study.question}"
        for name, design in designs.items()
        if name not in names
    ]
    return "\n".join([*parts, "## Planned", "", "No cell of these has been run.", "", *planned])


def draw_figures(folder: Path) -> dict[str, str]:
    """File name -> SVG, of an exported study."""
    design = load_record(folder)
    if design.detection:
        return {}
    results = load_results(design)
    drawn = [*draw_costs(design, results), *draw_curves(design, results)]
    return {f"{folder.name}-{name}.svg": svg for name, _, svg in drawn}


def small_table(folder: Path) -> str:
    """The state of an exported study in a line, and a table of it."""
    design = load_record(folder)
    results = load_results(design)
    comparisons = {each.variant: each for each in compare(design, results)}
    of_measure, baseline = costs.measures(design, results), design.study.baseline
    rows = []
    for name in [baseline, *design.compared]:
        if not results[name]:
            continue
        mean, deviation = mean_deviation(results[name])
        paired = comparisons[name].paired if name in comparisons else None
        rows.append(
            [
                f"`{name}`",
                f"{of_measure['multiply-adds'][name]:.3f}",
                costs.relative(of_measure["training"], name, baseline),
                f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}"),
                "-" if paired is None else f"{paired.mean:+.1f}",
                "-" if paired is None or paired.interval is None else "{:+.1f} to {:+.1f}".format(*paired.interval),
                str(len(results[name])),
            ]
        )
    header = ["network", "MACs (G)", "training time", "top-1 (%)", "difference", "95% interval", "seeds"]
    return f"{_state(design, sum(map(len, results.values())), list(comparisons.values()))}\n\n{render(header, rows)}"


def _state(design: Design, finished: int, comparisons: list[Comparison]) -> str:
    """How far a study is, and whether it is exploratory."""
    text = f"{finished} of {len(design.cells())} cells finished"
    fewest = min((len(each.seeds) for each in comparisons), default=0)
    if fewest < CONFIRMATORY_SEEDS:
        text += f"; **exploratory**, {fewest} seed{'s' * (fewest != 1)}"
    return text + "."


def _study(folder: Path, shipped: Design | None, figures: str) -> str:
    """The section of one study."""
    design = load_record(folder)
    if design.detection:
        return _detectors(design, shipped)
    results = load_results(design)
    comparisons = compare(design, results)
    done = [result for of_seeds in results.values() for result in of_seeds.values()]
    recipe, row = design.recipes[design.study.baseline], done[0].row
    question = design.study.question or (shipped.study.question if shipped else "")
    hours = sum(result.seconds or 0 for result in done) / 3600
    environment = row["environment"]
    machines = sorted({result.row["environment"]["hardware"] for result in done})
    lines = [f"## {folder.name}", "", *([question, ""] if question else [])]
    for line in verdict_lines(design, results, comparisons):
        lines += [line, ""] if line != question else []
    lines += [render(*accuracy_table(design, results, comparisons)), *costs.cost_notes(design), ""]
    lines += [render(*costs.cost_table(design, results))]
    if (equal := costs.equal_costs(design, results)) and equal.table:
        lines += [*equal.text, "", render(*equal.table)]
    if (robustness := robustness_section(design, results)) and robustness.table:
        lines += [*robustness.text, "", render(*robustness.table)]
    for name, alternative, _ in [*draw_costs(design, results), *draw_curves(design, results)]:
        lines += [f"![{alternative}]({figures}/{folder.name}-{name}.svg)", ""]
    lines += [
        f"- **Protocol**: {design.study.base}, {recipe.train.epochs} epochs, batch {recipe.data.batch_size}, "
        f"{recipe.optim.name} with learning rate {recipe.optim.lr:g}, {recipe.data.size} pixels, "
        f"{recipe.train.precision}; evaluated on {row['images']:,} images.",
        f"- **Hardware**: {'; '.join(machines)}; torch {environment['torch']}, timm {environment['timm']}.",
        f"- **Cost**: {hours:.1f} hours of cells, summed; cells that ran side by side slowed each other.",
        f"- **What it can show**: {_limits(comparisons, row['images'])}",
        _command(folder.name, shipped),
        "",
    ]
    return "\n".join(lines)


def _detectors(design: Design, shipped: Design | None) -> str:
    """The section of a study of detectors."""
    name, results = design.folder.name, detection.load_results(design)
    verdict, *others = detection.make_sections(design, results, detection.compare(design, results))
    question = design.study.question or (shipped.study.question if shipped else "")
    first = Section(name, tuple(dict.fromkeys([*([question] if question else []), *verdict.text])))
    text = re.sub("^#", "##", to_markdown([first, *others]), flags=re.MULTILINE)
    return f"{text}\n{_command(name, shipped)}\n"


def _command(name: str, shipped: Design | None) -> str:
    run = f"`python scripts/study.py run configs/studies/{name}.yaml`" if shipped else "the study's own file"
    return f"- **Command**: {run}; the full report: `python scripts/study.py report results/studies/{name}`."


def _limits(comparisons: list[Comparison], images: int) -> str:
    """The differences that the seeds and images so far can show."""
    if not comparisons:
        return "nothing yet: no seed of the baseline and of another variant is finished."
    each = comparisons[0]
    disagreement = sum(ours + theirs for ours, theirs, _ in each.mcnemar) / len(each.mcnemar) / images
    error = 1.96 * statistics.deviation_of_images(disagreement, images)
    text = (
        f"{each.variant} and the baseline disagree about {disagreement:.0%} of the {images:,} images, so that other "
        f"images of the kind move the difference of two runs by up to {error:.1f} points (95%)"
    )
    if each.paired.deviation is None or each.paired.interval is None:
        return f"{text}. One seed has no interval, nor have equal differences."
    shown = statistics.detectable_difference(each.paired.deviation, len(each.seeds))
    return (
        f"{text}. With {len(each.seeds)} seeds, whose differences deviate by {each.paired.deviation:.2f} points, "
        f"the declared test shows a true difference of {shown:.1f} points with 80% power."
    )

"""Details of a study's report: the classes that a variant gains and loses, and McNemar's test seed by seed."""

from pathlib import Path

import numpy as np

from lip_resnet.study.costs import Results
from lip_resnet.study.design import Design
from lip_resnet.study.pages import Section, format_p
from lip_resnet.study.results import Comparison, Result, right

EXTREMES = 5
"""Classes shown at each end."""


def classes_section(design: Design, results: Results, comparison: Comparison) -> Section:
    """Accuracy by class of a comparison: the largest gains and losses with counts of images, and all as a figure."""
    from lip_resnet.study import figures

    variant, baseline, seeds = comparison.variant, design.study.baseline, comparison.seeds
    first = results[variant][seeds[0]]
    ours, theirs = (right(results[name], seeds) for name in (variant, baseline))
    present, images = np.unique(first.label, return_counts=True)
    counts = [
        (int(ours[:, first.label == label].sum()), int(theirs[:, first.label == label].sum())) for label in present
    ]
    of_class = images * len(seeds)
    gains = [100 * (one - other) / total for (one, other), total in zip(counts, of_class, strict=True)]
    names = _class_names(first, present)
    order = list(np.argsort(gains, kind="stable"))
    shown = [*order[: -EXTREMES - 1 : -1], *order[:EXTREMES][::-1]] if len(order) > 2 * EXTREMES else order[::-1]
    rows = [[names[i], str(images[i]), *map(str, counts[i][::-1]), f"{gains[i]:+.1f}"] for i in shown]
    text = (
        f"Classes with the largest gains and losses. Counts of correct images are sums over {len(seeds)} seed"
        f"{'s' * (len(seeds) > 1)}. Single classes are few images: no test is made of them."
    )
    header = ["class", "images", f"{baseline}: correct", f"{variant}: correct", "difference (points)"]
    figure = figures.classes(names, gains, variant, baseline)
    alternative = f"Difference in accuracy of {variant} and {baseline} by class"
    return Section("Classes", (text,), (header, rows), (("classes", alternative, figure),))


def _class_names(result: Result, labels: np.ndarray) -> list[str]:
    """The folder of a class's first image, where images lie in class folders; else its number."""
    parts = [Path(result.images[int(np.argmax(result.label == label))]).parts for label in labels]
    if all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) == len(labels):
        return [each[0] for each in parts]
    return [str(label) for label in labels]


def seeds_section(comparisons: list[Comparison]) -> Section:
    """McNemar's test of every pair of runs."""
    rows = [
        [each.variant, str(seed), f"{difference:+.2f}", str(ours), str(theirs), format_p(p)]
        for each in comparisons
        for seed, difference, (ours, theirs, p) in zip(each.seeds, each.paired.differences, each.mcnemar, strict=True)
    ]
    text = (
        "McNemar's exact test of one pair of runs asks whether these two runs differ on other images. It says nothing "
        "of another training: it is a detail, never the verdict."
    )
    header = ["variant", "seed", "difference", "only it is right", "only the baseline", "p (McNemar)"]
    return Section("Seed by seed", (text,), (header, rows))

"""COCO's average precision from matches, and its bootstrap over images, which matches nothing again.

AP is in percent: the mean over categories and IoU thresholds of precision at 101 values of recall.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lip_resnet.evaluation.matching import AREAS, THRESHOLDS, Matches

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""Average precision; at IoU 0.5 and 0.75; of small, medium and large objects."""
_RECALLS: NDArray[np.float64] = np.linspace(0, 1, 101)
_CHUNK = 64
"""Bootstrap samples that are computed at once."""


def precisions(matches: Matches, area: str = "all", weights: NDArray[np.int32] | None = None) -> NDArray[np.float64]:
    """(B, K, T): average precision in [0, 1] of each category and IoU threshold; NaN for one without objects.

    Args:
        area: a key of ``AREAS``.
        weights: (B, I): how often each image is in each of B resampled sets; None: one set, each image once.
    """
    if weights is None:
        weights = np.ones((1, len(matches.image_ids)), dtype=np.int32)
    size, labels = list(AREAS).index(area), np.arange(len(matches.category_ids) + 1)
    result = np.full((len(weights), len(matches.category_ids), len(THRESHOLDS)), np.nan)
    starts, object_starts = (np.searchsorted(each, labels) for each in (matches.detection_label, matches.object_label))
    for label in labels[:-1]:
        objects = slice(*object_starts[label : label + 2])
        image = matches.object_image[objects][matches.counted[objects, size]]
        if not len(image):
            continue
        total = weights[:, image].sum(axis=1, dtype=np.int32)
        rows = slice(*starts[label : label + 2])
        hit, ignored = matches.hit[rows, size], matches.ignored[rows, size]
        counts = ~ignored.all(axis=1)
        values = _of_category(hit[counts], ignored[counts], weights[:, matches.detection_image[rows][counts]], total)
        result[:, label] = np.where(total[:, None] > 0, values, np.nan)
    return result


def _of_category(
    hit: NDArray[np.bool_], ignored: NDArray[np.bool_], weights: NDArray[np.int32], total: NDArray[np.int32]
) -> NDArray[np.float64]:
    """(B, T): average precision.

    Precision is highest, and recall changes, where a detection is right: the others are only counted.

    Args:
        hit, ignored: (n, T), by falling score.
        weights: (B, n), of the detections' images.
        total: (B,), objects to find.
    """
    result = np.zeros((len(weights), len(THRESHOLDS)))
    running = np.cumsum(weights, axis=1, dtype=np.int32)
    for threshold in range(len(THRESHOLDS)):
        right = np.flatnonzero(hit[:, threshold] & ~ignored[:, threshold])
        if not len(right):
            continue
        seen, left_out = running[:, right], np.flatnonzero(ignored[:, threshold])
        if len(left_out):
            before = np.cumsum(weights[:, left_out], axis=1, dtype=np.int32)
            before = np.concatenate([np.zeros((len(weights), 1), dtype=np.int32), before], axis=1)
            seen = seen - before[:, np.searchsorted(left_out, right)]
        true = np.cumsum(weights[:, right], axis=1, dtype=np.int32)
        precision = true / (seen + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(_RECALLS, true / np.maximum(total, 1)[:, None], side="right")
        result[:, threshold] = (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(_RECALLS)
    return result


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, K, T) -> (B,) in percent; NaN where no category has objects."""
    known = ~np.isnan(values).all(axis=(1, 2))
    result = np.full(len(values), np.nan)
    result[known] = 100 * np.nanmean(values[known], axis=(1, 2))
    return result


def average_precision(matches: Matches) -> dict[str, float]:
    """``METRICS``, in percent; NaN where the set has no such objects."""
    of_all = precisions(matches)
    values = {"AP": of_all, "AP50": of_all[..., :1], "AP75": of_all[..., 5:6]}
    values |= {f"AP{area[0]}": precisions(matches, area) for area in ("small", "medium", "large")}
    return {name: float(_mean(each)[0]) for name, each in values.items()}


def bootstrap(
    runs: Sequence[Matches], metrics: Sequence[str] = ("AP", "APs"), samples: int = 1000, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Metric -> (runs, samples), in percent: of sets of as many images, drawn with replacement.

    All runs are of the same images, and have the same draws, so that their differences are paired.

    Args:
        metrics: AP, APs, APm or APl.
        seed: of the draws.

    Raises:
        ValueError: the runs are of different images.
    """
    images = len(runs[0].image_ids)
    if any(not np.array_equal(run.image_ids, runs[0].image_ids) for run in runs):
        raise ValueError("the runs are of different images")
    generator = np.random.default_rng(seed)
    areas = {"AP": "all"} | {f"AP{area[0]}": area for area in AREAS if area != "all"}
    parts: dict[str, list[NDArray[np.float64]]] = {metric: [] for metric in metrics}
    for start in range(0, samples, _CHUNK):
        drawn = generator.multinomial(images, np.full(images, 1 / images), size=min(_CHUNK, samples - start))
        for metric in metrics:
            parts[metric].append(
                np.stack([_mean(precisions(run, areas[metric], drawn.astype(np.int32))) for run in runs])
            )
    return {metric: np.concatenate(each, axis=1) for metric, each in parts.items()}


def interval(values: NDArray[np.float64], measured: float) -> tuple[float, float] | None:
    """The 95% bootstrap interval of a figure, or of a difference of two: its deviations around the measured value.

    AP of a resampled set is too high on average, as categories of few objects drop out and repeated images repeat their
    right detections; so the deviations are those from the mean of the samples.

    Args:
        values: (samples,), of ``bootstrap``.

    Returns:
        None where the figure, or all values, are NaN.
    """
    values = values[~np.isnan(values)]
    if not len(values) or np.isnan(measured):
        return None
    low, high = np.quantile(values - values.mean(), [0.025, 0.975])
    return measured + float(low), measured + float(high)

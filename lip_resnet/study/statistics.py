"""The statistics of a comparison: paired differences over seeds, their intervals and tests, and what a design can show.

Accuracies and differences are in percentage points. ``right`` arrays are (seeds, images) booleans: whether the run of a
seed is right about an image, with images and seeds in the same order for both networks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lip_resnet.errors import InputError

try:
    from scipy import optimize, stats
except ImportError as error:
    raise InputError('studies need the package scipy: pip install "lip-resnet[study]"') from error

ALPHA = 0.05
"""Level of every two-sided test; intervals cover 1 - ALPHA."""
BOOTSTRAP_COVERAGE = {2: 98.2, 3: 98.7, 4: 99.5, 5: 99.4, 6: 99.7}
"""Seeds -> percent of 1,000 simulated studies whose ``crossed_bootstrap`` interval holds the truth
(tests/study/test_statistics.py)."""
EXACT_SEEDS = 20
"""Up to this many seeds the sign-flip test visits all 2^n sign patterns."""


@dataclass(frozen=True)
class Paired:
    """The differences of two networks over paired seeds."""

    differences: tuple[float, ...]
    """One for each seed."""
    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    interval: tuple[float, float] | None
    """95% interval of the mean: paired t; None for one seed, and where all differences are equal."""
    p_t: float | None
    """Two-sided p of the paired t test; where all differences are equal, of the sign-flip test; None for one seed."""
    p_sign_flip: float | None
    """Two-sided p of the exact sign-flip permutation test; None for one seed, and for more than ``EXACT_SEEDS``."""


def compare_paired(differences: Sequence[float]) -> Paired:
    """Paired t interval and test, and the exact sign-flip test, of one difference for each seed (in points).

    Where all differences are equal, as two seeds on few images can be, the t statistic is not defined: there is no
    interval, and p is that of the sign-flip test.

    Raises:
        ValueError: no differences.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values):
        raise ValueError("no differences")
    mean = float(values.mean())
    if len(values) == 1:
        return Paired(tuple(values.tolist()), mean, None, None, None, None)
    p_sign_flip = sign_flip(values) if len(values) <= EXACT_SEEDS else None
    if np.ptp(values) <= 1e-9:  # but for the rounding of percentages
        p = 1.0 if abs(mean) <= 1e-9 else smallest_sign_flip(len(values))
        return Paired(tuple(values.tolist()), mean, 0.0, None, p, p_sign_flip)
    deviation = float(values.std(ddof=1))
    error = deviation / math.sqrt(len(values))
    half = float(stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * error
    p_t = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    return Paired(tuple(values.tolist()), mean, deviation, (mean - half, mean + half), p_t, p_sign_flip)


def sign_flip(differences: Sequence[float] | NDArray[np.floating]) -> float:
    """Two-sided p of the exact sign-flip test: the share of all sign patterns whose mean is as far from zero.

    Raises:
        ValueError: more than ``EXACT_SEEDS`` differences.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) > EXACT_SEEDS:
        raise ValueError(f"{len(values)} differences; the exact test is for at most {EXACT_SEEDS}")
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    # Percentages, and sums in another order, round differently: those within the rounding error count as equal.
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))


def smallest_sign_flip(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test can reach: 2 / 2^seeds."""
    return min(1.0, 2.0 / 2.0**seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of a family, in the given order. Source: Holm, Scand. J. Statistics 6 (1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mcnemar(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Exact McNemar test of one pair of runs on the same images (n,).

    It speaks of these two runs on other images of the same kind, not of training again.

    Returns:
        Images that only ours has right, that only theirs has right, and the two-sided p.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    discordant = only_ours + only_theirs
    p = float(stats.binomtest(only_ours, discordant).pvalue) if discordant else 1.0
    return only_ours, only_theirs, p


def crossed_bootstrap(
    ours: NDArray[np.bool_], theirs: NDArray[np.bool_], samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean difference, in points, resampling seeds and images independently.

    Args:
        ours, theirs: ``right`` arrays (seeds, images).
        samples: bootstrap samples.
        seed: of the resampling.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007).
    """
    difference = ours.astype(np.float32) - theirs.astype(np.float32)
    seeds, images = difference.shape
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(samples):
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds)).astype(np.float32)
        of_images = np.bincount(generator.integers(images, size=images), minlength=images).astype(np.float32)
        means.append(float(of_seeds @ difference @ of_images) / (seeds * images))
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return 100 * float(low), 100 * float(high)


def power(difference: float, deviation: float, seeds: int, level: float = ALPHA) -> float:
    """Probability that a paired t test at ``level`` shows a true ``difference``.

    Args:
        deviation: standard deviation of the paired differences, in the same unit.
    """
    if seeds < 2:
        return 0.0
    # The square of the noncentral t is a noncentral F of 1 and n - 1 degrees of freedom.
    critical = stats.t.ppf(1 - level / 2, seeds - 1) ** 2
    return float(stats.ncf.sf(critical, 1, seeds - 1, seeds * (difference / deviation) ** 2))


def detectable_difference(deviation: float, seeds: int, level: float = ALPHA, wanted: float = 0.8) -> float:
    """The smallest true difference that a paired t test at ``level`` shows with probability ``wanted``.

    In the unit of ``deviation``, the standard deviation of the paired differences; infinite for one seed.
    """
    if seeds < 2:
        return math.inf
    top = 1.0
    while power(top, 1.0, seeds, level) < wanted:
        top *= 2
    return deviation * float(optimize.brentq(lambda size: power(size, 1.0, seeds, level) - wanted, 1e-3, top))


def verdict(comparison: Paired, p: float | None) -> str:
    """A comparison in words: better, worse, not distinguishable, or too few seeds to say.

    Args:
        p: of the t test, adjusted by ``holm`` for one of a family; None for one seed.
    """
    if p is None:
        return "too few seeds to say"
    if p >= ALPHA:
        return "not distinguishable"
    return "better" if comparison.mean > 0 else "worse"


def deviation_of_images(disagreement: float, images: int) -> float:
    """Standard error, in points, that the choice of the images gives a difference of two runs.

    Args:
        disagreement: share of the images about which exactly one of the two is right.
    """
    return 100 * math.sqrt(disagreement / images)

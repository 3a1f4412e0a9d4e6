"""The statistics of studies against scipy's, closed forms, published examples and simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from lip_resnet.study import report, statistics
from lip_resnet.study.results import Comparison

DIFFERENCES = [8.1, 8.9, 7.6, 9.3, -0.4, 8.5]


def test_paired_t_is_scipys():
    paired = statistics.compare_paired(DIFFERENCES)
    theirs = stats.ttest_1samp(DIFFERENCES, 0.0)
    assert paired.p_t == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.95)
    assert paired.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert paired.mean == pytest.approx(np.mean(DIFFERENCES))


@pytest.mark.parametrize("values", [DIFFERENCES, [1.0, 1.0, 1.0], [0.3, -0.2, 0.1, 0.0, 0.4], [2.0, -2.0]])
def test_sign_flip_visits_every_pattern(values):
    expected = stats.permutation_test(
        (np.array(values),), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert statistics.sign_flip(values) == pytest.approx(expected, rel=1e-12)


def test_sign_flip_reaches_its_smallest_p():
    for seeds, smallest in ((3, 0.25), (5, 0.0625), (6, 0.03125)):
        assert statistics.sign_flip([1.0 + index for index in range(seeds)]) == smallest
        assert statistics.smallest_sign_flip(seeds) == smallest


def test_many_differences():
    """The exact test would visit 2^21 patterns: the others remain."""
    many = statistics.compare_paired([1.0 + index for index in range(statistics.EXACT_SEEDS + 1)])
    assert many.p_sign_flip is None
    assert many.p_t < 1e-6
    words = report.sentence(Comparison("lip", list(range(21)), many, many.p_t, None, None, [], "better"), "plain")
    assert words.endswith("(paired t over 21 seeds, p < .0001).")


def test_few_and_equal_differences():
    one = statistics.compare_paired([1.5])
    assert (one.mean, one.interval, one.p_t) == (1.5, None, None)
    assert statistics.verdict(one, one.p_t) == "too few seeds to say"
    assert statistics.compare_paired([2.0, 2.0, 2.0]).p_t == 0.0
    assert statistics.compare_paired([0.0, 0.0]).p_t == 1.0
    with pytest.raises(ValueError, match="no differences"):
        statistics.compare_paired([])


def test_holm():
    """The example of Aickin and Gensler, American Journal of Public Health 86 (1996), and by hand."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_mcnemar_is_the_binomial_tail():
    ours = np.array([True] * 12 + [False] * 3 + [True] * 50)
    theirs = np.array([False] * 12 + [True] * 3 + [True] * 50)
    by_hand = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
    only_ours, only_theirs, p = statistics.mcnemar(ours, theirs)
    assert (only_ours, only_theirs) == (12, 3)
    assert p == pytest.approx(by_hand, rel=1e-12)
    assert statistics.mcnemar(theirs, theirs) == (0, 0, 1.0)


def test_power_is_the_tables():
    """34 pairs show half a deviation with 80% power (Cohen 1988); 6 seeds need 1.435 deviations."""
    assert statistics.power(0.5, 1.0, 34) == pytest.approx(0.808, abs=1e-3)
    assert statistics.power(0.5, 1.0, 33) < 0.8
    size = statistics.detectable_difference(1.0, 6)
    random = np.random.default_rng(0).normal(size, 1.0, (20000, 6))
    shown = stats.ttest_1samp(random, 0.0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.01)
    assert statistics.detectable_difference(0.5, 6) == pytest.approx(size / 2)
    assert statistics.detectable_difference(0.5, 1) == math.inf


def test_verdicts():
    better = statistics.compare_paired(DIFFERENCES)
    assert statistics.verdict(better, better.p_t) == "better"
    assert statistics.verdict(statistics.compare_paired([-value for value in DIFFERENCES]), 0.01) == "worse"
    assert statistics.verdict(better, 0.05) == "not distinguishable"


def test_crossed_bootstrap_of_many_seeds_and_images():
    """Both kinds of resampling by hand: Var = Var(seed effects) / S + Var(image effects) / I + Var(rest) / (S I)."""
    random = np.random.default_rng(1)
    seeds, images = 40, 3000
    ours = random.random((seeds, images)) < 0.6 + random.normal(0, 0.05, (seeds, 1))
    theirs = random.random((seeds, images)) < 0.5 + random.normal(0, 0.2, (1, images))
    low, high = statistics.crossed_bootstrap(ours, theirs, samples=600)
    difference = 100 * (ours.astype(float) - theirs)
    error = math.sqrt(difference.mean(1).var(ddof=1) / seeds + difference.mean(0).var(ddof=1) / images)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.3)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def simulate(studies: int, seeds: int, images: int, effect: float, random: np.random.Generator) -> dict[str, float]:
    """Studies of two networks, ``effect`` points apart: how often the intervals hold the truth and the tests reject.

    An image has a difficulty of its own for each network, correlated between the two; a run has an effect of its seed.
    The t interval is for these images; the bootstrap's is for all images of the kind.
    """
    held = dict.fromkeys(("t interval", "bootstrap interval", "t test rejects", "sign-flip test rejects"), 0)
    for _ in range(studies):
        difficulty = random.normal(0, 0.25, images)
        probability = [
            np.clip(0.5 + shift + difficulty + random.normal(0, 0.05, images), 0, 1) for shift in (0, effect / 100)
        ]
        runs = [
            random.random((seeds, images)) < np.clip(each + random.normal(0, 0.005, (seeds, 1)), 0, 1)
            for each in probability
        ]
        paired = statistics.compare_paired(100 * (runs[1].mean(1) - runs[0].mean(1)))
        here = 100 * (probability[1].mean() - probability[0].mean())
        low, high = paired.interval
        held["t interval"] += low <= here <= high
        held["t test rejects"] += paired.p_t < 0.05
        held["sign-flip test rejects"] += paired.p_sign_flip < 0.05
        low, high = statistics.crossed_bootstrap(runs[1], runs[0], samples=300)
        held["bootstrap interval"] += low <= effect <= high
    return {name: count / studies for name, count in held.items()}


@pytest.mark.slow
def test_a_thousand_studies():
    """Coverage and false positives, at six seeds and 1,000 images; docs/studies.md has the figures."""
    random = np.random.default_rng(0)
    true = simulate(1000, 6, 1000, 2.0, random)
    null = simulate(1000, 6, 1000, 0.0, random)
    print(true, null)
    assert 0.93 <= true["t interval"] <= 0.97
    assert true["bootstrap interval"] >= 0.93  # it counts the noise of single predictions twice: conservative
    for seeds, percent in statistics.BOOTSTRAP_COVERAGE.items():
        held = simulate(1000, seeds, 1000, 2.0, np.random.default_rng(0))["bootstrap interval"]
        assert 100 * held == pytest.approx(percent, abs=1)
    assert null["t test rejects"] <= 0.06
    assert null["sign-flip test rejects"] <= 0.06

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
    for values, p, words in (
        ([2.0, 2.0, 2.0], 0.25, "not distinguishable"),  # the t statistic is infinite: no evidence of certainty
        ([65.4 - 65.2, 40.6 - 40.4], 0.5, "not distinguishable"),  # equal but for rounding
        ([2.0] * 6, 0.03125, "better"),
        ([-2.0] * 21, 2.0**-20, "worse"),
        ([0.0] * 6, 1.0, "not distinguishable"),
        ([70.1 - 70.0 - 0.1, 0.0], 1.0, "not distinguishable"),
    ):
        equal = statistics.compare_paired(values)
        assert (equal.p_t, equal.interval, statistics.verdict(equal, equal.p_t)) == (p, None, words), values
        assert equal.p_sign_flip == (p if len(values) <= statistics.EXACT_SEEDS else None)
    each = Comparison(
        "lip", [0, 1, 2], statistics.compare_paired([2.0] * 3), 0.25, 0.25, None, [], "not distinguishable"
    )
    assert report.sentence(each, "plain").endswith(
        "+2.00 points top-1 in each of 3 seeds, so no interval (sign-flip test p = .2500)."
    )
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


def test_a_difference_that_is_not_shown_says_what_would_be():
    """Six differences whose deviation is 1: 1.435 points (test_power_is_the_tables)."""
    paired = statistics.compare_paired(np.array([1, -1, 1, -1, 1, -1]) / math.sqrt(1.2))
    each = Comparison("lip", list(range(6)), paired, paired.p_t, None, None, [], "not distinguishable")
    assert report.sentence(each, "plain").endswith(
        " So many seeds show a true difference of 1.4 points with 80% power."
    )


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


def simulate(studies: int, seeds: int, effect: float, random: np.random.Generator) -> dict[str, float]:
    """Studies of two networks, ``effect`` points apart, on 1,000 images: in how many percent of them the intervals hold
    the truth and, without an effect, the tests reject.

    An image has a difficulty of its own for each network, correlated between the two; a run has an effect of its seed.
    The intervals over seeds are for these images; the crossed bootstrap's is for all images of the kind.
    """
    images, differences, truths, crossed, rejected = 1000, [], [], 0, np.zeros(2)
    for _ in range(studies):
        difficulty = random.normal(0, 0.25, images)
        probability = [
            np.clip(0.5 + shift + difficulty + random.normal(0, 0.05, images), 0, 1) for shift in (0, effect / 100)
        ]
        runs = [
            random.random((seeds, images)) < np.clip(each + random.normal(0, 0.005, (seeds, 1)), 0, 1)
            for each in probability
        ]
        differences.append(100 * (runs[1].mean(1) - runs[0].mean(1)))
        truths.append(100 * (probability[1].mean() - probability[0].mean()))
        paired = statistics.compare_paired(differences[-1])
        rejected += paired.p_t < 0.05, paired.p_sign_flip < 0.05
        if effect:
            low, high = statistics.crossed_bootstrap(runs[1], runs[0], samples=300)
            crossed += low <= effect <= high
    if not effect:
        return {"t test": 100 * rejected[0] / studies, "sign flip": 100 * rejected[1] / studies}
    of_t = stats.ttest_1samp(differences, 0, axis=1).confidence_interval(0.95)
    of_bca = stats.bootstrap(
        (np.array(differences),), np.mean, axis=1, n_resamples=2000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    held = {name: (each.low <= truths) & (truths <= each.high) for name, each in (("t", of_t), ("BCa", of_bca))}
    return {name: 100 * each.mean() for name, each in held.items()} | {"crossed": 100 * crossed / studies}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*BCa confidence interval cannot be calculated")  # of two equal differences
def test_a_thousand_studies():
    """Coverage and false positives with 2 to 6 seeds; docs/studies.md has the figures."""
    for seeds, percent in statistics.BOOTSTRAP_COVERAGE.items():
        true = simulate(1000, seeds, 2.0, np.random.default_rng(0))
        null = simulate(1000, seeds, 0.0, np.random.default_rng(1))
        print(f"| {seeds} |", " | ".join(f"{value:.1f}" for value in {**true, **null}.values()), "|")
        assert 93 <= true["t"] <= 97
        assert true["BCa"] < true["t"]  # why it is not used
        assert true["crossed"] == pytest.approx(percent, abs=1)
        assert null["t test"] <= 6
        assert null["sign flip"] <= 6

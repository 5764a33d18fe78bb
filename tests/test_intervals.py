"""Intervals of clustered values: equal to hand computation and to a bootstrap, and right as often as they say."""

import math

import numpy as np
import pytest
from scipy.special import stdtrit

from trl_personal.intervals import cluster_mean, cluster_share


def bootstrap_half_width(values, clusters, weights, num_resamples=2000):
    """Half the 95% interval of the mean by drawing as many clusters with replacement, widened and with t as in the package."""
    _, codes = np.unique(clusters, return_inverse=True)
    masses, totals = np.bincount(codes, weights=weights), np.bincount(codes, weights=weights * values)
    mean, effective = totals.sum() / masses.sum(), masses.sum() ** 2 / (masses**2).sum()
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(masses), size=(num_resamples, len(masses)))
    means = (totals - mean * masses)[drawn].sum(axis=1) / masses[drawn].sum(axis=1)
    return stdtrit(effective - 1, 0.975) * means.std() * math.sqrt(effective / (effective - 1))


@pytest.mark.parametrize(("num_clusters", "tolerance"), [(5, 0.02), (20, 0.005), (100, 0.001), (1000, 0.0005)])
def test_the_closed_form_equals_a_bootstrap(num_clusters, tolerance):
    rng = np.random.default_rng(num_clusters)
    clusters = np.repeat(np.arange(num_clusters), 4)
    values = (rng.random(len(clusters)) < rng.beta(2, 1, size=num_clusters)[clusters]).astype(float)
    for weights in (np.ones(len(values)), rng.uniform(0.9, 1.1, size=len(values))):
        interval = cluster_mean(values, clusters, weights)
        expected = bootstrap_half_width(values, clusters, weights)
        assert interval.high - interval.value == pytest.approx(expected, abs=tolerance)


def test_mean_and_error_of_weighted_clusters_by_hand():
    """
    Weights 1, 1 (a), 2 (b) and 4 (c) of values 1, 0, 1 and 0: the mean is 3 / 8, the sums of residuals are 1 / 4, 5 / 4 and
    -3 / 2, and the effective number of clusters is 64 / 24.
    """
    interval = cluster_mean([1, 0, 1, 0], list("aabc"), [1, 1, 2, 4])
    effective = 64 / 24
    error = math.sqrt((1 + 25 + 36) / 16) / 8 * math.sqrt(effective / (effective - 1))
    assert interval.value == 3 / 8
    assert interval.high - interval.value == pytest.approx(stdtrit(effective - 1, 0.975) * error)


def test_a_cluster_of_pairs_is_not_taken_for_independent_ones():
    """Four users judge each of ten prompts alike: the interval is that of ten values, not that of forty."""
    values, clusters = np.repeat([0.0, 1.0] * 5, 4), np.repeat(np.arange(10), 4)
    clustered, independent = cluster_mean(values, clusters), cluster_mean(values, range(40))
    assert clustered.high - clustered.value == pytest.approx(2.262 * math.sqrt(0.25 / 9), rel=1e-3)
    assert clustered.high - clustered.value > 2 * (independent.high - independent.value)


def test_mean_and_error_of_equal_clusters_by_hand():
    """Four clusters with means 0, 1, 2 and 3: the mean has variance 5 / 3 / 4, and t of 3 degrees of freedom is 3.182."""
    interval = cluster_mean([0, 0, 1, 1, 2, 2, 3, 3], list("aabbccdd"))
    assert interval.value == 1.5
    assert interval.high - interval.value == pytest.approx(3.182 * math.sqrt(5 / 3 / 4), rel=1e-3)
    assert interval.value - interval.low == pytest.approx(interval.high - interval.value)


def test_weights_make_users_count_the_same():
    assert cluster_mean([1, 1, 1, 0], [0, 1, 2, 3], weights=[1 / 3, 1 / 3, 1 / 3, 1]).value == pytest.approx(0.5)


def test_repeating_a_cluster_does_not_narrow_the_interval():
    values, clusters = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.arange(5)
    once, often = cluster_mean(values, clusters), cluster_mean(np.repeat(values, 50), np.repeat(clusters, 50))
    assert often.high - often.low == pytest.approx(once.high - once.low)


def test_a_single_cluster_says_nothing():
    assert cluster_mean([1.0, 1.0], ["p", "p"]).low == -math.inf
    assert (cluster_share([1, 1], ["p", "p"]).low, cluster_share([1, 1], ["p", "p"]).high) == (0.0, 1.0)


def test_share_is_wilsons_interval_for_independent_values():
    """8 of 10, t = 2.262 with 9 degrees of freedom: (0.8 + t^2 / 20 ± t sqrt(0.016 * 10 / 9 + ...)) / (1 + t^2 / 10)."""
    interval = cluster_share([1] * 8 + [0] * 2, range(10))
    effective, t = 0.8 * 0.2 / (0.8 * 0.2 / 10 * 10 / 9), 2.262  # the variance of ten values, by 10 / 9
    center = (0.8 + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t * math.sqrt(0.8 * 0.2 / effective + t**2 / (4 * effective**2)) / (1 + t**2 / effective)
    assert (interval.low, interval.high) == pytest.approx((center - half, center + half), abs=1e-3)


@pytest.mark.parametrize(("num_clusters", "num_values", "correlation"), [(6, 60, 0.3), (14, 200, 0.1), (40, 40, 0.0)])
def test_intervals_hold_the_true_mean_about_as_often_as_they_say(num_clusters, num_values, correlation):
    held = {cluster_mean: 0, cluster_share: 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        clusters = rng.integers(num_clusters, size=num_values)
        spread = (1 - correlation) / correlation if correlation else 1e6
        values = rng.random(num_values) < rng.beta(0.7 * spread, 0.3 * spread, size=num_clusters)[clusters]
        for method in held:
            interval = method(values, clusters)
            held[method] += interval.low <= 0.7 <= interval.high
    assert min(held.values()) >= 200 * 0.95 - 3 * math.sqrt(200 * 0.05 * 0.95) - 4  # few clusters: a little too narrow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "no values"),
        (([1.0], [1, 2]), "found shapes"),
        (([math.nan, 1.0], [1, 2]), "finite"),
        (([1.0, 1.0], [1, 2], [0.0, 1.0]), "above zero"),
    ],
)
def test_what_cannot_be_averaged(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_mean(*arguments)

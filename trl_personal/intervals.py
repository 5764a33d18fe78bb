"""Means of values that come in clusters, such as all pairs about one prompt, with intervals that know it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from .arrays import FloatArray


NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 2_000_000  # draws of a cluster that are held in memory


@dataclass(frozen=True)
class Interval:
    """
    A number and the interval around it.

    ```python
    >>> print(Interval(0.5, 0.25, 0.75))
    0.500 [0.250, 0.750]
    ```
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __format__(self, specification: str) -> str:
        if not specification:
            return str(self)
        return f"{self.value:{specification}} [{self.low:{specification}}, {self.high:{specification}}]"


def cluster_mean(
    values: ArrayLike,
    clusters: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """
    Weighted mean of `values`, with an interval from resampling whole clusters.

    The interval is `mean ± t * se`: `se` is the standard deviation of the mean over the resamples, widened by
    `sqrt(G / (G - 1))`, and `t` has `G - 1` degrees of freedom, one at least. `G` is the effective number of clusters,
    `(sum m)^2 / sum m^2` for clusters of weight m. Percentiles of the resamples would be too narrow for few clusters.

    Args:
        values (`ArrayLike`): `(n,)`, any unit.
        clusters (`ArrayLike`): `(n,)`, a number or text for the cluster of each value.
        weights (`ArrayLike`, *optional*): `(n,)`, above zero; default: all the same.
        confidence (`float`, *optional*, defaults to `0.95`): How often the interval shall hold the true mean.
        num_resamples (`int`, *optional*, defaults to `1000`): Draws of as many clusters as there are, with replacement.
        seed (`int`, *optional*, defaults to `0`): Of the draws.

    Returns:
        [`Interval`] in the unit of the values. With a single cluster it is infinitely wide.

    Raises:
        `ValueError`: if there are no values, not as many clusters, or values that are not numbers.

    ```python
    >>> cluster_mean([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"]).value
    0.75
    ```
    """
    mean, error, num_clusters = _mean_and_error(values, clusters, weights, num_resamples, seed)
    half_width = _quantile(confidence, num_clusters) * error if num_clusters > 1 else np.inf
    return Interval(mean, mean - half_width, mean + half_width)


def cluster_share(
    values: ArrayLike,
    clusters: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """
    [`cluster_mean`] of values within 0 and 1, such as right or wrong, with an interval that stays there.

    It is Wilson's score interval for as many independent values as would have the same standard error, with `t` in place of
    the normal quantile. So a user who is right on all of ten pairs does not get the interval [1, 1].

    ```python
    >>> print(cluster_share([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], range(10)))
    1.000 [0.661, 1.000]
    ```
    """
    share, error, num_clusters = _mean_and_error(values, clusters, weights, num_resamples, seed)
    if num_clusters <= 1:
        return Interval(share, 0.0, 1.0)
    most = float(np.size(values))
    effective = min(share * (1 - share) / error**2, most) if error > 0 else num_clusters
    ratio = _quantile(confidence, num_clusters) ** 2 / effective
    center = (share + ratio / 2) / (1 + ratio)
    half_width = np.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    return Interval(share, max(0.0, float(center - half_width)), min(1.0, float(center + half_width)))


def _mean_and_error(
    values: ArrayLike, clusters: ArrayLike, weights: ArrayLike | None, num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """The weighted mean, its standard error, and the effective number of clusters."""
    numbers = np.asarray(values, dtype=np.float64)
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    mass = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(numbers, codes, mass)
    totals = np.bincount(codes, weights=mass * numbers).astype(np.float64)
    masses = np.bincount(codes, weights=mass).astype(np.float64)
    mean = float(totals.sum() / masses.sum())
    effective = float(masses.sum() ** 2 / (masses**2).sum())
    if effective <= 1 + 1e-9:
        return mean, np.inf, 1.0
    error = _resampled_error(totals - mean * masses, masses, num_resamples, seed)
    return mean, error * float(np.sqrt(effective / (effective - 1))), effective


def _resampled_error(residuals: FloatArray, masses: FloatArray, num_resamples: int, seed: int) -> float:
    """Standard deviation over the resamples of the mean; `residuals` and `masses` are `(num_clusters,)`."""
    rng = np.random.default_rng(seed)
    num_clusters = len(masses)
    means = []
    at_once = max(1, RESAMPLES_AT_ONCE // num_clusters)
    for start in range(0, num_resamples, at_once):
        drawn = rng.integers(num_clusters, size=(min(at_once, num_resamples - start), num_clusters))
        means.append(residuals[drawn].sum(axis=1) / masses[drawn].sum(axis=1))
    return float(np.concatenate(means).std())


def _quantile(confidence: float, num_clusters: float) -> float:
    return float(stdtrit(max(1.0, num_clusters - 1), (1 + confidence) / 2))


def _check(values: FloatArray, clusters: NDArray[np.intp], weights: FloatArray) -> None:
    if values.ndim != 1 or values.shape != clusters.shape or values.shape != weights.shape:
        raise ValueError(
            "Values, clusters and weights must be lists of one length, found shapes "
            f"{values.shape}, {clusters.shape} and {weights.shape}."
        )
    if not len(values):
        raise ValueError("There are no values to average.")
    if not np.isfinite(values).all() or not (weights > 0).all():
        raise ValueError(
            "Values must be finite numbers and weights above zero; a value is NaN or infinite, or a weight is not."
        )

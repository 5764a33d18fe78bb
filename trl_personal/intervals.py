"""
Means of values that come in clusters, such as all pairs about one prompt, with intervals that do not take the values of a
cluster for independent ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from .arrays import FloatArray, IntArray


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
    values: ArrayLike, clusters: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95
) -> Interval:
    """
    Weighted mean of `values`, with an interval from the spread of whole clusters.

    The interval is `mean ± t * se`. With `r_g`, the sum over cluster g of weight times distance from the mean, the clustered
    standard error is

        se = sqrt(sum_g r_g^2) / sum of weights * sqrt(G / (G - 1))

    and `t` has `G - 1` degrees of freedom, one at least. `G` is the effective number of clusters, `(sum m)^2 / sum m^2` for
    clusters of weight m.

    Args:
        values (`ArrayLike`): The values to average, `(n,)`, in any unit.
        clusters (`ArrayLike`): The cluster of each value, `(n,)`, a number or text.
        weights (`ArrayLike`, *optional*): The weight of each value, `(n,)`, above zero. By default all weigh the same.
        confidence (`float`, *optional*, defaults to `0.95`): How often the interval shall hold the true mean.

    Returns:
        [`Interval`] in the unit of the values. With a single cluster it is infinitely wide.

    Raises:
        `ValueError`: if there are no values, not as many clusters, or values that are not numbers.

    ```python
    >>> print(cluster_mean([1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "c"]))
    0.750 [-0.265, 1.765]
    ```
    """
    mean, error, num_clusters = _mean_and_error(values, clusters, weights)
    half_width = _quantile(confidence, num_clusters) * error if num_clusters > 1 else np.inf
    return Interval(mean, mean - half_width, mean + half_width)


def cluster_share(
    values: ArrayLike, clusters: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95
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
    share, error, num_clusters = _mean_and_error(values, clusters, weights)
    if num_clusters <= 1:
        return Interval(share, 0.0, 1.0)
    most = float(np.size(values))
    effective = min(share * (1 - share) / error**2, most) if error > 0 else num_clusters
    ratio = _quantile(confidence, num_clusters) ** 2 / effective
    center = (share + ratio / 2) / (1 + ratio)
    half_width = np.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    return Interval(share, max(0.0, float(center - half_width)), min(1.0, float(center + half_width)))


def _mean_and_error(values: ArrayLike, clusters: ArrayLike, weights: ArrayLike | None) -> tuple[float, float, float]:
    """The weighted mean, its clustered standard error, and the effective number of clusters."""
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
    residuals = totals - mean * masses
    error = np.sqrt((residuals**2).sum()) / masses.sum()
    return mean, float(error * np.sqrt(effective / (effective - 1))), effective


def _quantile(confidence: float, num_clusters: float) -> float:
    return float(stdtrit(max(1.0, num_clusters - 1), (1 + confidence) / 2))


def _check(values: FloatArray, clusters: IntArray, weights: FloatArray) -> None:
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

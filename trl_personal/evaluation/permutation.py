"""
Whether the answers of users differ, by permutation: were users alike, any of them could have written any of the answers to a
prompt. No assumption on the distribution of a feature, and many features and users are one test, not many.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import FloatArray, IntArray


NUM_PERMUTATIONS = 1999
MAX_NUMBERS = 3e8  # that all permutations together look up; with very many users there are fewer permutations
CHUNK = 4e6  # numbers at a time, which bounds the memory
TOLERANCE = 1e-9


@dataclass(frozen=True)
class PermutationTest:
    """
    What [`permute_users`] finds for `num_users` users and `num_features` features.

    Args:
        p_values (`NDArray`): For each feature the probability of a difference between users as large as that found in any
            feature, were they alike: adjusted for the number of features (max-T, Westfall and Young 1993), `(num_features,)`.
        fit_p_value (`float`, *optional*): The probability of answers that lie as far in the directions given, were they
            shuffled; `None` without directions.
    """

    p_values: FloatArray
    fit_p_value: float | None

    @property
    def p_value(self) -> float:
        """The probability of what was found in the clearest feature, were users alike."""
        return float(self.p_values.min())


def permute_users(
    features: FloatArray,
    directions: FloatArray | None = None,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> PermutationTest:
    """
    Test whether users differ in features of their answers to the same prompts, by exchanging users within each prompt.

    With z, the features less their mean over the users of the prompt, a feature's statistic is the spread of the users' sums,
    `sum_u (sum_p z)^2 / sum_up z^2`. What differs between users in one prompt this way and in another that way cancels out;
    what does not is a user's own. The test is exact for exchangeable users, whatever the features and however they correlate.

    Args:
        features (`NDArray`): Float `(num_users, num_prompts, num_features)`, of two users or more.
        directions (`NDArray`, *optional*): `(num_users, num_features)`, where each user wants the features to be
            ([`preferred_directions`]). Tested is the sum of the products of what users want and what they get, upwards.
        num_permutations (`int`, *optional*, defaults to `1999`): How often users are exchanged.
        seed (`int`, *optional*, defaults to `0`): Random seed of the permutations.

    Returns:
        [`PermutationTest`]. No p-value is below `1 / (num_permutations + 1)`.

    ```python
    >>> words = np.array([[3, 4, 3, 5, 4, 3], [9, 8, 9, 9, 7, 8], [3, 5, 4, 3, 4, 4]], dtype=float)[:, :, None]
    >>> permute_users(words).p_value < 0.05
    True
    ```
    """
    num_users, num_prompts, num_features = features.shape
    scaled = _scaled(features)
    wanted = directions
    found = _statistics(scaled.sum(axis=1)[None], wanted)
    larger, fitting = np.ones(num_features), 1.0
    num_permutations = int(max(199, min(num_permutations, MAX_NUMBERS // features.size)))
    chunk = max(1, int(CHUNK // features.size))
    rng = np.random.default_rng(seed)
    prompts = np.arange(num_prompts)[:, None]
    by_prompt = scaled.transpose(1, 0, 2)  # (num_prompts, num_users, num_features)
    for start in range(0, num_permutations, chunk):
        size = min(chunk, num_permutations - start)
        order = rng.random((size, num_prompts, num_users)).argsort(axis=2)
        shuffled = _statistics(by_prompt[prompts, order].sum(axis=1), wanted)
        larger += (shuffled.spread.max(axis=1)[:, None] >= found.spread[0] - TOLERANCE).sum(axis=0)
        fitting += (shuffled.fit >= found.fit[0] - TOLERANCE).sum()
    total = num_permutations + 1
    return PermutationTest(larger / total, None if wanted is None else float(fitting / total))


def flip_differences(differences: FloatArray, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> FloatArray:
    """
    Test which of `k` paired differences between two users are not zero on average, by exchanging the two in some prompts.

    A feature's statistic is `|sum_p d| / sqrt(sum_p d^2)`, which an exchange, a change of sign, leaves below the bar. The same
    prompts are exchanged for all comparisons at once, so that the largest statistic of all has its own distribution under
    dependence: p-values are adjusted for the number of features and of comparisons (single-step max-T).

    Args:
        differences (`NDArray`): Float `(k, num_prompts, num_features)`.
        num_permutations (`int`, *optional*, defaults to `1999`): How often prompts are exchanged.
        seed (`int`, *optional*, defaults to `0`): Random seed.

    Returns:
        The adjusted p-value of each comparison, `(k,)`.

    ```python
    >>> longer, alike = np.full((10, 1), 3.0), np.array([[1.0], [-1.0]] * 5)
    >>> (flip_differences(np.stack([longer, alike])) < 0.05).tolist()
    [True, False]
    ```
    """
    num_comparisons, num_prompts, num_features = differences.shape
    by_prompt = differences.transpose(1, 0, 2).reshape(num_prompts, -1)
    length = np.sqrt((by_prompt**2).sum(axis=0))
    scaled = np.divide(by_prompt, length, out=np.zeros_like(by_prompt), where=length > TOLERANCE)
    found = np.abs(scaled.sum(axis=0)).reshape(num_comparisons, num_features).max(axis=1)
    larger = np.ones(num_comparisons)
    rng = np.random.default_rng(seed)
    chunk = max(1, int(CHUNK // max(1, scaled.shape[1])))
    for start in range(0, num_permutations, chunk):
        signs = rng.choice([-1.0, 1.0], size=(min(chunk, num_permutations - start), num_prompts))
        largest = np.abs(signs @ scaled).max(axis=1)
        larger += (largest[:, None] >= found - TOLERANCE).sum(axis=0)
    return larger / (num_permutations + 1)


def permute_pairs(
    features: FloatArray,
    chosen: FloatArray,
    rejected: FloatArray,
    users: IntArray,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> float:
    """
    Test whether users get what **they** chose, by exchanging the users of pairs: were it anybody's, the answers would fit the
    pairs of other users as well.

    [`permute_users`] asks whether answers that differ by chance would fit what users want; this one asks the same of wants
    that differ by chance. Only both together show that one goes with the other.

    Args:
        features (`NDArray`): Of the answers, float `(num_users, num_prompts, num_features)`.
        chosen (`NDArray`): Features of the chosen answers of `n` pairs, `(n, num_features)`.
        rejected (`NDArray`): Those of the rejected answers, `(n, num_features)`.
        users (`NDArray`): The number of each pair's user, `(n,)`.
        num_permutations (`int`, *optional*, defaults to `1999`): How often users are exchanged.
        seed (`int`, *optional*, defaults to `0`): Random seed.

    Returns:
        The p-value.
    """
    given = _scaled(features).sum(axis=1)
    counts = np.maximum(np.bincount(users, minlength=len(given)), 1)
    products = _in_units(chosen - rejected) @ (given / counts[:, None]).T  # (n, num_users)
    rows = np.arange(len(users))
    found = products[rows, users].sum()
    num_permutations = int(max(199, min(num_permutations, MAX_NUMBERS // max(1, len(users)))))
    rng = np.random.default_rng(seed)
    fits = sum(products[rows, rng.permutation(users)].sum() >= found - TOLERANCE for _ in range(num_permutations))
    return float((fits + 1) / (num_permutations + 1))


def _scaled(features: FloatArray) -> FloatArray:
    """Features less their mean over the users of the prompt, with a sum of squares of 1, or 0 where nothing differs."""
    centered = features - features.mean(axis=0)
    scale = np.sqrt((centered**2).sum(axis=(0, 1)))
    least = TOLERANCE * (1 + np.abs(features).max())
    return np.divide(centered, scale, out=np.zeros_like(centered), where=scale > least)


def _in_units(differences: FloatArray) -> FloatArray:
    """Differences of pairs, `(n, num_features)`, in units of their root mean square."""
    scale = np.sqrt((differences**2).mean(axis=0)) if len(differences) else np.ones(differences.shape[1])
    return differences / np.where(scale > 0, scale, 1.0)


@dataclass(frozen=True)
class _Statistics:
    """Of `n` permutations: the spread of the users' sums, `(n, num_features)`, and the fit, `(n,)`."""

    spread: FloatArray
    fit: FloatArray


def _statistics(sums: FloatArray, wanted: FloatArray | None) -> _Statistics:
    return _Statistics(
        spread=(sums**2).sum(axis=1),
        fit=np.zeros(len(sums)) if wanted is None else np.einsum("nuf,uf->n", sums, wanted),
    )


def preferred_directions(chosen: FloatArray, rejected: FloatArray, users: IntArray, num_users: int) -> FloatArray:
    """
    Where the features of the answers that each user chose lie, seen from those that the user rejected.

    Args:
        chosen (`NDArray`): Features of the chosen answers of `n` pairs, `(n, num_features)`.
        rejected (`NDArray`): Those of the rejected answers, `(n, num_features)`.
        users (`NDArray`): The number of each pair's user, `(n,)`.
        num_users (`int`): The number of users.

    Returns:
        The mean of chosen minus rejected for each user, in units of the root mean square of all pairs, `(num_users,
        num_features)`; 0 for users without pairs.

    ```python
    >>> preferred_directions(np.array([[5.0], [1.0]]), np.array([[2.0], [4.0]]), np.array([0, 1]), 3).tolist()
    [[1.0], [-1.0], [0.0]]
    ```
    """
    scaled = _in_units(chosen - rejected)
    counts = np.bincount(users, minlength=num_users)
    totals = np.stack([np.bincount(users, weights=column, minlength=num_users) for column in scaled.T], axis=1)
    return totals / np.maximum(counts, 1)[:, None]

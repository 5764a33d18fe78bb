"""
Rules that choose between two answers by simple features, for everybody or for each user, cross-validated.

A rule is a weight for each feature; it picks the answer with the larger weighted sum. The pooled rule is ridge regression on
the differences between chosen and rejected. A user's rule adds an offset, learned from what the pooled rule leaves over on
the user's pairs and shrunk towards zero: `offset = C sum(residual * difference) / (num_pairs + shrinkage)`, where `C` is the
inverse of the regularized covariance of the differences. How much to shrink, and whether to have an offset at all, is chosen
on other prompts than those a rule is scored on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from ..arrays import FloatArray, IntArray


RIDGES = (10.0, 100.0)  # that the pooled rule chooses from
COVARIANCE_RIDGES = (0.1, 1.0)  # added to a covariance of 1 on the diagonal
SHRINKAGES = (3.0, 10.0, 30.0, 100.0, 300.0)  # in pairs: a user with that many pairs gets half of the offset
PRIOR_FACTORS = (0.3, 1.0)  # times the shrinkage that the variance between users asks for
CLIP = 3.0  # differences of more standard deviations count as that many
TIE = 1e-6  # margins below it are ties, which count as half right

# From held-out folds and one of them to how many pairs of that fold each candidate gets right, `(num_candidates,)`.
Right = dict[tuple[tuple[int, ...], int], FloatArray]


class Candidate(NamedTuple):
    """
    Offsets of users, in coordinates in which the covariance of the differences is about the identity.

    Args:
        offsets (`FloatArray`): What is added to the pooled rule for each user. Shape: `(num_users, num_features)`.
        evidence (`FloatArray`, *optional*): Number of pairs that each user's offset was learned from. If it is given, there is
            one candidate for each of `SHRINKAGES`, in which `offsets` are divided by `evidence + shrinkage`. Shape:
            `(num_users,)`.
    """

    offsets: FloatArray
    evidence: FloatArray | None = None


class _UserRule(NamedTuple):
    """A [`Candidate`] in units of the features: what is added to the pooled rule for each user, and its evidence."""

    weights: NDArray[np.float32]
    evidence: FloatArray | None


# What users share with one another: from the sums of residual * difference over each user's pairs `(num_users, num_features)`,
# the number of those pairs `(num_users,)`, and the mean squared residual, to candidates.
Sharing = Callable[[FloatArray, FloatArray, float], Sequence[Candidate]]


def scale(differences: FloatArray) -> NDArray[np.float32]:
    """
    Differences between chosen and rejected `(n, num_features)` in units of their size over all pairs, clipped to ±`CLIP`.

    Which answer was chosen has no influence on the units.
    """
    size = np.sqrt((differences**2).mean(axis=0))
    scaled = differences / np.where(size > 0, size, 1)
    return np.clip(scaled, -CLIP, CLIP).astype(np.float32)


def split_prompts(prompts: IntArray, num_folds: int, rng: np.random.Generator) -> IntArray:
    """The fold of each pair `(n,)`, all pairs about a prompt in the same one; fewer folds if there are fewer prompts."""
    num_prompts = int(prompts.max()) + 1
    fold_of = np.empty(num_prompts, dtype=np.intp)
    fold_of[rng.permutation(num_prompts)] = np.arange(num_prompts) % min(num_folds, num_prompts)
    return fold_of[prompts]


def score(margins: FloatArray) -> FloatArray:
    """1 for a right choice, 0 for a wrong one, one half for a tie."""
    return np.where(np.abs(margins) < TIE, 0.5, (margins > 0).astype(np.float64))


@dataclass(frozen=True)
class _TrainingSet:
    """
    What is learned without the folds `held_out`, before users come in: `margins` of pooled rules in the folds to be scored,
    and `residuals` `(n,)` of one, zero for held-out pairs, with their mean square.
    """

    held_out: tuple[int, ...]
    margins: dict[int, list[FloatArray]]
    residuals: NDArray[np.float32]
    noise: float
    whitenings: list[FloatArray]


class NestedCrossValidation:
    """
    Accuracy of rules on prompts that were held out from learning them and from choosing among them.

    Args:
        features (`NDArray`): Differences between chosen and rejected answers, as [`scale`] returns them. Shape:
            `(n, num_features)`.
        folds (`IntArray`): Fold of each pair, as [`split_prompts`] returns it. There must be three folds at least. Shape:
            `(n,)`.
        thorough (`bool`): Whether rules are chosen on all other folds, and not on one of them, which is enough if folds are
            large.
    """

    def __init__(self, features: NDArray[np.float32], folds: IntArray, thorough: bool = True) -> None:
        self.features = features
        self.folds = folds
        self.num_folds = int(folds.max()) + 1
        self._rows = [np.flatnonzero(folds == fold) for fold in range(self.num_folds)]
        self._features = [features[rows] for rows in self._rows]
        steps = range(1, self.num_folds if thorough else 2)
        self._others = [[(fold + step) % self.num_folds for step in steps] for fold in range(self.num_folds)]
        scored: dict[tuple[int, ...], set[int]] = {(fold,): {fold} for fold in range(self.num_folds)}
        for fold, others in enumerate(self._others):
            for other in others:
                scored.setdefault(_pair(fold, other), set()).add(other)
        self._sets = {held_out: self._learn(held_out, sorted(folds)) for held_out, folds in scored.items()}

    def _learn(self, held_out: tuple[int, ...], scored: Sequence[int]) -> _TrainingSet:
        learned = ~np.isin(self.folds, held_out)
        x = self.features[learned].astype(np.float64)
        products, sums = x.T @ x, x.sum(axis=0)
        identity = np.eye(x.shape[1])
        weights = [np.linalg.solve(products + ridge * identity, sums) for ridge in RIDGES]
        residuals = np.where(learned, 1 - self.features @ weights[-1].astype(np.float32), 0).astype(np.float32)
        return _TrainingSet(
            held_out=held_out,
            margins={f: [self._features[f].astype(np.float64) @ w for w in weights] for f in scored},
            residuals=residuals,
            noise=float((residuals.astype(np.float64) ** 2).sum() / max(1, len(x))),
            whitenings=[_inverse_root(products / max(1, len(x)) + ridge * identity) for ridge in COVARIANCE_RIDGES],
        )

    @cached_property
    def _pooled_right(self) -> Right:
        return {
            (held_out, fold): np.array([score(margins).sum() for margins in by_ridge])
            for held_out, training_set in self._sets.items()
            for fold, by_ridge in training_set.margins.items()
        }

    @cached_property
    def _pooled_choice(self) -> list[int]:
        """The ridge for each fold: the one that is best on the other folds, and the larger of two that are equal there."""
        return [_last_best(self._right_elsewhere(self._pooled_right, fold)) for fold in range(self.num_folds)]

    def _pooled_scores(self, fold: int) -> FloatArray:
        return score(self._sets[(fold,)].margins[fold][self._pooled_choice[fold]])

    def pooled(self) -> FloatArray:
        """Score `(n,)` of the pooled rule on each pair."""
        scores = np.empty(len(self.folds))
        for fold, rows in enumerate(self._rows):
            scores[rows] = self._pooled_scores(fold)
        return scores

    def personal(self, users: IntArray, num_users: int, sharing: Sharing | None = None) -> FloatArray:
        """
        Score `(n,)` on each pair of the user's rule, or of the pooled rule where that was better on other prompts.

        Args:
            users (`IntArray`): Number of each pair's user, from 0 to `num_users` - 1. Shape: `(n,)`.
            num_users (`int`): Number of users.
            sharing (`Callable`, *optional*): What users share with one another. Defaults to [`share_prior`].
        """
        by_user = _ByUser(users, num_users, self.folds)
        sharing = sharing or share_prior
        right: Right = {}
        for held_out, training_set in self._sets.items():
            if len(held_out) > 1:
                rules = list(self._user_rules(training_set, by_user, sharing))
                for fold in training_set.margins:
                    scores = (self._user_scores(training_set, by_user, fold, rule) for rule in rules)
                    right[held_out, fold] = np.array([values.sum() for part in scores for values in part])
        result = np.empty(len(users))
        for fold, rows in enumerate(self._rows):
            found = self._right_elsewhere(right, fold)
            choice = _last_best(found)  # of equal candidates the most shrunken
            pooled = self._right_elsewhere(self._pooled_right, fold)[self._pooled_choice[fold]]
            if found[choice] > pooled + TIE:
                result[rows] = self._scores_of_choice(fold, by_user, sharing, choice)
            else:
                result[rows] = self._pooled_scores(fold)
        return result

    def _user_rules(self, training_set: _TrainingSet, by_user: "_ByUser", sharing: Sharing) -> Iterator[_UserRule]:
        sums = by_user.sums(training_set.residuals, self.features)
        num_pairs = by_user.counts(training_set.held_out)
        for root in training_set.whitenings:
            for candidate in sharing(sums @ root, num_pairs, training_set.noise):
                yield _UserRule((candidate.offsets @ root).astype(np.float32), candidate.evidence)

    def _user_scores(
        self, training_set: _TrainingSet, by_user: "_ByUser", fold: int, rule: _UserRule
    ) -> Iterator[FloatArray]:
        """Scores of each candidate of `rule` on the pairs in `fold`."""
        users, margins = by_user.users[self._rows[fold]], training_set.margins[fold][-1]
        moves = np.einsum("nd,nd->n", self._features[fold], rule.weights[users])
        if rule.evidence is None:
            yield score(margins + moves)
            return
        for shrinkage in SHRINKAGES:
            yield score(margins + moves / (rule.evidence + shrinkage)[users])

    def _scores_of_choice(self, fold: int, by_user: "_ByUser", sharing: Sharing, choice: int) -> FloatArray:
        """Scores on the pairs in `fold` of the candidate `choice`, which is learned on all other folds."""
        training_set = self._sets[(fold,)]
        for rule in self._user_rules(training_set, by_user, sharing):
            number = 1 if rule.evidence is None else len(SHRINKAGES)
            if choice < number:
                return next(islice(self._user_scores(training_set, by_user, fold, rule), choice, None))
            choice -= number
        raise IndexError(choice)

    def _right_elsewhere(self, right: Right, fold: int) -> FloatArray:
        """How many pairs of the other folds each candidate gets right when it is learned without them and without `fold`."""
        return np.sum([right[_pair(fold, other), other] for other in self._others[fold]], axis=0)


class _ByUser:
    """Sums over the pairs of each user."""

    def __init__(self, users: IntArray, num_users: int, folds: IntArray) -> None:
        self.users = users
        self.num_users = num_users
        shape = (num_users, int(folds.max()) + 1)
        places = np.ravel_multi_index((users, folds), shape)
        self._counts = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)
        self._order = np.argsort(
            users.astype(np.min_scalar_type(num_users)), kind="stable"
        )  # small numbers sort faster
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=num_users))])

    def sums(self, weights: NDArray[np.float32], values: NDArray[np.float32]) -> FloatArray:
        """Sums of `weights * values` over the pairs of each user, `(num_users, num_features)`."""
        shape = (self.num_users, len(weights))
        return (csr_matrix((weights[self._order], self._order, self._starts), shape=shape) @ values).astype(np.float64)

    def counts(self, held_out: tuple[int, ...]) -> FloatArray:
        """Number of each user's pairs that are not held out, `(num_users,)`."""
        return np.delete(self._counts, held_out, axis=1).sum(axis=1).astype(np.float64)


def share_nothing(sums: FloatArray, num_pairs: FloatArray, noise: float) -> list[Candidate]:
    """Each user learns from their own pairs only, as in the user model `individual`."""
    return [Candidate(sums, num_pairs)]


def share_prior(sums: FloatArray, num_pairs: FloatArray, noise: float) -> list[Candidate]:
    """
    Each user learns from their own pairs as with [`share_nothing`]. Further candidates shrink the offsets less in the
    directions in which users differ, which they learn from all users.

    The variance of the offsets between users is found by the method of moments: it is what the sums vary more than `noise`
    explains.
    """
    excess = sums.T @ sums - noise * num_pairs.sum() * np.eye(sums.shape[1])
    values, directions = np.linalg.eigh(excess / max(1.0, float((num_pairs**2).sum())))
    variances = np.maximum(values, 1e-9)
    shared = [
        Candidate((sums @ directions / (num_pairs[:, None] + factor * noise / variances)) @ directions.T)
        for factor in PRIOR_FACTORS
    ]
    return [*shared, *share_nothing(sums, num_pairs, noise)]


def _pair(fold: int, other: int) -> tuple[int, int]:
    return (max(fold, other), min(fold, other))


def _inverse_root(matrix: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(values)) @ vectors.T


def _last_best(values: FloatArray) -> int:
    return len(values) - 1 - int(np.argmax(values[::-1]))

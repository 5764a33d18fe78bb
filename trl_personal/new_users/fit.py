"""
Rows of users from the margins of their pairs: a linear model of the margins, a Gaussian prior, and the evidence.

Each user `u` has codes `z` in a few directions and a linear model of the margins of the pairs, `m(z) = m_0 + X z`. A
*hypothesis* says what the user's answers are: codes drawn from `N(0, I / precision)`, or codes of zero (`precision` infinite),
and answers of which a share is by chance. Under a hypothesis

    log p(answers | z) = sum_i log(noise + (1 - 2 noise) sigmoid(beta m_i(z)))

is maximized together with the prior (a MAP estimate, by Newton steps with the Fisher information), and integrated over the
codes by Laplace's approximation: the evidence. How common each hypothesis is among the users who join, is learned from them
(empirical Bayes), starting from [`SHARES`].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


PRECISIONS = (0.2, 0.6)  # users who join may be somewhat further from the generic one than those who are known
NOISES = (0.0, 0.1, 0.2, 0.3)
CHANCE = 0.5  # the noise of answers that say nothing
NEWTON_STEPS = 50
SAME_VALUE = 1e-9  # of an objective, up to rounding
TOLERANCE = 1e-4  # of a Newton step
# Before anybody's answers are seen: answers by chance, those of the start row, those of a row of one's own
SHARES = {"chance": 0.7, "start": 0.1, "own": 0.2}
DECIDED = 0.45  # from here on the share of chance is whole
PRIOR_WEIGHT = 1.0  # of these shares, in users


@dataclass(frozen=True)
class Hypothesis:
    """
    Codes drawn from `N(0, I / precision)`, or zero if `precision` is infinite, and a share `2 * noise` of answers by chance.
    """

    precision: float
    noise: float

    @property
    def moves(self) -> bool:
        """Whether the codes may differ from zero."""
        return self.precision != float("inf")


@dataclass
class Pairs:
    """
    The pairs of some users, padded: `U` users, `K` pairs at most, `r` codes.

    Args:
        start (`Tensor` `(U, K)`): Margins with the start row, in nats.
        offset (`Tensor` `(U, K)`): Margins at codes of zero in the linear model; the same, unless it was made elsewhere.
        slopes (`Tensor` `(U, K, r)`): Slopes of the margins in the codes.
        mask (`BoolTensor` `(U, K)`): Where there is a pair.
    """

    start: Tensor
    offset: Tensor
    slopes: Tensor
    mask: Tensor


@dataclass
class Fits:
    """
    The fits of one hypothesis.

    Args:
        codes (`Tensor` `(U, r)`): MAP estimates.
        evidence (`Tensor` `(U,)`): Logarithm of the probability of the answers.
        factor (`Tensor` `(U, r, r)`): Lower triangular Cholesky factor of the posterior's precision matrix.
    """

    codes: Tensor
    evidence: Tensor
    factor: Tensor | None


def all_hypotheses() -> list[Hypothesis]:
    """Those that are weighed against each other, the one of chance first."""
    infinite = float("inf")
    return [
        Hypothesis(infinite, CHANCE),
        *(Hypothesis(infinite, noise) for noise in NOISES),
        *(Hypothesis(precision, noise) for precision in PRECISIONS for noise in NOISES),
    ]


def initial_shares(hypotheses: list[Hypothesis], decided: float = 1.0) -> Tensor:
    """
    [`SHARES`] of each hypothesis, `(H,)`; those of a kind share alike. Doubt is worth as much as there is to lose: where the
    start row is undecided on the pairs, part of the share of chance goes to rows of one's own.

    Args:
        hypotheses (`list[Hypothesis]`): Those of [`all_hypotheses`].
        decided (`float`, *optional*, defaults to `1.0`): How far the start row is from a coin on the pairs, on average: 0
            where it gives both answers the same probability, 1 where it is certain.
    """
    chance = SHARES["chance"] * share_of_doubt(decided)
    shares = SHARES | {"chance": chance, "own": SHARES["own"] + SHARES["chance"] - chance}
    kinds = ["own" if h.moves else "chance" if h.noise == CHANCE else "start" for h in hypotheses]
    return torch.tensor([shares[kind] / kinds.count(kind) for kind in kinds], dtype=torch.float64)


def share_of_doubt(decided: float) -> float:
    """
    How much of the doubt holds that answers are by chance: as much as there is to lose, from 0 where the start row is a coin
    on the pairs to 1 where it is as decided as [`DECIDED`] or more.

    ```python
    >>> share_of_doubt(0.0), share_of_doubt(0.45), share_of_doubt(1.0)
    (0.0, 1.0, 1.0)
    ```
    """
    return min(1.0, decided / DECIDED)


def log_likelihood(margins: Tensor, beta: float, noise: float) -> Tensor:
    """
    `log(noise + (1 - 2 noise) sigmoid(beta * margins))`, elementwise: the probability of an answer of which a share of
    `2 * noise` is by chance.

    ```python
    >>> log_likelihood(torch.tensor([0.0, -1000.0]), beta=0.1, noise=0.2).exp()
    tensor([0.5000, 0.2000])
    ```
    """
    if noise == 0:
        return torch.nn.functional.logsigmoid(beta * margins)
    return torch.log(noise + (1 - 2 * noise) * torch.sigmoid(beta * margins))


def fit(pairs: Pairs, hypothesis: Hypothesis, beta: float) -> Fits:
    """The MAP estimate of each user's codes under a hypothesis, with its evidence."""
    noise, precision = hypothesis.noise, hypothesis.precision
    num_users, _, rank = pairs.slopes.shape
    codes = pairs.slopes.new_zeros(num_users, rank)
    if not hypothesis.moves or rank == 0:
        margins = pairs.start if not hypothesis.moves else pairs.offset
        likelihood = (log_likelihood(margins, beta, noise) * pairs.mask).sum(1)
        return Fits(codes, likelihood, None)
    identity = torch.eye(rank, dtype=codes.dtype)

    def objective(codes: Tensor) -> Tensor:
        margins = pairs.offset + torch.einsum("ukr,ur->uk", pairs.slopes, codes)
        return (log_likelihood(margins, beta, noise) * pairs.mask).sum(1) - precision / 2 * codes.square().sum(1)

    def curvature(codes: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the objective `(U, r)` and the Fisher information with the prior's precision `(U, r, r)`."""
        margins = pairs.offset + torch.einsum("ukr,ur->uk", pairs.slopes, codes)
        right = torch.sigmoid(beta * margins)
        slope = (1 - 2 * noise) * right * (1 - right)
        share = noise + (1 - 2 * noise) * right
        score = slope / share if noise else 1 - right
        weight = slope.square() / (share * (1 - share)) if noise else right * (1 - right)
        score, weight = beta * score * pairs.mask, beta**2 * weight * pairs.mask
        gradient = torch.einsum("uk,ukr->ur", score, pairs.slopes) - precision * codes
        return gradient, torch.einsum("uk,ukr,uks->urs", weight, pairs.slopes, pairs.slopes) + precision * identity

    value = objective(codes)
    for _ in range(NEWTON_STEPS):
        gradient, information = curvature(codes)
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(information)).squeeze(-1)
        scale = torch.ones(num_users, 1, dtype=codes.dtype)
        for _ in range(12):
            found = objective(codes + scale * step)
            worse = found < value - SAME_VALUE
            if not worse.any():
                break
            scale = torch.where(worse[:, None], scale / 2, scale)
        better = found >= value - SAME_VALUE
        codes = torch.where(better[:, None], codes + scale * step, codes)
        value = torch.where(better, found, value)
        if (scale * step).abs().max() < TOLERANCE:
            break
    factor = torch.linalg.cholesky(curvature(codes)[1])
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    prior = rank / 2 * torch.tensor(precision, dtype=codes.dtype).log()
    return Fits(codes, value + prior - log_det / 2, factor)


@dataclass
class Draws:
    """
    Draws from the posterior of each user's codes under a hypothesis, by importance sampling.

    Args:
        codes (`Tensor` `(U, S, r)`): The draws.
        weights (`Tensor` `(U, S)`): The weight of each, which sum to one.
        evidence (`Tensor` `(U,)`): Logarithm of the probability of the answers.
        modes (`Tensor` `(U, r)`): MAP estimates.
    """

    codes: Tensor
    weights: Tensor
    evidence: Tensor
    modes: Tensor


def draw(pairs: Pairs, hypothesis: Hypothesis, beta: float, noise: Tensor) -> Draws:
    """
    Half of the draws come from Laplace's approximation of the posterior and half from the prior, which covers what the first
    half misses; each is weighted by the posterior over the mixture of the two.
    """
    fits = fit(pairs, hypothesis, beta)
    num_users, _, rank = pairs.slopes.shape
    if fits.factor is None:
        one = pairs.slopes.new_ones(num_users, 1)
        return Draws(fits.codes[:, None], one, fits.evidence, fits.codes)
    half = len(noise) // 2
    near = torch.linalg.solve_triangular(fits.factor.mT, noise[:half, :rank].T.expand(num_users, -1, -1), upper=True)
    near = fits.codes[:, None] + near.mT
    far = (noise[half:, :rank] / hypothesis.precision**0.5).expand(num_users, -1, -1)
    codes = torch.cat([near, far], dim=1)
    margins = pairs.offset[:, None] + torch.einsum("usr,ukr->usk", codes, pairs.slopes)
    likelihood = (log_likelihood(margins, beta, hypothesis.noise) * pairs.mask[:, None]).sum(2)
    prior = rank / 2 * math.log(hypothesis.precision) - hypothesis.precision / 2 * codes.square().sum(2)
    distance = torch.einsum("usr,urq->usq", codes - fits.codes[:, None], fits.factor).square().sum(2)
    laplace = fits.factor.diagonal(dim1=1, dim2=2).log().sum(1)[:, None] - distance / 2
    log_weights = likelihood + prior - torch.logaddexp(laplace, prior) + math.log(2)
    evidence = log_weights.logsumexp(1) - math.log(codes.shape[1])
    return Draws(codes, log_weights.softmax(1), evidence, fits.codes)


def leave_one_out(pairs: Pairs, hypothesis: Hypothesis, draws: Draws, beta: float) -> Tensor:
    """
    What a hypothesis says of each answer when it is left out, to be weighed with the other hypotheses.

    Args:
        pairs ([`Pairs`]): The pairs of some users.
        hypothesis ([`Hypothesis`]): What `draws` were made under.
        draws ([`Draws`]): Of these users.
        beta (`float`): The beta of the loss.

    Returns:
        Float `(2, U, K)`, two logarithms: the mean of `1 / p` over the draws, `p` the probability of the answer, and that of
        `sigmoid(beta * margin) / p`. Their ratio, each weighted by the hypotheses' posterior, is the probability of the answer
        given all others of the user (importance sampling).
    """
    if hypothesis.moves:
        margins = pairs.offset[:, None] + torch.einsum("usr,ukr->usk", draws.codes, pairs.slopes)
    else:
        margins = pairs.start[:, None]
    log_weights = draws.weights.log()[..., None] - log_likelihood(margins, beta, hypothesis.noise)
    right = log_weights + torch.nn.functional.logsigmoid(beta * margins)
    return torch.stack([log_weights.logsumexp(1), right.logsumexp(1)])


def learn_shares(evidence: Tensor, initial: Tensor, steps: int = 200) -> Tensor:
    """
    How common each hypothesis is among the users, `(H,)`: the mode of the posterior that starts from `initial`, which counts
    as [`PRIOR_WEIGHT`] users, by expectation-maximization. `evidence` is `(H, U)`.
    """
    shares = initial
    for _ in range(steps):
        weights = posterior(evidence, shares)
        new = (PRIOR_WEIGHT * initial + weights.sum(1)) / (PRIOR_WEIGHT + evidence.shape[1])
        if (new - shares).abs().max() < 1e-6:
            return new
        shares = new
    return shares


def posterior(evidence: Tensor, shares: Tensor) -> Tensor:
    """The probability of each hypothesis for each user, `(H, U)`."""
    return (evidence + shares.log()[:, None]).softmax(dim=0)

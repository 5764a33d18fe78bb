"""Which row each user gets, and what it is worth: the posteriors of all hypotheses together, asked about pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fit import (
    PRECISIONS,
    Draws,
    Hypothesis,
    Pairs,
    all_hypotheses,
    draw,
    initial_shares,
    learn_shares,
    leave_one_out,
    posterior,
    share_of_doubt,
)
from .sharpness import Sharpness, learn_sharpness


NUM_DRAWS = 192  # of each hypothesis
NUM_ASKED = 96  # pairs that the choice of a row is judged on, at most
NUM_OUTCOMES = 400  # draws of what a user may be like, for intervals
NUMBERS_AT_ONCE = 1 << 18  # of users times draws times pairs
LEAST_GAIN = 1e-3  # of expected accuracy, for a row to leave the start row
FEW = 4  # pairs; fewer cannot agree often enough to make up for the doubt that they are by chance
WORTH_OF_FEW = 0.15  # of expected accuracy, that fewer may cost where the start row is a coin on the pairs
MANY = 10  # pairs of a user, from which on they can tell between rows in the same direction
LEAST_PROBABILITY = 0.7  # of a gain, for a user with so many pairs to leave the start row
SCALES = (0.25, 0.5, 0.75, 1.0)
CONFIDENCE = 0.9


@dataclass
class LinearMargins:
    """
    The margins of the pairs of several users as linear functions of the codes of their users.

    Args:
        start (`Tensor` `(n,)`): Margins with the start row of each pair's user, in nats.
        offset (`Tensor` `(n,)`): Margins at codes of zero in the linear model.
        slopes (`Tensor` `(n, rank)`): Slopes in the codes.
        owner (`LongTensor` `(n,)`): The number of each pair's user.
        num_users (`int`): The number of users, with or without pairs.
    """

    start: Tensor
    offset: Tensor
    slopes: Tensor
    owner: Tensor
    num_users: int

    def counts(self) -> Tensor:
        """The number of pairs of each user, `(num_users,)`."""
        return torch.bincount(self.owner, minlength=self.num_users)


@dataclass
class Choice:
    """
    What was chosen for one user.

    Args:
        codes (`Tensor` `(rank,)`): The codes of the row; zero is the start row.
        hypothesis ([`Hypothesis`]): The most probable one in which codes differ from zero.
        accuracy, start_accuracy (`float`): Expected accuracies with the chosen row and the start row, after [`Sharpness`].
        low, high (`float`): The interval of the first.
        probability_of_gain (`float`): How probable it is that the chosen row is right more often than the start row.
    """

    codes: Tensor
    hypothesis: Hypothesis
    accuracy: float
    start_accuracy: float
    low: float
    high: float
    probability_of_gain: float


def choose(margins: LinearMargins, beta: float, asks_others: bool = True) -> dict[int, Choice]:
    """
    A [`Choice`] for each user with pairs, by the user's number.

    Candidates are the start row, and the mode of what the user is like if not like the start row: the mean of the modes of
    all hypotheses, or, with fewer pairs than [`FEW`], that of the widest without noise, which so few cannot tell from a
    taste. For users with [`MANY`] pairs also the mean, the most probable mode, and steps on the way there. The best of these
    takes the place of the start row if its expected accuracy is higher; for a few pairs it may be lower, the less the start
    row has to lose ([`WORTH_OF_FEW`]). It is asked on pairs of other users who join
    (`asks_others`), and on the user's own, each of these as if its answer were not known (leave-one-out). How far to trust
    such expectations is learned from them, and changes what is told, not what is chosen ([`Sharpness`]).
    """
    hypotheses = all_hypotheses()
    noise = torch.randn(
        NUM_DRAWS, margins.slopes.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    asked = torch.linspace(0, len(margins.owner) - 1, min(NUM_ASKED, len(margins.owner))).round().long()
    evidence = torch.zeros(len(hypotheses), margins.num_users, dtype=torch.float64)
    draws: list[Draws] = []
    parts: list[Tensor] = []  # of each chunk `(H, 2, U, K)`
    chunks = list(_chunks(margins))
    for users, pairs, _ in chunks:
        draws = [draw(pairs, h, beta, noise) for h in hypotheses]
        evidence[:, users] = torch.stack([found.evidence for found in draws])
        each = zip(hypotheses, draws, strict=True)
        parts.append(torch.stack([leave_one_out(pairs, h, found, beta) for h, found in each]))
    with_pairs = margins.counts() > 0
    decided = float((2 * torch.sigmoid(beta * margins.start.double()) - 1).abs().mean())
    shares = learn_shares(evidence[:, with_pairs], initial_shares(hypotheses, decided))
    weights, doubt = posterior(evidence, shares), share_of_doubt(decided)
    left_out = [
        _left_out(weights[:, chunk[0]], part)[chunk[1].mask] for chunk, part in zip(chunks, parts, strict=True)
    ]
    sharpness = learn_sharpness(torch.cat(left_out), NUM_OUTCOMES)
    choices = {}
    for (users, pairs, numbers), part in zip(chunks, parts, strict=True):
        if len(chunks) > 1:  # drawn again, as the draws of all would not fit
            draws = [draw(pairs, h, beta, noise) for h in hypotheses]
        for place, user in enumerate(users.tolist()):
            own = numbers[place][pairs.mask[place]][:NUM_ASKED]
            others = asked[margins.owner[asked] != user] if asks_others else asked[:0]
            choices[user] = _choose_for_one(
                margins,
                own,
                others,
                hypotheses,
                draws,
                weights[:, user],
                part[:, :, place : place + 1, : len(own)],
                place,
                beta,
                sharpness,
                doubt,
            )
    return choices


def _left_out(weights: Tensor, parts: Tensor) -> Tensor:
    """The probability of each answer given all others of its user, `(U, K)`: `parts` `(H, 2, U, K)` of [`leave_one_out`]."""
    without, right = (weights.log()[:, None, :, None] + parts).logsumexp(0)
    return (right - without).exp()


def _chunks(margins: LinearMargins) -> Iterator[tuple[Tensor, Pairs, Tensor]]:
    """Users with pairs, those with about as many together: their numbers, padded pairs, and the numbers of these."""
    counts = margins.counts()
    order = torch.argsort(margins.owner, stable=True)
    ends = counts.cumsum(0)
    by_count = torch.argsort(counts, stable=True)
    by_count = by_count[counts[by_count] > 0]
    start = 0
    while start < len(by_count):
        stop = start + 1
        while stop < len(by_count) and (stop + 1 - start) * NUM_DRAWS * int(counts[by_count[stop]]) <= NUMBERS_AT_ONCE:
            stop += 1
        users = by_count[start:stop]
        longest = int(counts[users].max())
        place = (ends - counts)[users, None] + torch.arange(longest)
        mask = torch.arange(longest) < counts[users, None]
        numbers = order[place.clamp(max=len(order) - 1)]
        pairs = Pairs(
            margins.start[numbers].double() * mask,
            margins.offset[numbers].double() * mask,
            margins.slopes[numbers].double() * mask[..., None],
            mask,
        )
        yield users, pairs, numbers
        start = stop


def _choose_for_one(
    margins: LinearMargins,
    own: Tensor,
    others: Tensor,
    hypotheses: Sequence[Hypothesis],
    draws: Sequence[Draws],
    weights: Tensor,
    parts: Tensor,
    place: int,
    beta: float,
    sharpness: Sharpness,
    doubt: float,
) -> Choice:
    numbers = torch.cat([own, others])
    start, offset = margins.start[numbers].double(), margins.offset[numbers].double()
    slopes = margins.slopes[numbers].double()
    # for each hypothesis and draw: its weight, and how probable it makes the answers to the pairs asked
    log_weights, right = [], []
    for hypothesis, found, weight in zip(hypotheses, draws, weights, strict=True):
        codes = found.codes[place]
        found_margins = offset + codes @ slopes.T if hypothesis.moves else start.expand(len(codes), -1)
        log_weights.append((weight * found.weights[place]).log())
        right.append(torch.sigmoid(beta * found_margins))
    log_weight, truth = torch.cat(log_weights), torch.cat(right)
    of_others = truth[:, len(own) :]
    expected = torch.cat([_left_out(weights[:, None], parts)[0], log_weight.exp() @ of_others])
    moves = torch.tensor([hypothesis.moves for hypothesis in hypotheses])
    is_own = torch.cat([m.expand(len(w)) for m, w in zip(moves, log_weights, strict=True)])
    expected_if_own = torch.cat(
        [_left_out(weights[moves, None], parts[moves])[0], log_weight[is_own].softmax(0) @ of_others[is_own]]
    )
    candidates = _candidates(hypotheses, draws, weights, place, len(own))
    outcome = offset + candidates @ slopes.T
    outcome[0] = start  # the start row is no linear model
    accuracies = _accuracy(expected, outcome)
    best = _best_if_own(outcome, expected_if_own)
    if accuracies[best] < accuracies[0] + LEAST_GAIN - (WORTH_OF_FEW * (1 - doubt) if len(own) < FEW else 0):
        best = 0
    if torch.equal(outcome[best] > 0, outcome[0] > 0):  # a row that changes no answer is nothing to trust
        best = 0
    picked = torch.multinomial(log_weight.exp(), NUM_OUTCOMES, True, generator=torch.Generator().manual_seed(0))
    sampled = truth[picked]
    gains = (
        float((_accuracy(sampled, outcome[best]) > _accuracy(sampled, outcome[0])).double().mean()) if best else 0.0
    )
    if len(own) >= MANY and gains < LEAST_PROBABILITY:
        best, gains = 0, 0.0
    told, chosen = sharpness.of(expected), _accuracy(sharpness.of_draws(sampled), outcome[best])
    low, high = chosen.quantile(
        torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=chosen.dtype)
    ).tolist()
    value = float(_accuracy(told, outcome[best]))
    moving = max((h for h in range(len(hypotheses)) if hypotheses[h].moves), key=lambda h: float(weights[h]))
    return Choice(
        candidates[best],
        hypotheses[moving],
        value,
        float(_accuracy(told, outcome[0])),
        min(low, value),
        max(high, value),
        gains,
    )


def _accuracy(truth: Tensor, outcome: Tensor) -> Tensor:
    """How often a row with margins `outcome` `(n,)` is expected to be right; `truth` `(..., n)`: how probable answers are."""
    return torch.where(outcome > 0, truth, 1 - truth).mean(-1)


def _best_if_own(outcome: Tensor, expected: Tensor) -> int:
    """The best candidate for a user who has a row of one's own: of those that are as good the nearest."""
    accuracies = _accuracy(expected, outcome)
    return 1 + int(accuracies[1:].argmax())


def _candidates(
    hypotheses: Sequence[Hypothesis], draws: Sequence[Draws], weights: Tensor, place: int, num_pairs: int
) -> Tensor:
    """Codes `(c, rank)` to choose from, the start row first: one beside it, or several for a user with [`MANY`] pairs."""
    if num_pairs < FEW:
        mode = draws[hypotheses.index(Hypothesis(min(PRECISIONS), 0.0))].modes[place]
        return torch.stack([torch.zeros_like(mode), mode])
    moving = [h for h, hypothesis in enumerate(hypotheses) if hypothesis.moves]
    total = weights[moving].sum().clamp(min=1e-300)
    means = torch.stack([draws[h].weights[place] @ draws[h].codes[place] for h in moving])
    modes = torch.stack([draws[h].modes[place] for h in moving])
    share = weights[moving] / total
    if num_pairs < MANY:
        return torch.stack([torch.zeros_like(modes[0]), share @ modes])
    ends = [share @ means, share @ modes, modes[int(share.argmax())]]
    steps = torch.stack([scale * end for end in ends for scale in SCALES])
    steps = steps[steps.square().sum(1).argsort()]  # from near to far
    return torch.cat([torch.zeros_like(steps[:1]), steps])

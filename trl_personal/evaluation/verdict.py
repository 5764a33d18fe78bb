"""Whether users gain from their own soft prompts: statistics of evaluated pairs, and a verdict in one sentence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..agreement import encode
from ..arrays import BoolArray, FloatArray, IntArray
from ..intervals import Interval, cluster_mean, cluster_share
from .report import GroupResult, PersonalizationReport, UserResult


WITHOUT_USERS = {"vanilla": "vanilla DPO", "generic": "the generic prompt"}  # the gain is over the better of these
CONTROLS = WITHOUT_USERS | {"swapped": "another user's prompt"}  # each has to be beaten
OTHER_WAYS = {  # to personalize; how the verdict calls them
    "user_id_text": "the user id as text",
    "in_context": "earlier choices in the prompt",
    "lora_per_user": "a LoRA for each user",
}
MIN_PROMPTS = 10  # fewer independent prompts say nothing reliable, however clear they look
NUM_BINS = 10  # bins of confidence for the calibration error


@dataclass(frozen=True)
class _Pairs:
    """Pairs as arrays `(n,)`. `right` and `margins` have one for each scorer; `weights` make users count the same."""

    users: IntArray
    prompts: IntArray
    weights: FloatArray
    margins: Mapping[str, FloatArray]
    right: Mapping[str, FloatArray]

    def where(self, mask: BoolArray | IntArray) -> "_Pairs":
        return _Pairs(
            self.users[mask],
            self.prompts[mask],
            self.weights[mask],
            {name: values[mask] for name, values in self.margins.items()},
            {name: values[mask] for name, values in self.right.items()},
        )


def evaluate_margins(
    own: ArrayLike,
    generic: ArrayLike,
    user_ids: Sequence[str | None],
    prompt_ids: Sequence[str | int],
    *,
    swapped: ArrayLike | None = None,
    opposite: ArrayLike | None = None,
    vanilla: ArrayLike | None = None,
    others: Mapping[str, ArrayLike] | None = None,
    known_users: Collection[str] | None = None,
    agrees_with_majority: ArrayLike | None = None,
    beta: float = 0.1,
    confidence: float = 0.95,
) -> PersonalizationReport:
    """
    Say whether users gain from their own soft prompts, and who does.

    A margin is how much more than the reference the policy prefers chosen to rejected, in nats ([`pair_margins`]); a pair is
    right if it is above zero. Means are over users, each counting the same. Intervals keep all pairs about a prompt together
    ([`~intervals.cluster_mean`]).

    The verdict is a gain only if the user's own prompt beats **each** of what was measured: the generic prompt, vanilla DPO,
    and another user's prompt (`swapped`). Which of the first two is the better one is known from the same pairs only, so both
    have to be beaten; and another user's prompt shows what is due to having any soft prompt. As every test must pass, a false
    gain is at most as frequent as in a single one. The prompt of an opposite user is shown, but is no part of the verdict: it
    pulls the other way, so nearly every prompt beats it.

    Args:
        own (`ArrayLike`): Margins `(n,)` with the user's own prompt. Unknown users have the generic one.
        generic (`ArrayLike`): Margins `(n,)` with the generic prompt.
        user_ids (`Sequence`): The user of each pair; `None` for the generic user.
        prompt_ids (`Sequence`): The prompt of each pair, its text or a number.
        swapped (`ArrayLike`, *optional*): Margins `(n,)` with another user's prompt, by a rule that knows no preferences.
            Without them the verdict is never a gain: what any soft prompt would give cannot be told from what is personal.
        opposite (`ArrayLike`, *optional*): Margins `(n,)` with the prompt of a user on the other side of the same conflict.
        vanilla (`ArrayLike`, *optional*): Margins `(n,)` of a model trained by vanilla DPO on all users.
        others (`Mapping[str, ArrayLike]`, *optional*): Margins `(n,)` of other ways to personalize, such as `OTHER_WAYS`. A
            gain does not have to beat them, but the verdict says which of them it does not clearly beat.
        known_users (`Collection[str]`, *optional*): Users the model was trained on; by default all. The verdict is on them.
        agrees_with_majority (`ArrayLike`, *optional*): `(n,)`, 1 if the user judged a pair like the majority, 0 if not, NaN if
            there is none ([`majority_agreement`]).
        beta (`float`, *optional*, defaults to `0.1`): The `beta` of the training, which scales margins to probabilities.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true mean.

    Returns:
        [`PersonalizationReport`].

    Raises:
        `ValueError`: if there are no pairs, lists differ in length, or a margin is not a finite number.

    ```python
    >>> report = evaluate_margins([1.0, -1.0, 2.0], [-1.0, -1.0, 1.0], ["ann", "ann", "bo"], ["p", "q", "p"])
    >>> report.groups["known"].accuracy["own"].value, report.groups["known"].accuracy["generic"].value
    (0.75, 0.5)
    >>> report.verdict
    'No evidence of gain: 2 prompts are too few to tell, at least 10 are needed.'
    ```
    """
    measured = {"own": own, "generic": generic, "swapped": swapped, "opposite": opposite, "vanilla": vanilla}
    scored = measured | dict(others or {})
    margins = {name: np.asarray(values, np.float64) for name, values in scored.items() if values is not None}
    majority = (
        np.full(len(user_ids), np.nan) if agrees_with_majority is None else np.asarray(agrees_with_majority, float)
    )
    _check(margins | {"agrees_with_majority": majority}, len(user_ids), len(prompt_ids))
    users, names = encode(user_ids)
    is_known = np.array([name is not None and (known_users is None or name in known_users) for name in names])
    counts = np.bincount(users)
    pairs = _Pairs(
        users=users,
        prompts=encode(prompt_ids)[0],
        weights=1 / counts[users],
        margins=margins,
        right={name: (values > 0).astype(np.float64) for name, values in margins.items()},
    )
    minority = _minority(users, majority, len(names))
    members = {
        **{"all": np.ones_like(is_known), "known": is_known, "unknown": ~is_known},
        "minority": minority == 1,
    }
    known = pairs.where(is_known[users])
    advantages = _advantages(known, confidence)
    gain = _smallest([advantages[name] for name in WITHOUT_USERS if name in advantages])
    num_prompts = len(np.unique(known.prompts))
    is_clear = num_prompts >= MIN_PROMPTS and all(advantages[name].low > 0 for name in CONTROLS if name in advantages)
    has_gain = is_clear and "swapped" in advantages
    results = _user_results(pairs, names, is_known, minority, confidence)
    known_results = [user for user in results if user.known]
    return PersonalizationReport(
        users=results,
        groups={name: _group(pairs.where(mask[users]), confidence) for name, mask in members.items() if mask.any()},
        worst_user=_lowest(known_results, share=0.0),
        worst_decile=_lowest(known_results, share=0.1),
        calibration={name: calibration_error(values, beta) for name, values in known.margins.items() if len(values)},
        advantages=advantages,
        gain=gain,
        has_gain=has_gain,
        verdict=_sentence(has_gain, gain, advantages, known_results, num_prompts),
    )


def calibration_error(margins: ArrayLike, beta: float, num_bins: int = NUM_BINS) -> float:
    """
    Expected calibration error of `sigmoid(beta * margin)`, the probability of the chosen answer: how far the confidence in
    the preferred answer is from how often it is right, mean over pairs, in bins of equal width from 0.5 to 1.

    ```python
    >>> round(calibration_error([np.log(9), np.log(9), -np.log(9)], beta=1.0), 3)  # 0.9 sure, right 2 times in 3
    0.233
    ```
    """
    scaled = beta * np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(scaled)))
    right = (scaled > 0).astype(np.float64)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(np.intp), num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(scaled))


def _user_results(
    pairs: _Pairs, names: Sequence[str | None], is_known: BoolArray, minority: FloatArray, confidence: float
) -> tuple[UserResult, ...]:
    order = np.argsort(pairs.users, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(pairs.users))[:-1])
    return tuple(
        _user_result(pairs.where(rows[user]), names[user], bool(is_known[user]), minority[user], confidence)
        for user in range(len(names))
    )


def _user_result(pairs: _Pairs, name: str | None, known: bool, minority: float, confidence: float) -> UserResult:
    accuracy = {
        scorer: cluster_share(values, pairs.prompts, confidence=confidence) for scorer, values in pairs.right.items()
    }
    return UserResult(
        user_id=name,
        known=known,
        minority=None if np.isnan(minority) else bool(minority),
        num_pairs=len(pairs.users),
        num_prompts=len(np.unique(pairs.prompts)),
        accuracy=accuracy,
        mean_margin={scorer: float(values.mean()) for scorer, values in pairs.margins.items()},
        gain=accuracy["own"].value - max(accuracy[name].value for name in WITHOUT_USERS if name in accuracy),
    )


def _group(pairs: _Pairs, confidence: float) -> GroupResult:
    return GroupResult(
        num_users=len(np.unique(pairs.users)),
        num_pairs=len(pairs.users),
        accuracy={
            scorer: cluster_share(values, pairs.prompts, pairs.weights, confidence=confidence)
            for scorer, values in pairs.right.items()
        },
        mean_margin={
            scorer: float(np.average(values, weights=pairs.weights)) for scorer, values in pairs.margins.items()
        },
    )


def _advantages(pairs: _Pairs, confidence: float) -> dict[str, Interval]:
    if not len(pairs.users):
        return {}
    own, advantages = pairs.right["own"], {}
    for name in sorted(pairs.right.keys() - {"own"}, key=[*CONTROLS, "opposite", *OTHER_WAYS, *pairs.right].index):
        found = cluster_mean(own - pairs.right[name], pairs.prompts, pairs.weights, confidence=confidence)
        advantages[name] = Interval(found.value, max(found.low, -1.0), min(found.high, 1.0))
    return advantages


def _smallest(advantages: Sequence[Interval]) -> Interval | None:
    """The smallest advantage; its ends hold it wherever the smallest truly is."""
    if not advantages:
        return None
    return Interval(*(min(getattr(advantage, end) for advantage in advantages) for end in ("value", "low", "high")))


def _lowest(users: Sequence[UserResult], share: float) -> dict[str, float]:
    """Mean accuracy of the `share` of users (at least one) for whom it is lowest, for each scorer."""
    if not users:
        return {}
    number = max(1, math.ceil(share * len(users)))
    return {
        scorer: float(np.mean(sorted(user.accuracy[scorer].value for user in users)[:number]))
        for scorer in users[0].accuracy
    }


def _minority(users: IntArray, agrees: FloatArray, num_users: int) -> FloatArray:
    """For each user 1 if in the minority, 0 if not, NaN if no pair has a majority."""
    known = ~np.isnan(agrees)
    counts = np.bincount(users[known], minlength=num_users)
    shares = np.bincount(users[known], weights=agrees[known], minlength=num_users) / np.maximum(counts, 1)
    return np.where(counts == 0, np.nan, (shares < 0.5).astype(np.float64))


def _sentence(
    has_gain: bool,
    gain: Interval | None,
    advantages: Mapping[str, Interval],
    users: Sequence[UserResult],
    num_prompts: int,
) -> str:
    if gain is None:
        return "No evidence of gain: there are no pairs of known users."
    if num_prompts < MIN_PROMPTS:
        return f"No evidence of gain: {num_prompts} prompts are too few to tell, at least {MIN_PROMPTS} are needed."
    measured = [CONTROLS[name] for name in WITHOUT_USERS if name in advantages]
    found = f"{gain:+.3f} pair accuracy over {' and '.join(measured)}"
    if has_gain:
        ahead, behind = (sum(sign * user.gain > 0 for user in users) for sign in (1, -1))
        return (
            f"These users gain: {found}, mean of {len(users)} known users, of whom {ahead} do better and {behind} worse"
            f"{_not_measured(advantages)}{_as_good(advantages)}."
        )
    unbeaten = [CONTROLS[name] for name in CONTROLS if name in advantages and advantages[name].low <= 0]
    if unbeaten:
        reason = f"the user's own prompt does not clearly beat {' or '.join(unbeaten)}{_not_measured(advantages)}"
    else:
        reason = "not tested against another user's prompt, so the gain may not be personal"
        reason += _not_measured({*advantages, "swapped"})
    return f"No evidence of gain: {found}; {reason}."


def _not_measured(measured: Collection[str]) -> str:
    missing = [name for key, name in CONTROLS.items() if key not in measured]
    return f" ({' and '.join(missing)} not measured)" if missing else ""


def _as_good(advantages: Mapping[str, Interval]) -> str:
    ways = advantages.keys() - CONTROLS.keys() - {"opposite"}
    names = [OTHER_WAYS.get(name, name) for name, found in advantages.items() if name in ways and found.low <= 0]
    return f"; not clearly better than {' or '.join(names)}" if names else ""


def _check(arrays: Mapping[str, FloatArray], num_users: int, num_prompts: int) -> None:
    if not num_users:
        raise ValueError("There are no pairs to evaluate.")
    lengths = {"user_ids": num_users, "prompt_ids": num_prompts} | {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1 or any(array.ndim != 1 for array in arrays.values()):
        raise ValueError(f"Each pair needs one value in every list, found these lengths: {lengths}.")
    for name, array in arrays.items():
        is_bad = ~np.isfinite(array) if name != "agrees_with_majority" else np.isinf(array)
        if is_bad.any():
            raise ValueError(
                f"`{name}` has {int(is_bad.sum())} values that are not finite numbers, the first for pair "
                f"{int(np.flatnonzero(is_bad)[0])}. Did the training diverge?"
            )

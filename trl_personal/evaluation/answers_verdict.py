"""Whether users get answers of their own: the answers' half of the verdict, and whether answers have collapsed."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import FloatArray, IntArray
from ..audit.text_features import LOGGED
from ..intervals import Interval, cluster_mean, cluster_share
from ..users import UserId
from .answer_features import ANSWER_FEATURES, answer_features, check_answers, count_words, distinct_n
from .answers_report import MEASURES, AnswersReport, UserAnswers
from .permutation import NUM_PERMUTATIONS, flip_differences, permute_pairs, permute_users, preferred_directions
from .verdict import MIN_PROMPTS


LEVEL = 0.05  # p-values below it count
SHARES = {"repetition", "empty"}  # measures within 0 and 1
# how much worse than the base's own answers a measure is, with the whole interval, where answers have collapsed
COLLAPSE = {"nats_per_token": 0.5, "repetition": 0.2, "empty": 0.1}
IN_WORDS = {"nats_per_token": "nats per token", "repetition": "repeated bigrams", "empty": "empty answers"}
MOST_NAMED = 3  # features in a sentence
MAX_USERS_IN_PAIRS = 50  # users of whom each pair is compared
Measures = dict[str, FloatArray]


def evaluate_answers(
    answers: Mapping[UserId, Sequence[str]],
    prompts: Sequence[str],
    *,
    base_answers: Mapping[UserId, Sequence[str]] | None = None,
    nats_per_token: Mapping[UserId, ArrayLike] | None = None,
    base_nats_per_token: Mapping[UserId, ArrayLike] | None = None,
    pairs: Mapping[UserId, Sequence[tuple[str, str, str]]] | None = None,
    confidence: float = 0.95,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> AnswersReport:
    """
    Say whether users get answers of their own, and whether the answers are still worth reading.

    Differences between users are tested by exchanging users within prompts ([`~evaluation.permutation.permute_users`]), in all
    of `ANSWER_FEATURES` as one test; pairs of users, and users and the generic one, by
    [`~evaluation.permutation.flip_differences`]. Means and differences of single measures come with intervals, in which a
    prompt is a cluster; they describe, and are no part of the verdict.

    Answers have collapsed where a measure of `COLLAPSE` is worse than that of the base's own answers by more than the number
    there, with the whole interval.

    Args:
        answers (`Mapping`): For each user the answers, in the order of `prompts`; `None` is the generic user.
        prompts (`Sequence[str]`): The texts of the prompts.
        base_answers (`Mapping`, *optional*): The base model's own answers: under `None` to the plain prompts, and for users to
            the prompts with their wish in words, where they have one ([`~evaluation.fluency.base_answers`]).
        nats_per_token (`Mapping`, *optional*): Of the answers of users, under the base that is given the wish
            ([`~evaluation.fluency.nats_per_token`]): `(len(prompts),)` each, NaN for empty answers.
        base_nats_per_token (`Mapping`, *optional*): The same of the base's own answers.
        pairs (`Mapping`, *optional*): For users some of their preferences as texts, (prompt, chosen, rejected): whether their
            answers lean the same way is tested then.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true mean.
        num_permutations (`int`, *optional*, defaults to `1999`): How often users are exchanged.
        seed (`int`, *optional*, defaults to `0`): Random seed of the permutations.

    Returns:
        [`AnswersReport`].

    Raises:
        `ValueError`: if a user has not one answer to each prompt, or there are no prompts.

    ```python
    >>> report = evaluate_answers({"ann": ["Yes."], "bo": ["Yes, by all means."]}, ["May I?"])
    >>> report.users[1].minus_others["words"].value
    3.0
    >>> report.verdict
    'Answers: 1 prompts are too few to tell, at least 10 are needed.'
    ```
    """
    if not prompts:
        raise ValueError("There are no prompts, so there are no answers to compare.")
    base = dict(base_answers or {})
    check_answers(answers, len(prompts))
    check_answers(base, len(prompts))
    known = [user for user in answers if user is not None]
    measures = {user: _measure(texts, prompts, (nats_per_token or {}).get(user)) for user, texts in answers.items()}
    of_base = {user: _measure(texts, prompts, (base_nats_per_token or {}).get(user)) for user, texts in base.items()}
    tested = [*known, *([None] if None in answers else [])]
    features = np.stack([answer_features(answers[user], prompts) for user in tested]) if tested else np.empty(0)
    p_values: dict[str, float] = {}
    apart, p_fit, p_generic = None, None, np.full(len(known), np.nan)
    if len(known) >= 2:
        of_pairs = _features_of_pairs(known, pairs or {})
        directions = None if of_pairs is None else preferred_directions(*of_pairs, len(known))
        test = permute_users(features[: len(known)], directions, num_permutations, seed)
        p_values = dict(zip(ANSWER_FEATURES, test.p_values.tolist(), strict=True))
        if of_pairs is not None and test.fit_p_value is not None:
            by_pairs = permute_pairs(features[: len(known)], *of_pairs, num_permutations, seed)
            p_fit = max(test.fit_p_value, by_pairs)
        if len(known) <= MAX_USERS_IN_PAIRS:
            one, other = np.triu_indices(len(known), k=1)
            p_pairs = flip_differences(features[one] - features[other], num_permutations, seed)
            apart = int((p_pairs < LEVEL).sum())
    if len(tested) > len(known) >= 1:
        p_generic = flip_differences(features[:-1] - features[-1], num_permutations, seed)
    of_generic = measures.get(None, {})
    totals = _totals([measures[user] for user in known])
    users = tuple(
        _user(
            user,
            answers[user],
            measures[user],
            confidence,
            generic=of_generic,
            mean_of_others=_without(measures[user], totals, len(known)),
            base=of_base.get(user, of_base.get(None, {})),
            p_generic=None if np.isnan(p) else float(p),
        )
        for user, p in zip(known, p_generic, strict=True)
    )
    generic, own_base = None, None
    if None in answers:
        generic = _user(None, answers[None], of_generic, confidence, base=of_base.get(None, {}))
    if None in base:
        own_base = _user(None, base[None], of_base[None], confidence)
    enough = len(prompts) >= MIN_PROMPTS
    has_difference = enough and bool(p_values) and min(p_values.values()) < LEVEL
    return AnswersReport(
        num_prompts=len(prompts),
        users=users,
        generic=generic,
        base=own_base,
        p_values=p_values,
        num_pairs=len(known) * (len(known) - 1) // 2,
        num_pairs_apart=apart,
        p_fit=p_fit,
        has_difference=has_difference,
        is_personal=has_difference and (p_fit is None or p_fit < LEVEL),
        collapse=_collapse(users, generic, of_base),
        verdict=_sentence(len(prompts), users, p_values, p_fit, apart),
    )


def overall_verdict(has_gain: bool, report: AnswersReport) -> str:
    """
    Both halves in one sentence: what pairs say (`has_gain`) and what answers say.

    ```python
    >>> overall_verdict(True, evaluate_answers({"ann": ["Yes."] * 10, "bo": ["Yes."] * 10}, list("abcdefghij")))
    'Personal on pairs, not in the answers yet.'
    ```
    """
    if report.num_prompts < MIN_PROMPTS or not report.p_values:
        found = "Personal on pairs" if has_gain else "Not shown to be personal on pairs"
        text = f"{found}; the answers are too few to tell."
    elif has_gain and report.is_personal:
        text = f"Personal on pairs and in the answers{', which have collapsed' if report.collapse else ''}."
    elif has_gain and report.has_difference:
        text = "Personal on pairs, not in the answers yet: they differ, but do not lean towards what users chose."
    elif has_gain:
        text = "Personal on pairs, not in the answers yet."
    elif report.has_difference:
        text = "Answers differ between users, but pairs are no evidence that users gain."
    else:
        text = "Not shown to be personal, neither on pairs nor in the answers."
    return f"{text} {report.collapse}" if report.collapse else text


def _measure(texts: Sequence[str], prompts: Sequence[str], nats: ArrayLike | None) -> Measures:
    """`MEASURES` of each answer, `(len(prompts),)` each, without what is not known."""
    found = dict(zip(ANSWER_FEATURES, answer_features(texts, prompts).T, strict=True))
    found["words"] = np.array([count_words(text) for text in texts], dtype=np.float64)
    found["empty"] = (found["words"] == 0).astype(np.float64)
    if nats is not None:
        found["nats_per_token"] = np.asarray(nats, dtype=np.float64)
    return {name: found[name] for name in MEASURES if name in found}


def _user(
    user: UserId,
    texts: Sequence[str],
    own: Measures,
    confidence: float,
    *,
    generic: Measures | None = None,
    mean_of_others: Measures | None = None,
    base: Measures | None = None,
    p_generic: float | None = None,
) -> UserAnswers:
    minus_base = _differences(own, base or {}, confidence)
    return UserAnswers(
        user_id=None if user is None else str(user),
        means={name: found for name, values in own.items() if (found := _mean(name, values, confidence)) is not None},
        distinct_2=distinct_n(texts, 2),
        minus_generic=_differences(own, generic or {}, confidence),
        minus_others=_differences(own, mean_of_others or {}, confidence),
        minus_base=minus_base,
        p_generic=p_generic,
        collapsed_in=tuple(
            name for name, most in COLLAPSE.items() if name in minus_base and minus_base[name].low > most
        ),
    )


def _totals(measures: Sequence[Measures]) -> Measures:
    """Sums over users, of the measures that all of them have."""
    names = [name for name in MEASURES if measures and all(name in found for found in measures)]
    return {name: np.sum([found[name] for found in measures], axis=0) for name in names}


def _without(own: Measures, totals: Measures, num_users: int) -> Measures:
    """The mean over the other users; nothing if there are none."""
    return {name: (total - own[name]) / (num_users - 1) for name, total in totals.items()} if num_users > 1 else {}


def _mean(name: str, values: FloatArray, confidence: float) -> Interval | None:
    prompts = np.flatnonzero(np.isfinite(values))
    if not len(prompts):
        return None
    interval = cluster_share if name in SHARES else cluster_mean
    return interval(values[prompts], prompts, confidence=confidence)


def _differences(own: Measures, other: Measures, confidence: float) -> dict[str, Interval]:
    """Means of `own` minus `other` by measure, paired by prompt."""
    found = {}
    for name in own.keys() & other.keys():
        difference = own[name] - other[name]
        prompts = np.flatnonzero(np.isfinite(difference))
        if len(prompts):
            found[name] = cluster_mean(difference[prompts], prompts, confidence=confidence)
    return {name: found[name] for name in MEASURES if name in found}


def _features_of_pairs(
    known: Sequence[UserId], pairs: Mapping[UserId, Sequence[tuple[str, str, str]]]
) -> tuple[FloatArray, FloatArray, IntArray] | None:
    """Features of chosen and of rejected answers, and the number of each pair's user; `None` without pairs."""
    rows = [(number, *pair) for number, user in enumerate(known) for pair in pairs.get(user, ())]
    if not rows:
        return None
    numbers, prompts, chosen, rejected = zip(*rows, strict=True)
    return answer_features(chosen, prompts), answer_features(rejected, prompts), np.array(numbers, dtype=np.intp)


# --- Sentences ----------------------------------------------------------------------------------------------------------


def _sentence(
    num_prompts: int,
    users: Sequence[UserAnswers],
    p_values: Mapping[str, float],
    p_fit: float | None,
    apart: int | None,
) -> str:
    if num_prompts < MIN_PROMPTS:
        return f"Answers: {num_prompts} prompts are too few to tell, at least {MIN_PROMPTS} are needed."
    if not p_values:
        return "Answers: with fewer than two known users there is nobody to differ from."
    smallest, tested = min(p_values.values()), f"p = {min(p_values.values()):.2g}, {num_prompts} prompts"
    if smallest >= LEVEL:
        return f"No evidence that answers differ between users ({tested}, {len(p_values)} features)."
    clear = sorted(
        (name for name, p in p_values.items() if p < LEVEL), key=lambda name: (p_values[name], name != "words")
    )
    named = [_range_of(name, users) for name in clear[:MOST_NAMED]]
    more = f" and {len(clear) - MOST_NAMED} more features" if len(clear) > MOST_NAMED else ""
    pairs = len(users) * (len(users) - 1) // 2
    parts = [] if apart is None else [f"{apart} of {pairs} pairs of users differ clearly"]
    unlike = [user.p_generic for user in users if user.p_generic is not None]
    if unlike:
        parts.append(f"{sum(p < LEVEL for p in unlike)} of {len(users)} users differ from the generic user")
    if p_fit is not None:
        parts.append(
            f"{'they' if p_fit < LEVEL else 'they do not clearly'} lean towards what the users chose (p = {p_fit:.2g})"
        )
    return f"Answers differ between users ({tested}) in {'; '.join([', '.join(named) + more, *parts])}."


def _range_of(name: str, users: Sequence[UserAnswers]) -> str:
    values = [user.means[name].value for user in users if name in user.means]
    if name in LOGGED - {"words"}:  # counts read as counts; words are not on a log scale here
        values = [float(np.expm1(value)) for value in values]
    digits = 1 if name in LOGGED else 2
    return f"{name.replace('_', ' ')} (from {min(values):.{digits}f} to {max(values):.{digits}f})"


def _collapse(
    users: Sequence[UserAnswers],
    generic: UserAnswers | None,
    of_base: Mapping[UserId, Measures],
) -> str | None:
    collapsed = [user for user in users if user.collapsed_in]
    rows = collapsed or ([generic] if generic is not None and generic.collapsed_in else [])
    if not rows:
        return None
    found = []
    for name in COLLAPSE:
        if any(name in row.collapsed_in for row in rows):
            own = float(np.mean([row.means[name].value for row in rows if name in row.means]))
            bases = [of_base.get(row.user_id, of_base.get(None, {})) for row in rows]
            base = float(np.mean([np.nanmean(found[name]) for found in bases if name in found]))
            found.append(f"{own:.2f} {IN_WORDS[name]} where the base's own have {base:.2f}")
    whose = f"{len(collapsed)} of {len(users)} users" if collapsed else "the generic user"
    return f"Answers collapse for {whose}: {', '.join(found)}."

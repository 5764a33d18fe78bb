"""
What personalization costs: accuracy where users agree, distance from the base on neutral prompts, and whether users are told
what they like to hear.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..agreement import majority_agreement
from ..arrays import BoolArray, FloatArray
from ..intervals import Interval, cluster_mean, cluster_share
from ..terminal import printable
from ..users import UserId
from ..writing import Request, write_answers
from .fluency import answer_log_probs, answer_logits


NEUTRAL_TOKENS = 24  # of the base's answer to a neutral prompt
MAX_USERS = 20  # that are probed
QUESTIONS = json.loads((files(__package__) / "probes.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Probed:
    """
    One policy: the model with a user's prompt or the generic one, the base, or vanilla DPO.

    Args:
        right (`Interval`): The share of the thirty questions whose right answer is likelier than the wrong one.
        gives_in (`Interval`): The share whose wrong answer is likelier when it comes with that opinion, as in studies
            of sycophancy (Sharma et al. 2023, arXiv 2310.13548).
        gives_in_known (`Interval`, *optional*): The same among the questions that were right without the opinion; `None` if
            there are none.
        shift (`Interval`): How much the opinion moves the log odds of wrong against right, in nats, mean over questions.
        kl (`Interval`, *optional*): The divergence from the base on neutral prompts, KL(policy || base) in nats per token of
            the base's own answers, the penalty of RLHF (Ziegler et al. 2019, arXiv 1909.08593); `None` for the base.
    """

    right: Interval
    gives_in: Interval
    gives_in_known: Interval | None
    shift: Interval
    kl: Interval | None


@dataclass(frozen=True)
class ProbesReport:
    """
    What personalization costs.

    Args:
        users (`Mapping[str, Probed]`): Up to `MAX_USERS` known users.
        generic, base ([`Probed`]): The generic user and the reference policy.
        vanilla ([`Probed`], *optional*): Vanilla DPO, if there is a model of it.
        num_users_left_out (`int`): The number of users that were not probed.
        num_agreed (`int`): The number of evaluated pairs that several users judged, all alike.
        agreed (`Mapping[str, Interval]`): For each scorer the accuracy on these. Empty without such pairs: then `right` says
            what happens to answers that nobody disagrees on.
    """

    users: Mapping[str, Probed]
    generic: Probed
    base: Probed
    vanilla: Probed | None
    num_users_left_out: int
    num_agreed: int
    agreed: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers, for JSON; the ids of users are in `users`."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The costs in one sentence or two, without ids."""
        users = list(self.users.values())
        parts = []
        if self.agreed:
            compared = ", ".join(f"{name} {self.agreed[name].value:.2f}" for name in self.agreed if name != "own")
            parts.append(
                f"Where users agree ({self.num_agreed} pairs) accuracy is {self.agreed['own'].value:.2f} ({compared})."
            )
        if users:
            given = [user.gives_in.value for user in users]
            kl = [user.kl.value for user in users if user.kl is not None]
            vanilla = "" if self.vanilla is None else f", vanilla DPO in {self.vanilla.gives_in.value:.2f}"
            parts.append(
                f"Users give the wrong answer in {np.mean(given):.2f} of 30 questions (from {min(given):.2f} to "
                f"{max(given):.2f}) once they say that it is right, the base in {self.base.gives_in.value:.2f}{vanilla}; on "
                f"neutral prompts they are {np.mean(kl):.3f} nats a token from the base."
            )
        return " ".join(parts)


@dataclass(frozen=True)
class NeutralAnswers:
    """The base's answers to the neutral prompts, and its log probabilities there, `(length, vocab_size)` for each."""

    prompts: Sequence[str]
    answers: Sequence[str]
    log_probs: Sequence[Tensor]


class Prober:
    """
    Probes one policy after the other with the same questions.

    Args:
        reference: The reference policy, as [`~evaluation.fluency.reference_policy`] gives it; it answers the neutral prompts
            and is probed itself, at once.
        tokenizer: The tokenizer of all policies.
        use_template (`bool`, *optional*, defaults to `False`): Whether questions are conversations, as those of the training.
        batch_size (`int`, *optional*, defaults to `8`): The number of answers that are scored at once.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true mean.

    ```python
    with reference_policy(trainer) as reference:
        prober = Prober(reference, tokenizer)
    prober.base.gives_in, prober.probe(trainer.model, "alice").gives_in
    ```
    """

    def __init__(
        self,
        reference: Any,
        tokenizer: PreTrainedTokenizerBase,
        use_template: bool = False,
        batch_size: int = 8,
        confidence: float = 0.95,
    ) -> None:
        self.tokenizer, self.use_template = tokenizer, use_template
        self.batch_size, self.confidence = batch_size, confidence
        self.neutral = self._answer_neutral(reference)
        self.base = self._probe(reference, None, None)

    def probe(self, model: Any, user_id: UserId = None, profile: str | None = None) -> Probed:
        """
        Probe the policy of `model`: for a user, with the user's profile if the training had profiles; a plain model, or one
        with users for the generic one, with `None`.
        """
        return self._probe(model, user_id, profile, kl=self._kl(model, user_id, profile))

    def _answer_neutral(self, reference: Any) -> NeutralAnswers:
        prompts = QUESTIONS["neutral"]
        requests = [Request(None, prompt) for prompt in prompts]
        options = {"max_new_tokens": NEUTRAL_TOKENS, "do_sample": False}
        written = write_answers(reference, self.tokenizer, requests, self.batch_size, self.use_template, **options)
        answers = [text for batch in written for text in batch]
        return NeutralAnswers(prompts, answers, self._neutral_log_probs(reference, requests, answers))

    def _neutral_log_probs(self, model: Any, requests: Sequence[Request], answers: Sequence[str]) -> list[Tensor]:
        found = [torch.empty(0, 0)] * len(answers)
        batches = answer_logits(model, self.tokenizer, requests, answers, self.batch_size, self.use_template)
        for rows, logits, _, mask in batches:
            for row, scores, kept in zip(rows, logits, mask, strict=True):
                found[row] = scores[kept.bool()].log_softmax(-1).cpu()
        return found

    def _kl(self, model: Any, user_id: UserId, profile: str | None) -> FloatArray:
        """For each neutral prompt KL(policy || base) in nats, mean over the tokens of the base's answer; NaN without any."""
        requests = [Request(user_id, prompt, profile) for prompt in self.neutral.prompts]
        found = self._neutral_log_probs(model, requests, self.neutral.answers)
        divergences = []
        for own, base in zip(found, self.neutral.log_probs, strict=True):
            length = min(len(own), len(base))  # a soft prompt may leave less room
            divergence = (
                (own[:length].exp() * (own[:length] - base[:length])).sum(dim=-1) if length else own.new_empty(0)
            )
            divergences.append(float(divergence.double().mean()) if length else float("nan"))
        return np.array(divergences)

    def _probe(self, model: Any, user_id: UserId, profile: str | None, kl: FloatArray | None = None) -> Probed:
        plain, opinionated = (self._log_odds(model, user_id, profile, with_opinion) for with_opinion in (False, True))
        questions = np.arange(len(plain))
        known = plain < 0
        given_in = (opinionated > 0).astype(np.float64)
        has_kl = np.isfinite(kl) if kl is not None else np.zeros(0, dtype=np.bool_)
        options = {"confidence": self.confidence}
        return Probed(
            right=cluster_share(known.astype(np.float64), questions, **options),
            gives_in=cluster_share(given_in, questions, **options),
            gives_in_known=cluster_share(given_in[known], questions[known], **options) if known.any() else None,
            shift=cluster_mean(opinionated - plain, questions, **options),
            kl=cluster_mean(kl[has_kl], np.flatnonzero(has_kl), **options)
            if kl is not None and has_kl.any()
            else None,
        )

    def _log_odds(self, model: Any, user_id: UserId, profile: str | None, with_opinion: bool) -> FloatArray:
        """For each question the log probability of the wrong answer minus that of the right one."""
        beliefs = QUESTIONS["beliefs"]
        prompts = [f"{item['opinion']} {item['question']}" if with_opinion else item["question"] for item in beliefs]
        nats = []
        for side in ("wrong", "right"):
            answers = [self._answer(item["answer"].format(item[side])) for item in beliefs]
            requests = [Request(user_id, prompt, profile) for prompt in prompts]
            options = (self.batch_size, self.use_template)
            nats.append(answer_log_probs(model, self.tokenizer, requests, answers, *options).nats)
        return nats[0] - nats[1]

    def _answer(self, text: str) -> str:
        """An answer as it stands behind its question: behind plain text after a space."""
        return text if self.use_template else f" {text}"


def probe_users(
    prober: Prober,
    model: Any,
    users: Sequence[str],
    profiles: Mapping[str, str | None] | None = None,
    description: str = "Probing users",
    disable_tqdm: bool = False,
) -> tuple[dict[str, Probed], Probed]:
    """The first `MAX_USERS` of `users`, and the generic user, of a model with users attached."""
    some = list(users[:MAX_USERS])
    found = {
        user: prober.probe(model, user, (profiles or {}).get(user))
        for user in track(some, description, disable=disable_tqdm, transient=True)
    }
    return found, prober.probe(model)


def agreed_pairs(comparisons: ArrayLike, directions: ArrayLike, users: ArrayLike) -> BoolArray:
    """
    Which pairs several users judged, all alike; arguments are those of [`~agreement.majority_agreement`], `(n,)` each.

    ```python
    >>> agreed_pairs([0, 0, 1, 1, 2], [True, True, True, False, True], [0, 1, 0, 1, 0]).tolist()
    [True, True, False, False, False]
    ```
    """
    codes = np.asarray(comparisons, dtype=np.intp)
    alike = majority_agreement(comparisons, directions, users) == 1
    everybody = np.ones(int(codes.max(initial=-1)) + 1, dtype=np.bool_)
    np.logical_and.at(everybody, codes, alike)
    return np.asarray(everybody[codes], dtype=np.bool_)


def accuracy_where_users_agree(
    margins: Mapping[str, FloatArray], agreed: BoolArray, prompts: Sequence[str], confidence: float = 0.95
) -> dict[str, Interval]:
    """For each scorer the share of the `agreed` pairs with a margin above zero; empty if there are none."""
    if not agreed.any():
        return {}
    clusters = np.asarray(prompts)[agreed]
    return {
        name: cluster_share((values[agreed] > 0).astype(np.float64), clusters, confidence=confidence)
        for name, values in margins.items()
    }


def probes_table(report: ProbesReport, list_users: bool = False) -> Table:
    """What the probes found, to print; no ids unless `list_users`."""
    table = Table("policy", title="What personalization costs", caption=report.sentence)
    for heading in ("right", "gives in", "gives in, if right before", "opinion, nats", "KL from the base, nats"):
        table.add_column(heading, justify="right")
    users = list(report.users.values())
    if users:
        cells = [_spread([getattr(user, name) for user in users]) for name in _COLUMNS]
        table.add_row(f"{len(users)} users, mean", *cells)
    for name, probed in (("generic user", report.generic), ("base", report.base), ("vanilla DPO", report.vanilla)):
        if probed is not None:
            table.add_row(name, *(_cell(getattr(probed, column)) for column in _COLUMNS))
    for user, probed in report.users.items() if list_users else ():
        table.add_row(Text(printable(user)), *(_cell(getattr(probed, column)) for column in _COLUMNS))
    return table


_COLUMNS = ("right", "gives_in", "gives_in_known", "shift", "kl")


def _cell(value: Interval | None) -> str:
    return "" if value is None else f"{value.value:.2f}"


def _spread(values: Sequence[Interval | None]) -> str:
    found = [value.value for value in values if value is not None]
    if not found:
        return ""
    spread = f"\n{min(found):.2f}–{max(found):.2f}" if len(found) > 1 else ""
    return f"{np.mean(found):.2f}{spread}"

"""The answers of users, the generic user and the base model to some prompts of the dataset, with how fluent they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..arrays import FloatArray
from ..training.dpo import PersonalizedDPOTrainer
from ..user_column import iterate_user_ids
from ..user_profile import Prompt
from ..users import UserId
from ..writing import text_of_last
from .answers import GENERIC_USER, answers_by_user
from .answers_report import AnswersReport
from .answers_verdict import evaluate_answers
from .fluency import base_answers, nats_per_token, reference_policy
from .scoring import first_profiles


MAX_PAIRS_OF_USER = 200  # whose features say what a user chooses


@dataclass(frozen=True)
class WrittenAnswers:
    """
    Answers to `prompts`.

    Args:
        prompts (`Sequence`): Texts or conversations.
        of_users (`Mapping`): For each user the answers; `None` is the generic one.
        of_base (`Mapping`): The base's own answers, as from [`~evaluation.fluency.base_answers`].
        nats, base_nats (`Mapping`): Nats per token of both, under the base that is given the wish.
    """

    prompts: Sequence[Prompt] = ()
    of_users: Mapping[UserId, Sequence[str]] = field(default_factory=dict)
    of_base: Mapping[UserId, Sequence[str]] = field(default_factory=dict)
    nats: Mapping[UserId, FloatArray] = field(default_factory=dict)
    base_nats: Mapping[UserId, FloatArray] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """What is asked, as text."""
        return [text_of_last(prompt) for prompt in self.prompts]

    def samples(self) -> Iterator[dict[str, Any]]:
        """For each prompt the answers of all users and, if it was asked, of the base, as `reference`."""
        for i, prompt in enumerate(self.prompts):
            sample: dict[str, Any] = {"prompt": text_of_last(prompt)}
            if None in self.of_base:
                sample["reference"] = self.of_base[None][i]
            yield sample | {"answers": {user or GENERIC_USER: texts[i] for user, texts in self.of_users.items()}}

    def report(
        self, pairs: Mapping[UserId, Sequence[tuple[str, str, str]]], confidence: float
    ) -> AnswersReport | None:
        """The answers' half of the verdict; `None` if there are no answers."""
        if not self.of_users:
            return None
        return evaluate_answers(
            self.of_users,
            self.texts(),
            base_answers=self.of_base,
            nats_per_token=self.nats,
            base_nats_per_token=self.base_nats,
            pairs=pairs,
            confidence=confidence,
        )


def measured(
    trainer: PersonalizedDPOTrainer,
    prompts: Sequence[Prompt],
    answers: Mapping[UserId, Sequence[str]],
    of_base: Mapping[UserId, Sequence[str]],
    wishes: Mapping[UserId, str] | None = None,
    batch_size: int = 8,
) -> WrittenAnswers:
    """Answers of users and of the base, with their fluency under the reference policy of `trainer`."""
    wished = wishes or {}
    with reference_policy(trainer) as reference:
        nats, base_nats = (
            {
                user: nats_per_token(reference, trainer._tokenizer, prompts, texts, wished.get(user), batch_size)
                for user, texts in found.items()
            }
            for found in (answers, of_base)
        )
    return WrittenAnswers(prompts, answers, of_base, nats, base_nats)


def write_answers_of_users(
    trainer: PersonalizedDPOTrainer,
    dataset: Dataset,
    num_prompts: int,
    wishes: Mapping[UserId, str],
    batch_size: int,
    generate_kwargs: Mapping[str, Any],
) -> WrittenAnswers:
    """
    Answers to the first `num_prompts` prompts of `dataset` for its known users, for the generic user, and by the reference
    policy, with how fluent they are.

    Raises:
        `ValueError`: if the dataset has no prompts.
    """
    if "prompt" not in dataset.column_names:
        raise ValueError(f"Answers need a `prompt` column; found {sorted(dataset.column_names)}.")
    vocab, profile_column, tokenizer = trainer.user_vocab, trainer.args.user_profile_column, trainer._tokenizer
    assert vocab is not None
    prompts = list({str(prompt): prompt for prompt in dataset["prompt"]}.values())[:num_prompts]
    user_ids = list(iterate_user_ids(dataset, trainer.args.user_id_column, "evaluation"))
    profiles = {} if profile_column is None else first_profiles(user_ids, list(dataset[profile_column]))
    users: list[UserId] = [*(user for user in dict.fromkeys(user_ids) if user is not None and user in vocab), None]
    options = {"batch_size": batch_size, **generate_kwargs}
    model: Any = trainer.model
    answers = answers_by_user(model, tokenizer, prompts, users, user_profiles=profiles, **options)
    with reference_policy(trainer) as reference:
        own = {user: wishes[user] for user in users if user in wishes}
        of_base = base_answers(reference, tokenizer, prompts, own, **options)
    return measured(trainer, prompts, answers, of_base, wishes, batch_size)


def texts_of_pairs(dataset: Dataset, user_ids: Sequence[UserId]) -> dict[UserId, list[tuple[str, str, str]]]:
    """For each user up to `MAX_PAIRS_OF_USER` preferences as texts (prompt, chosen, rejected); needs a prompt column."""
    if "prompt" not in dataset.column_names:
        return {}
    found: dict[UserId, list[tuple[str, str, str]]] = {}
    columns = (dataset[name] for name in ("prompt", "chosen", "rejected"))
    for user, *texts in zip(user_ids, *columns, strict=True):
        if len(rows := found.setdefault(user, [])) < MAX_PAIRS_OF_USER:
            prompt, chosen, rejected = map(text_of_last, texts)
            rows.append((prompt, chosen, rejected))
    return found

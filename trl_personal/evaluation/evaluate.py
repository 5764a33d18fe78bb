"""A trained model on held-out pairs: who gains, against which baselines, and how answers change."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from ..agreement import compare, encode, majority_agreement
from ..arrays import BoolArray, FloatArray
from ..models.loading import find_user_model
from ..models.saving import get_base_model
from ..training.dpo import PersonalizedDPOTrainer
from ..training.run_users import with_names_of_users
from ..training.settings import read_training_settings
from ..user_column import check_user_column, iterate_user_ids
from ..user_models import UserModel
from ..user_models.movement import Movement, measure_movement
from ..user_profile import Prompt
from ..users import UserId, UserVocab
from ..writing import processor_name, text_of_last
from .answer_features import count_words
from .answers import Judge, opposite_users, summarize_answers
from .baselines import (
    adapter_config,
    check_baselines,
    score_in_context,
    score_lora_per_user,
    train_without_users,
    with_user_id_text,
)
from .fluency import reference_policy
from .judged import judge_answers
from .probes import Probed, Prober, ProbesReport, accuracy_where_users_agree, agreed_pairs, probe_users
from .results import ModelEvaluation, describe_run
from .scoring import ScoredPairs, first_profiles, score_pairs
from .trained_model import PAIRS, make_scoring_trainer, read_log_history
from .verdict import evaluate_margins
from .written_answers import WrittenAnswers, measured, texts_of_pairs, write_answers_of_users


CONFLICT = "conflict"  # a column with the conflict that a pair is about, where users conflict within groups only


@dataclass
class _Probed:
    """What was probed so far; vanilla DPO is loaded or trained later."""

    prober: Prober
    users: dict[str, Probed]
    generic: Probed
    num_users_left_out: int
    confidence: float
    vanilla: Probed | None = None

    def report(self, margins: Mapping[str, FloatArray], agreed: BoolArray, prompts: Sequence[str]) -> ProbesReport:
        scorers = {name: margins[name] for name in ("own", "generic", "vanilla") if name in margins}
        return ProbesReport(
            users=self.users,
            generic=self.generic,
            base=self.prober.base,
            vanilla=self.vanilla,
            num_users_left_out=self.num_users_left_out,
            num_agreed=int(agreed.sum()),
            agreed=accuracy_where_users_agree(scorers, agreed, prompts, self.confidence),
        )


def evaluate_trainer(
    trainer: PersonalizedDPOTrainer,
    dataset: Dataset,
    *,
    vanilla: PersonalizedDPOTrainer | None = None,
    opposite_users: Mapping[str, str] | None = None,
    preference_column: str | None = None,
    prompts: Sequence[Prompt] = (),
    answers: Mapping[UserId, Sequence[str]] | None = None,
    base_answers: Mapping[UserId, Sequence[str]] | None = None,
    wishes: Mapping[UserId, str] | None = None,
    judge: Judge | None = None,
    probes: bool = False,
    confidence: float = 0.95,
) -> ModelEvaluation:
    """
    Evaluate a trainer that has just trained on held-out pairs.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): A trainer with users.
        dataset (`Dataset`): The held-out pairs, with users.
        vanilla ([`PersonalizedDPOTrainer`], *optional*): A trainer that trained vanilla DPO on the same pairs.
        opposite_users (`Mapping[str, str]`, *optional*): For each known user of `dataset` a user on the other side of the same
            conflict, as for [`score_pairs`].
        preference_column (`str`, *optional*): The column of `dataset` that says what the user of a row prefers.
        prompts (`Sequence`, *optional*): The prompts that users have answers to.
        answers (`Mapping`, *optional*): For each user the answers, as from [`answers_by_user`]; `None` is the generic user.
        base_answers (`Mapping`, *optional*): The base's own answers to the same prompts, as from
            [`~evaluation.fluency.base_answers`]. With them fluency is measured, and whether answers have collapsed.
        wishes (`Mapping`, *optional*): For users what they wish, in words: the base is told it where fluency is measured, and
            so is a judge.
        judge (`Callable`, *optional*): Compares users' answers with the generic user's ([`judge_answers`]).
        probes (`bool`, *optional*, defaults to `False`): Whether to measure what personalization costs ([`ProbesReport`]).
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true mean.

    Returns:
        [`ModelEvaluation`].

    Raises:
        `ValueError`: if the trainer has no users, or the dataset no `preference_column`; or whatever [`score_pairs`] refuses.

    ```python
    evaluation = evaluate_trainer(trainer, test, vanilla=vanilla_trainer)
    print(evaluation.report.verdict)
    evaluation.save("evaluation")
    ```
    """
    if trainer.user_model is None or trainer.user_vocab is None:
        raise ValueError("The trainer has no users. Pass one that trained a user model, and this one as `vanilla`.")
    column = trainer.args.user_id_column
    check_user_column(dataset, column, "evaluation")
    dataset = with_names_of_users(dataset, column)
    preferences = _values_by_user(dataset, column, preference_column)
    scored = score_pairs(trainer, dataset, opposite_users)
    margins = {name: scored.by_row(name, len(dataset)) for name in scored.margins}
    if vanilla is not None:
        margins["vanilla"] = score_pairs(vanilla, dataset).by_row("own", len(dataset))
    probed = _probe_users(trainer, dataset, confidence) if probes else None
    if probed is not None and vanilla is not None:
        probed.vanilla = probed.prober.probe(vanilla.model)
    written = WrittenAnswers(prompts, answers or {})
    if answers and base_answers:
        written = measured(trainer, prompts, answers, base_answers, wishes, trainer.args.per_device_eval_batch_size)
    return _evaluation(
        dataset,
        column,
        scored,
        margins,
        written,
        wishes=wishes or {},
        judge=judge,
        probed=probed,
        user_model=trainer.user_model,
        user_vocab=trainer.user_vocab,
        preferences=preferences,
        preference_column=preference_column or "",
        beta=trainer.args.beta,
        confidence=confidence,
        log_history=trainer.state.log_history,
        run=describe_run(),
        movement=measure_movement(trainer.user_model, trainer.embedding_std),
    )


def evaluate_model(
    model: str,
    dataset: Dataset,
    *,
    train_dataset: Dataset | None = None,
    ref_model: str | None = None,
    vanilla: str | None = None,
    baselines: Sequence[str] = (),
    max_steps: int | None = None,
    opposite_column: str | None = None,
    settings: Mapping[str, Any] | None = None,
    num_generate: int = 0,
    generate_kwargs: Mapping[str, Any] | None = None,
    wish_column: str | None = None,
    judge: Judge | None = None,
    judge_name: str | None = None,
    probes: bool = False,
    batch_size: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    disable_tqdm: bool = False,
    **model_kwargs: Any,
) -> ModelEvaluation:
    """
    Evaluate a model that training wrote on held-out pairs.

    Args:
        model (`str`): A folder or a repository, with a `user_model/`.
        dataset (`Dataset`): The held-out pairs, with users.
        train_dataset (`Dataset`, *optional*): The pairs of the training, for baselines that are trained now.
        ref_model (`str`, *optional*): The model that the training started from. A full model needs it.
        vanilla (`str`, *optional*): A folder with vanilla DPO, trained before on the same pairs of all users.
        baselines (`Sequence[str]`, *optional*): The names, out of `baselines.BASELINES`, of what to train now for as many
            steps. Vanilla DPO is trained for the others in any case, unless `vanilla` is given.
        max_steps (`int`, *optional*): Training steps of each baseline. Defaults to as many as the model was trained for.
        opposite_column (`str`, *optional*): The column with the preference of each row's user. Pairs are then also scored with
            the prompt of an opposite user, who has another preference (in the same conflict, if each user has one in a column
            `conflict`), and the map of users is colored by it.
        settings (`Mapping`, *optional*): Settings such as `beta`, in place of those found in the folder.
        num_generate (`int`, *optional*, defaults to `0`): The number of prompts of `dataset` that every known user gets an
            answer to, with the user's first profile there if the training had profiles.
        generate_kwargs (`Mapping`, *optional*): Keywords of `model.generate`.
        wish_column (`str`, *optional*): The column with what each row's user wishes, in words, such as "Answer in one short
            sentence.": the base is told it where fluency is measured, and so is a judge.
        judge (`Callable`, *optional*): Compares users' answers with the generic user's ([`judge_answers`]).
        judge_name (`str`, *optional*): What the judge is called in the results.
        probes (`bool`, *optional*, defaults to `False`): Whether to measure what personalization costs ([`ProbesReport`]).
        batch_size (`int`, *optional*, defaults to `8`): The number of pairs, or of answers, at a time.
        confidence (`float`, *optional*, defaults to `0.95`): How often an interval shall hold the true mean.
        seed (`int`, *optional*, defaults to `0`): Random seed for sampled answers.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bars.
        **model_kwargs: Keywords of `from_pretrained`, such as `dtype`.

    Returns:
        [`ModelEvaluation`].

    Raises:
        `ValueError`: for arguments that do not go together, or whatever loading and the trainer refuse.
    """
    if find_user_model(model) is None:
        raise ValueError(f"{model} has no `user_model/` folder, so it is not a personalized model.")
    settings = read_training_settings(model) | dict(settings or {})
    column = settings.get("user_id_column", "user_id")
    check_user_column(dataset, column, "evaluation")
    dataset = with_names_of_users(dataset, column)
    if train_dataset is not None:
        check_user_column(train_dataset, column, "train")
    if vanilla is not None and "vanilla" in baselines:
        raise ValueError(
            "Vanilla DPO is either loaded (`--vanilla`) or trained (in `--baselines`): leave one of them out."
        )
    check_baselines(baselines, train_dataset, column)
    if judge is not None and not num_generate:
        raise ValueError("A judge compares answers, so there must be some: set `num_generate` (`--generate`).")
    preferences = _values_by_user(dataset, column, opposite_column)
    wishes: dict[UserId, str] = {
        user: str(wish) for user, wish in _values_by_user(dataset, column, wish_column).items() if wish
    }
    options = {"batch_size": batch_size, "disable_tqdm": disable_tqdm, **model_kwargs}

    trainer = make_scoring_trainer(model, dataset, settings, ref_model=ref_model, **options)
    assert trainer.user_vocab is not None
    assert trainer.user_model is not None
    user_model, user_vocab = trainer.user_model, trainer.user_vocab
    of_known = {user: value for user, value in preferences.items() if user in user_vocab}
    conflicts = _conflicts_of_users(dataset, column)
    scored = score_pairs(trainer, PAIRS, opposite_users(of_known, conflicts) if of_known else None)
    answers = WrittenAnswers()
    if num_generate:
        set_seed(seed)
        answers = write_answers_of_users(trainer, dataset, num_generate, wishes, batch_size, generate_kwargs or {})
    probed = _probe_users(trainer, dataset, confidence, batch_size, disable_tqdm) if probes else None
    movement = measure_movement(user_model, trainer.embedding_std)
    base_model = ref_model or str(get_base_model(trainer.model).config.name_or_path)
    del trainer  # baselines need the memory

    margins = {name: scored.by_row(name, len(dataset)) for name in scored.margins}
    if vanilla is not None or baselines:
        margins |= _score_baselines(
            baselines,
            vanilla,
            base_model,
            dataset,
            train_dataset,
            settings,
            adapter_config(model),
            options,
            {**options, "max_steps": max_steps, "processor": processor_name(model)},
            probed,
        )
    return _evaluation(
        dataset,
        column,
        scored,
        margins,
        answers,
        wishes=wishes,
        judge=judge,
        judge_name=judge_name,
        probed=probed,
        user_model=user_model,
        user_vocab=user_vocab,
        preferences=preferences,
        preference_column=opposite_column or "",
        beta=settings.get("beta", 0.1),
        confidence=confidence,
        log_history=read_log_history(model),
        run={
            **describe_run(),
            "model": model,
            "ref_model": base_model,
            "seed": seed,
            "settings": json.loads(json.dumps(settings, default=str)),
        },
        movement=movement,
    )


def _evaluation(
    dataset: Dataset,
    column: str,
    scored: ScoredPairs,
    margins: Mapping[str, FloatArray],
    answers: WrittenAnswers,
    *,
    wishes: Mapping[UserId, str],
    judge: Judge | None,
    judge_name: str | None = None,
    probed: _Probed | None,
    user_model: UserModel,
    user_vocab: UserVocab,
    preferences: Mapping[str, Any],
    preference_column: str,
    beta: float,
    confidence: float,
    log_history: list[dict[str, Any]],
    run: dict[str, Any],
    movement: Movement | None,
) -> ModelEvaluation:
    """The report and the tables of what was scored; `margins` are `(len(dataset),)`, NaN for rows that were left out."""
    kept = np.flatnonzero(np.all([np.isfinite(array) for array in margins.values()], axis=0))
    user_ids = list(iterate_user_ids(dataset, column, "evaluation"))
    users = [user_ids[row] for row in kept]
    place = {row: index for index, row in enumerate(scored.rows.tolist())}
    prompts = [scored.prompts[place[row]] for row in kept]
    chosen, rejected = zip(*(scored.answers[place[row]] for row in kept), strict=True)
    comparisons, directions = compare(prompts, chosen, rejected)
    of_pairs = {name: array[kept] for name, array in margins.items()}
    named = {name: of_pairs[name] for name in ("own", "generic", "swapped", "opposite", "vanilla") if name in of_pairs}
    report = evaluate_margins(
        user_ids=users,
        prompt_ids=prompts,
        **named,
        others={name: array for name, array in of_pairs.items() if name not in named},
        known_users=set(user_vocab),
        agrees_with_majority=majority_agreement(comparisons, directions, encode(users)[0]),
        beta=beta,
        confidence=confidence,
    )
    return ModelEvaluation(
        report=report,
        pairs=Dataset.from_dict({"row": kept.tolist(), "user_id": users, **of_pairs}),
        num_dropped=len(dataset) - len(kept),
        metrics=scored.metrics,
        chosen_lengths=_chosen_lengths(dataset, user_ids),
        preferences=preferences,
        preference_column=preference_column,
        majority_share=_majority_share(dataset, preference_column) if preference_column else None,
        answers=summarize_answers(answers.of_users, answers.of_base.get(None)),
        samples=list(answers.samples()),
        answers_report=answers.report(texts_of_pairs(dataset, user_ids), confidence),
        probes_report=None
        if probed is None
        else probed.report(of_pairs, agreed_pairs(comparisons, directions, encode(users)[0]), prompts),
        judge_report=None
        if judge is None
        else judge_answers(judge, answers.prompts, answers.of_users, wishes, judge_name or "The judge", confidence),
        user_model=user_model,
        user_vocab=user_vocab,
        log_history=log_history,
        run=run,
        movement=movement,
    )


def _values_by_user(dataset: Dataset, column: str, value_column: str | None) -> dict[str, Any]:
    if value_column is None:
        return {}
    if value_column not in dataset.column_names:
        raise ValueError(
            f"The evaluation dataset has no `{value_column}` column; found {sorted(dataset.column_names)}."
        )
    pairs = zip(iterate_user_ids(dataset, column, "evaluation"), dataset[value_column], strict=True)
    values: dict[str, Any] = {}
    for user, value in pairs:
        if user is not None and values.setdefault(user, value) != value:
            raise ValueError(
                f"Column `{value_column}` has several values for one user ({values[user]!r} and {value!r}); it must have "
                "one for each user."
            )
    return values


def _conflicts_of_users(dataset: Dataset, column: str) -> dict[str, Any] | None:
    """The conflict that each user is in; `None` if there is no `CONFLICT` column, or somebody is in several."""
    if CONFLICT not in dataset.column_names:
        return None
    found = set(zip(iterate_user_ids(dataset, column, "evaluation"), dataset[CONFLICT], strict=True))
    conflicts = {user: conflict for user, conflict in found if user is not None}
    return conflicts if len(conflicts) == sum(user is not None for user, _ in found) else None


def _chosen_lengths(dataset: Dataset, user_ids: Sequence[UserId]) -> dict[UserId, float]:
    """For each user the mean length of chosen answers, in words; empty if a text holds the prompt too."""
    lengths: dict[UserId, list[int]] = {}
    for user_id, answer in zip(user_ids, dataset["chosen"], strict=True):
        if isinstance(answer, str) and "prompt" not in dataset.column_names:
            return {}
        lengths.setdefault(user_id, []).append(count_words(text_of_last(answer)))
    return {user_id: mean(found) for user_id, found in lengths.items()}


def _majority_share(dataset: Dataset, preference_column: str) -> float:
    """The share of pairs that follow the more frequent preference, within each `CONFLICT` if there is such a column."""
    conflicts = dataset[CONFLICT] if CONFLICT in dataset.column_names else [""] * len(dataset)
    counts = Counter(zip(conflicts, dataset[preference_column], strict=True))
    most = {name: max(n for (other, _), n in counts.items() if other == name) for name, _ in counts}
    return sum(most.values()) / len(dataset)


def _score_baselines(
    names: Sequence[str],
    vanilla: str | None,
    base_model: str,
    dataset: Dataset,
    train: Dataset | None,
    settings: Mapping[str, Any],
    peft_config: Any,
    options: Mapping[str, Any],
    train_options: Mapping[str, Any],
    probed: _Probed | None = None,
) -> dict[str, FloatArray]:
    """Margins `(len(dataset),)` of each baseline, NaN where a row was left out."""
    column, size = settings.get("user_id_column", "user_id"), len(dataset)
    if vanilla is not None:
        own_settings = read_training_settings(vanilla) or settings
        ref_model = None if adapter_config(vanilla) else base_model
        trainer = make_scoring_trainer(vanilla, dataset, own_settings, ref_model=ref_model, **options)
        scored = score_pairs(trainer, PAIRS)
    else:
        assert train is not None  # checked before
        trainer = train_without_users(base_model, train, settings, peft_config, **train_options)
        scored = score_pairs(trainer, dataset)
    margins = {"vanilla": scored.by_row("own", size)}
    if probed is not None:
        probed.vanilla = probed.prober.probe(trainer.model)
    if train is None:
        return margins
    if "in_context" in names:
        scored = score_in_context(trainer, dataset, train, column)
        margins["in_context"] = scored.by_row("own", size)
    del trainer
    if "user_id_text" in names:
        with_ids = with_user_id_text(train, column)
        trainer = train_without_users(base_model, with_ids, settings, peft_config, **train_options)
        scored = score_pairs(trainer, with_user_id_text(dataset, column))
        margins["user_id_text"] = scored.by_row("own", size)
        del trainer
    if "lora_per_user" in names:
        margins["lora_per_user"] = score_lora_per_user(
            base_model, dataset, train, settings, peft_config, margins["vanilla"], **train_options
        )
    return margins


def _probe_users(
    trainer: PersonalizedDPOTrainer,
    dataset: Dataset,
    confidence: float,
    batch_size: int | None = None,
    disable_tqdm: bool = False,
) -> _Probed:
    """Probe the reference policy, known users of `dataset` and the generic user."""
    vocab, column, profile_column = trainer.user_vocab, trainer.args.user_id_column, trainer.args.user_profile_column
    assert vocab is not None
    user_ids = list(iterate_user_ids(dataset, column, "evaluation"))
    known = [user for user in dict.fromkeys(user_ids) if user is not None and user in vocab]
    profiles = {} if profile_column is None else first_profiles(user_ids, list(dataset[profile_column]))
    use_template = not isinstance(dataset[0]["chosen"], str)
    with reference_policy(trainer) as reference:
        size = batch_size or trainer.args.per_device_eval_batch_size
        prober = Prober(reference, trainer._tokenizer, use_template, size, confidence)
    users, generic = probe_users(prober, trainer.model, known, profiles, disable_tqdm=disable_tqdm)
    return _Probed(prober, users, generic, len(known) - len(users), confidence)

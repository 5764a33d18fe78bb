"""A trained folder on held-out pairs: who gains, against which baselines, and how answers change."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from ..agreement import compare, encode, majority_agreement
from ..arrays import FloatArray
from ..models.attach import detach_user_model
from ..models.loading import find_user_model
from ..models.saving import get_base_model
from ..user_column import check_user_column, iterate_user_ids
from ..users import UserId
from .answers import answers_by_user, opposite_users
from .baselines import (
    adapter_config,
    check_baselines,
    score_in_context,
    score_lora_per_user,
    train_without_users,
    with_user_id_text,
)
from .generation_report import summarize_answers
from .results import ModelEvaluation
from .saved_settings import read_log_history, read_training_settings
from .scoring import score_pairs
from .trained_model import make_scoring_trainer, processor_name
from .user_report import GENERIC_USER, describe_run
from .verdict import evaluate_margins


GIVEN_ROW = "given_row"  # rides along while the trainer prepares the dataset


def evaluate_model(
    model: str,
    dataset: Dataset,
    *,
    train_dataset: Dataset | None = None,
    ref_model: str | None = None,
    pooled: str | None = None,
    baselines: Sequence[str] = (),
    max_steps: int | None = None,
    opposite_column: str | None = None,
    settings: Mapping[str, Any] | None = None,
    num_generate: int = 0,
    generate_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    disable_tqdm: bool = False,
    **model_kwargs: Any,
) -> ModelEvaluation:
    """
    Evaluate a folder that training wrote on held-out pairs.

    Args:
        model (`str`): A folder or a repository, with a `user_model/`.
        dataset (`Dataset`): Held-out pairs with users.
        train_dataset (`Dataset`, *optional*): The pairs of the training, for baselines.
        ref_model (`str`, *optional*): What the training started from; needed for a full model.
        pooled (`str`, *optional*): A folder with vanilla DPO on all users, trained on the same pairs.
        baselines (`Sequence[str]`, *optional*): Of `baselines.BASELINES`, to train now with as many steps; the pooled one is
            trained for the others in any case, unless `pooled` is given.
        max_steps (`int`, *optional*): Of a baseline, instead of those of the training.
        opposite_column (`str`, *optional*): Column with the preference of each row's user: the swapped prompt is then that
            of a user of another preference, and the map of users is colored by it. Default: the next known user.
        settings (`Mapping`, *optional*): Settings such as `beta`, instead of those found in the folder.
        num_generate (`int`, *optional*, defaults to `0`): Prompts of `dataset` that every known user gets an answer to, with
            the user's first profile there if the training had profiles.
        generate_kwargs (`Mapping`, *optional*): Of `model.generate`.
        batch_size (`int`, *optional*, defaults to `8`): Pairs, or answers, at a time.
        confidence (`float`, *optional*, defaults to `0.95`): Of the intervals.
        seed (`int`, *optional*, defaults to `0`): Of the resamples and of sampling.
        disable_tqdm (`bool`, *optional*): No progress bars.
        **model_kwargs: Of `from_pretrained`, such as `dtype`.

    Returns:
        [`ModelEvaluation`].

    Raises:
        `ValueError`: for arguments that do not go together, or as loading and the trainer do.
    """
    if find_user_model(model) is None:
        raise ValueError(f"{model} has no `user_model/` folder, so it is not a personalized model.")
    settings = read_training_settings(model) | dict(settings or {})
    column = settings.get("user_id_column", "user_id")
    check_user_column(dataset, column, "evaluation")
    if train_dataset is not None:
        check_user_column(train_dataset, column, "train")
    if pooled is not None and "pooled" in baselines:
        raise ValueError(
            "Pooled DPO is either loaded (`--pooled`) or trained (in `--baselines`): leave one of them out."
        )
    check_baselines(baselines, train_dataset, column)
    values = _values_by_user(dataset, column, opposite_column)
    options = {"batch_size": batch_size, "disable_tqdm": disable_tqdm, **model_kwargs}

    numbered = dataset.add_column(GIVEN_ROW, range(len(dataset)))
    trainer = make_scoring_trainer(model, numbered, settings, ref_model=ref_model, **options)
    assert trainer.user_vocab is not None
    assert trainer.user_model is not None
    vocab, user_model, prepared = trainer.user_vocab, trainer.user_model, trainer.train_dataset
    known_values = {user: value for user, value in values.items() if user in vocab}
    assert isinstance(prepared, Dataset)
    scored = score_pairs(trainer, prepared, opposite_users(known_values) if known_values else None)
    answers: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    if num_generate:
        set_seed(seed)
        answers, samples = _generate(trainer, dataset, column, num_generate, batch_size, dict(generate_kwargs or {}))
    causal_lm = get_base_model(trainer.model)
    base_model = ref_model or str(causal_lm.config.name_or_path)
    processor = processor_name(model)
    del trainer, causal_lm

    rows = np.asarray(prepared[GIVEN_ROW], dtype=np.intp)[scored.rows]
    scored = replace(scored, rows=rows)
    margins = {name: scored.by_row(name, len(dataset)) for name in scored.margins}
    if pooled is not None or baselines:
        train_options = {**options, "max_steps": max_steps, "processor": processor}
        margins |= _score_baselines(
            baselines,
            pooled,
            base_model,
            dataset,
            train_dataset,
            settings,
            adapter_config(model),
            options,
            train_options,
        )
    kept = np.flatnonzero(np.all([np.isfinite(array) for array in margins.values()], axis=0))
    user_ids = list(iterate_user_ids(dataset, column, "evaluation"))
    place = {row: index for index, row in enumerate(rows.tolist())}
    prompts = [scored.prompts[place[row]] for row in kept]
    chosen, rejected = zip(*(scored.answers[place[row]] for row in kept), strict=True)
    users = [user_ids[row] for row in kept]
    kept_margins = {name: array[kept] for name, array in margins.items()}
    named = {name: kept_margins[name] for name in ("swapped", "pooled") if name in kept_margins}
    report = evaluate_margins(
        kept_margins["own"],
        kept_margins["generic"],
        users,
        prompts,
        **named,
        others={name: array for name, array in kept_margins.items() if name not in ("own", "generic", *named)},
        known_users=set(vocab),
        agrees_with_majority=_majority(prompts, chosen, rejected, users),
        beta=settings.get("beta", 0.1),
        confidence=confidence,
        seed=seed,
    )
    return ModelEvaluation(
        report=report,
        pairs=Dataset.from_dict({"row": kept.tolist(), "user_id": users, **kept_margins}),
        num_dropped=len(dataset) - len(kept),
        metrics=scored.metrics,
        answers=answers,
        samples=samples,
        values=values,
        column=opposite_column or "",
        user_model=user_model,
        user_vocab=vocab,
        log_history=read_log_history(model),
        run={
            **describe_run(),
            "model": model,
            "ref_model": base_model,
            "seed": seed,
            "settings": json.loads(json.dumps(settings, default=str)),
        },
    )


def _values_by_user(dataset: Dataset, column: str, opposite_column: str | None) -> dict[str, Any]:
    if opposite_column is None:
        return {}
    if opposite_column not in dataset.column_names:
        raise ValueError(
            f"The evaluation dataset has no `{opposite_column}` column; found {sorted(dataset.column_names)}."
        )
    pairs = zip(iterate_user_ids(dataset, column, "evaluation"), dataset[opposite_column], strict=True)
    values: dict[str, Any] = {}
    for user, value in pairs:
        if user is not None and values.setdefault(user, value) != value:
            raise ValueError(
                f"Column `{opposite_column}` has several values for one user ({values[user]!r} and {value!r}); it must have "
                "one for each user."
            )
    return values


def _score_baselines(
    names: Sequence[str],
    pooled: str | None,
    base_model: str,
    dataset: Dataset,
    train: Dataset | None,
    settings: Mapping[str, Any],
    peft_config: Any,
    options: Mapping[str, Any],
    train_options: Mapping[str, Any],
) -> dict[str, FloatArray]:
    """Margins `(len(dataset),)` of each baseline, NaN where a row was left out."""
    column, size = settings.get("user_id_column", "user_id"), len(dataset)
    if pooled is not None:
        own_settings = read_training_settings(pooled) or settings
        ref_model = None if adapter_config(pooled) else base_model
        trainer = make_scoring_trainer(pooled, dataset, own_settings, ref_model=ref_model, **options)
    else:
        assert train is not None  # checked before
        trainer = train_without_users(base_model, train, settings, peft_config, **train_options)
    scored = score_pairs(trainer, dataset)
    margins = {"pooled": scored.by_row("own", size)}
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
            base_model, dataset, train, settings, peft_config, margins["pooled"], **train_options
        )
    return margins


def _majority(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], users: Sequence[str | None]
) -> FloatArray:
    comparisons, directions = compare(prompts, chosen, rejected)
    return majority_agreement(comparisons, directions, encode(users)[0])


def _generate(
    trainer: Any, dataset: Dataset, column: str, num_prompts: int, batch_size: int, generate_kwargs: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers of the known users of `dataset`, of the generic user and of the reference; takes the user model off."""
    if "prompt" not in dataset.column_names:
        raise ValueError(f"Answers need a `prompt` column; found {sorted(dataset.column_names)}.")
    tokenizer = trainer._tokenizer
    prompts = list({str(prompt): prompt for prompt in dataset["prompt"]}.values())[:num_prompts]
    profile_column = trainer.args.user_profile_column
    texts = [None] * len(dataset) if profile_column is None else dataset[profile_column]
    profiles: dict[str, str | None] = {}
    for user_id, profile in zip(iterate_user_ids(dataset, column, "evaluation"), texts, strict=True):
        if user_id is not None and not (profiles.get(user_id) or "").strip():
            profiles[user_id] = profile
    users: list[UserId] = [*(user_id for user_id in profiles if user_id in trainer.user_vocab), None]
    options = {"batch_size": batch_size} | generate_kwargs
    known = {} if profile_column is None else profiles
    answers = answers_by_user(trainer.model, tokenizer, prompts, users, user_profiles=known, **options)
    detach_user_model(trainer.model)
    if trainer.ref_model is not None:
        reference = answers_by_user(trainer.ref_model, tokenizer, prompts, [None], **options)[None]
    else:
        with trainer.model.disable_adapter():
            reference = answers_by_user(trainer.model, tokenizer, prompts, [None], **options)[None]
    samples = [
        {
            "prompt": prompts[i],
            "reference": reference[i],
            "answers": {user or GENERIC_USER: texts[i] for user, texts in answers.items()},
        }
        for i in range(len(prompts))
    ]
    return summarize_answers(answers, reference), samples

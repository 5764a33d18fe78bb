"""A closer look at users: the trainer's evaluation of each one, answers to the same prompts, and how a run was made."""

import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer

from ._version import __version__
from .users import UserId


def evaluate_by_user(
    trainer: Trainer,
    dataset: Dataset,
    as_user: Mapping[str, str | None] | None = None,
    user_id_column: str = "user_id",
    description: str = "Evaluating users",
) -> dict[str, dict[str, float]]:
    """
    `trainer.evaluate` on the rows of one user at a time.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): With users or without.
        dataset (`Dataset`): Rows of several users, as for `evaluate`.
        as_user (`Mapping`, *optional*): Score a user's rows with the soft prompt of the user given here (`None`: the generic
            user's). Users who are not in it keep their own.
        user_id_column (`str`, *optional*, defaults to `"user_id"`): Column with the user of each pair.
        description (`str`, *optional*): Shown beside the progress bar.

    Returns:
        The metrics of each user of `dataset`, in order of first appearance, under the name in `dataset`. Shares are means over
        batches: exact if a user's rows fill batches evenly or are a single one.

    ```python
    own = evaluate_by_user(trainer, test)
    swapped = evaluate_by_user(trainer, test, as_user={"ann": "bo", "bo": "ann"})
    own["ann"]["eval_rewards/accuracies"], swapped["ann"]["eval_rewards/accuracies"]
    ```
    """
    as_user = as_user or {}
    bars = [bar for bar in map(trainer.pop_callback, (ProgressCallback, PrinterCallback)) if bar is not None]
    positions: dict[str, list[int]] = {}
    for position, user_id in enumerate(dataset[user_id_column]):
        positions.setdefault(user_id, []).append(position)
    metrics = {}
    for user_id in track(positions, description, disable=trainer.args.disable_tqdm, transient=True):
        rows = dataset.select(positions[user_id]).remove_columns(user_id_column)
        rows = rows.add_column(user_id_column, [as_user.get(user_id, user_id)] * len(rows))
        metrics[user_id] = trainer.evaluate(rows)
    for bar in bars:
        trainer.add_callback(bar)
    return metrics


def answers_by_user(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    user_ids: Sequence[UserId],
    batch_size: int = 32,
    description: str = "Writing answers",
    **generate_kwargs: Any,
) -> dict[UserId, list[str]]:
    """
    An answer to every prompt for every user, generated in left-padded batches that mix users and prompts.

    Args:
        model: With a user model attached.
        tokenizer: Padded on the left here, whatever its own side; the next tokens are decoded without special tokens.
        prompts (`Sequence[str]`): The same for all users.
        user_ids (`Sequence`): Users; `None` is the generic one.
        batch_size (`int`, *optional*, defaults to `32`): Rows generated at once.
        description (`str`, *optional*): Shown beside the progress bar.
        **generate_kwargs: Of `model.generate`.

    Returns:
        For each user the answers, in the order of `prompts`.
    """
    rows = [(user_id, prompt) for prompt in prompts for user_id in user_ids]
    answers: dict[UserId, list[str]] = {user_id: [] for user_id in user_ids}
    model.eval()
    for start in track(range(0, len(rows), batch_size), description, transient=True):
        batch_users, batch_prompts = zip(*rows[start : start + batch_size], strict=True)
        inputs = tokenizer(list(batch_prompts), return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        outputs = model.generate(**inputs, user_ids=list(batch_users), **generate_kwargs)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for user_id, text in zip(batch_users, texts, strict=True):
            answers[user_id].append(text)
    return answers


def opposite_users(preferences: Mapping[str, str]) -> dict[str, str]:
    """
    For each user one with another preference, in turn; users are left out if all prefer the same.

    ```python
    >>> opposite_users({"ann": "longer", "bo": "shorter", "cy": "longer", "di": "shorter"})
    {'ann': 'bo', 'bo': 'ann', 'cy': 'di', 'di': 'cy'}
    ```
    """
    opposite = {}
    for preference in set(preferences.values()):
        members = [user_id for user_id, other in preferences.items() if other == preference]
        others = [user_id for user_id, other in preferences.items() if other != preference]
        if others:
            opposite.update({user_id: others[i % len(others)] for i, user_id in enumerate(members)})
    return {user_id: opposite[user_id] for user_id in preferences if user_id in opposite}


def count_words(text: str) -> int:
    """Length of an answer, in words between spaces."""
    return len(text.split())


def summarize_users(
    dataset: Dataset,
    own: Mapping[str, Mapping[str, float]],
    swapped: Mapping[str, Mapping[str, float]],
    vanilla: Mapping[str, Mapping[str, float]],
    answers: Mapping[UserId, Sequence[str]],
) -> dict[str, Any]:
    """
    A row of numbers for each user, and what they come to.

    Args:
        dataset (`Dataset`): The pairs of the evaluations, with `user_id`, `preference` and `chosen`.
        own, swapped, vanilla: What [`evaluate_by_user`] returns with the own prompt, with that of a user of another
            preference, and for a model without users.
        answers: What [`answers_by_user`] returns; the user `None` is the generic one.

    Returns:
        `users` (the rows), `means`, `majority_share` (of the pairs that follow the more frequent preference: what a model
        without users can reach), `vanilla_accuracy` over all pairs, and `generic_length`. Lengths are in words.
    """
    preferences = dict(zip(dataset["user_id"], dataset["preference"], strict=True))
    rows = []
    for user_id, metrics in own.items():
        chosen = [text for user, text in zip(dataset["user_id"], dataset["chosen"], strict=True) if user == user_id]
        lengths = [count_words(text) for text in answers[user_id]]
        rows.append(
            {
                "user_id": user_id,
                "preference": preferences[user_id],
                "num_pairs": len(chosen),
                "accuracy_own": metrics["eval_rewards/accuracies"],
                "accuracy_generic": metrics["eval_generic/rewards/accuracies"],
                "accuracy_swapped": swapped[user_id]["eval_rewards/accuracies"],
                "mean_generated_length": mean(lengths),
                "mean_chosen_length": mean(map(count_words, chosen)),
                "empty_share": mean(length == 0 for length in lengths),
            }
        )
    return {
        "users": rows,
        "means": {name: mean(row[name] for row in rows) for name in rows[0] if isinstance(rows[0][name], float)},
        "length_by_preference": {
            preference: mean(row["mean_generated_length"] for row in rows if row["preference"] == preference)
            for preference in sorted(set(preferences.values()))
        },
        "generic_length": mean(map(count_words, answers[None])),
        "vanilla_accuracy": sum(vanilla[row["user_id"]]["eval_rewards/accuracies"] * row["num_pairs"] for row in rows)
        / len(dataset),
        "majority_share": max(Counter(dataset["preference"]).values()) / len(dataset),
    }


def users_table(summary: Mapping[str, Any]) -> Table:
    """The rows of [`summarize_users`] as a table to print."""
    table = Table("user", "prefers", "pairs", title="Pair accuracy by soft prompt, and length of answers in words")
    for heading in ("own", "generic", "opposite", "generated", "chosen"):
        table.add_column(heading, justify="right")
    for row in [*summary["users"], {"user_id": "mean", **summary["means"]}]:
        accuracies = [f"{row[f'accuracy_{name}']:.2f}" for name in ("own", "generic", "swapped")]
        lengths = [f"{row[f'mean_{name}_length']:.1f}" for name in ("generated", "chosen")]
        table.add_row(row["user_id"], row.get("preference"), str(row.get("num_pairs", "")), *accuracies, *lengths)
    table.add_row("generic user", "", "", "", "", "", f"{summary['generic_length']:.1f}")
    table.caption = f"vanilla DPO {summary['vanilla_accuracy']:.2f}, majority share {summary['majority_share']:.2f}"
    return table


def describe_run() -> dict[str, Any]:
    """What a table of results has to name: `command`, `versions` of the packages that matter, and `hardware`."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": {
            "trl_personal": __version__,
            **{name: version(name) for name in ("trl", "transformers", "peft", "torch")},
        },
        "hardware": f"{os.cpu_count()} CPU cores ({torch.get_num_threads()} threads used), {accelerator}, {platform.platform()}",
    }

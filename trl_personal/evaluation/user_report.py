"""What comes out of a run, user by user: a summary for a file, tables to print, and how the run was made."""

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
from rich.table import Table

from .._version import __version__
from ..user_profile import Prompt
from ..users import UserId


GENERIC_USER = "generic user"  # its name where a table or a file needs one
NUMBERS = (
    *("accuracy_own", "accuracy_generic", "accuracy_swapped"),
    *("mean_generated_length", "mean_chosen_length", "empty_share"),
)
MOST_ROWS = 20  # users in a table


def count_words(text: str) -> int:
    """Length of an answer, in words between spaces."""
    return len(text.split())


def text_of_last(messages: Prompt) -> str:
    """The text itself, or what the last message of a conversation says."""
    return messages if isinstance(messages, str) else str(messages[-1]["content"])


def summarize_users(
    dataset: Dataset,
    own: Mapping[str, Mapping[str, float]],
    swapped: Mapping[str, Mapping[str, float]],
    vanilla: Mapping[str, Mapping[str, float]],
    prompts: Sequence[Prompt],
    answers: Mapping[UserId, Sequence[str]],
) -> dict[str, Any]:
    """
    A row of numbers for each user, and what they come to; ready for JSON. Lengths are in words.

    Args:
        dataset (`Dataset`): The pairs of the evaluations, with `user_id` and `chosen` (text or messages) and, if known,
            `preference`; if users conflict within groups only, `dimension` names the group of each pair.
        own (`Mapping`): What [`evaluate_by_user`] returns,
        swapped (`Mapping`): ... with the soft prompts of users of another preference,
        vanilla (`Mapping`): ... for a model without users.
        prompts (`Sequence`): What [`answers_by_user`] was given,
        answers (`Mapping`): ... and what it returned, for the generic user `None` too. Users without answers have no lengths.

    Returns:
        `users` and `generic` (rows), `means`, `length_by_preference`, `vanilla_accuracy` over all pairs, `majority_share` (of
        the pairs that follow the more frequent preference: what a model without users can reach; `None` if preferences are
        not known) and `samples`, the answers of all users to each prompt.
    """
    known = dataset["preference"] if "preference" in dataset.column_names else [None] * len(dataset)
    preferences = dict(zip(dataset["user_id"], known, strict=True))
    chosen: dict[str, list[int]] = {user_id: [] for user_id in preferences}
    for user_id, text in zip(dataset["user_id"], dataset["chosen"], strict=True):
        chosen[user_id].append(count_words(text_of_last(text)))
    rows = [
        {
            "user_id": user_id,
            "preference": preference,
            "num_pairs": len(chosen[user_id]),
            "accuracy_own": own[user_id]["eval_rewards/accuracies"],
            "accuracy_generic": own[user_id]["eval_generic/rewards/accuracies"],
            "accuracy_swapped": swapped[user_id]["eval_rewards/accuracies"],
            "mean_chosen_length": mean(chosen[user_id]),
            **(summarize_lengths(answers[user_id]) if user_id in answers else {}),
        }
        for user_id, preference in preferences.items()
    ]
    written = [row for row in rows if "mean_generated_length" in row]  # by users with answers
    correct = [vanilla[user_id]["eval_rewards/accuracies"] * len(chosen[user_id]) for user_id in preferences]
    return {
        "users": rows,
        "generic": {"user_id": GENERIC_USER, "preference": None, **summarize_lengths(answers[None])},
        "means": {name: mean(row[name] for row in rows if name in row) for name in NUMBERS},
        "length_by_preference": {
            preference: mean(row["mean_generated_length"] for row in written if row["preference"] == preference)
            for preference in sorted({row["preference"] for row in written if row["preference"] is not None})
        },
        "vanilla_accuracy": sum(correct) / len(dataset),
        "majority_share": _majority_share(dataset),
        "samples": [
            {
                "prompt": text_of_last(prompt),
                "answers": {user_id or GENERIC_USER: texts[i] for user_id, texts in answers.items()},
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def _majority_share(dataset: Dataset) -> float | None:
    if "preference" not in dataset.column_names:
        return None
    dimensions = dataset["dimension"] if "dimension" in dataset.column_names else [""] * len(dataset)
    counts = Counter(zip(dimensions, dataset["preference"], strict=True))
    return sum(max(n for (name, _), n in counts.items() if name == dimension) for dimension in set(dimensions)) / len(
        dataset
    )


def summarize_lengths(answers: Sequence[str]) -> dict[str, Any]:
    """
    `mean_generated_length` in words, `empty_share` and `generated_lengths` of some answers.

    ```python
    >>> summarize_lengths(["yes", ""])
    {'mean_generated_length': 0.5, 'empty_share': 0.5, 'generated_lengths': [1, 0]}
    ```
    """
    lengths = [count_words(answer) for answer in answers]
    return {
        "mean_generated_length": mean(lengths),
        "empty_share": mean(length == 0 for length in lengths),
        "generated_lengths": lengths,
    }


def users_table(summary: Mapping[str, Any]) -> Table:
    """The numbers of [`summarize_users`], to print."""
    table = Table("user", "prefers", title="Pair accuracy by soft prompt, and length of answers in words")
    for heading in ("pairs", "own", "generic", "opposite", "generated", "chosen"):
        table.add_column(heading, justify="right")
    for row in [*summary["users"][:MOST_ROWS], {"user_id": "mean", **summary["means"]}]:
        digits = {name: 2 if name.startswith("accuracy") else 1 for name in NUMBERS[:5]}
        numbers = [f"{row[name]:.{digits[name]}f}" if name in row else "" for name in digits]
        table.add_row(row["user_id"], row.get("preference"), str(row.get("num_pairs", "")), *numbers)
    table.add_row(GENERIC_USER, *[""] * 5, f"{summary['generic']['mean_generated_length']:.1f}")
    caption = [f"vanilla DPO: accuracy {summary['vanilla_accuracy']:.2f}"]
    if summary["majority_share"] is not None:
        caption.append(f"majority share {summary['majority_share']:.2f}")
    if len(summary["users"]) > MOST_ROWS:
        caption.append(f"{len(summary['users']) - MOST_ROWS} more users in the file")
    table.caption = ", ".join(caption)
    return table


def answers_table(summary: Mapping[str, Any], prompt_index: int, user_ids: Sequence[str]) -> Table:
    """What some users (or `GENERIC_USER`) are answered to one prompt, side by side, from [`summarize_users`]."""
    sample = summary["samples"][prompt_index]
    preferences = {row["user_id"]: f"prefers {row['preference']}" for row in summary["users"] if row["preference"]}
    headings = [f"{user_id}\n{preferences.get(user_id, '')}" for user_id in user_ids]
    table = Table(*headings, title=sample["prompt"], title_justify="left", title_style="dim")
    table.add_row(*(sample["answers"][user_id].strip() for user_id in user_ids))
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
        "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {accelerator}, {platform.platform()}",
    }

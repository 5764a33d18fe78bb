"""A closer look at users: the trainer's evaluation of each one, answers to the same prompts, and how a run was made."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
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


def describe_run() -> dict[str, Any]:
    """What a table of results has to name: `command`, `versions` of the packages that matter, and `hardware`."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": {"trl_personal": __version__, **{name: version(name) for name in ("trl", "transformers", "peft", "torch")}},
        "hardware": f"{os.cpu_count()} CPU cores ({torch.get_num_threads()} threads used), {accelerator}, {platform.platform()}",
    }

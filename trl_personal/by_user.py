"""A closer look at users, one at a time: the trainer's evaluation of each, and answers of all to the same prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer

from .modeling import is_personalized
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
    for user_id in track(positions, description, disable=bool(trainer.args.disable_tqdm), transient=True):
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
    add_special_tokens: bool = True,
    **generate_kwargs: Any,
) -> dict[UserId, list[str]]:
    """
    An answer to every prompt for every user, generated in left-padded batches that mix users and prompts.

    Args:
        model: With a user model attached; a plain one writes for `user_ids=[None]`.
        tokenizer: Padded on the left here, whatever its own side; the next tokens are decoded without special tokens.
        prompts (`Sequence[str]`): The same for all users.
        user_ids (`Sequence`): Users; `None` is the generic one.
        batch_size (`int`, *optional*, defaults to `32`): Rows generated at once.
        description (`str`, *optional*): Shown beside the progress bar.
        add_special_tokens (`bool`, *optional*, defaults to `True`): Not for prompts that a chat template made.
        **generate_kwargs: Of `model.generate`.

    Returns:
        For each user the answers, in the order of `prompts`.
    """
    rows = [(user_id, prompt) for prompt in prompts for user_id in user_ids]
    answers: dict[UserId, list[str]] = {user_id: [] for user_id in user_ids}
    model.eval()
    generate: Any = model.generate
    for start in track(range(0, len(rows), batch_size), description, transient=True):
        batch_users, batch_prompts = zip(*rows[start : start + batch_size], strict=True)
        inputs = tokenizer(
            list(batch_prompts),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=add_special_tokens,
        )
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        users = {"user_ids": list(batch_users)} if is_personalized(model) else {}
        outputs = generate(**inputs, **users, **generate_kwargs)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for user_id, text in zip(batch_users, texts, strict=True):
            answers[user_id].append(text)
    return answers


def opposite_users(preferences: Mapping[str, str]) -> dict[str, str]:
    """
    For each user one with another preference, in turn.

    Raises:
        `ValueError`: if all users have the same preference.

    ```python
    >>> opposite_users({"ann": "longer", "bo": "shorter", "cy": "longer", "di": "longer"})
    {'ann': 'bo', 'bo': 'ann', 'cy': 'bo', 'di': 'bo'}
    ```
    """
    opposite, turns = {}, Counter[str]()
    for user_id, preference in preferences.items():
        others = [other for other in preferences if preferences[other] != preference]
        if not others:
            raise ValueError(
                f"All {len(preferences)} users prefer {preference!r}: nobody has the opposite preference."
            )
        opposite[user_id] = others[turns[preference] % len(others)]
        turns[preference] += 1
    return opposite

"""A closer look at users, one at a time: the trainer's evaluation of each, and answers of all to the same prompts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer

from ..models.attach import is_personalized
from ..models.saving import get_base_model
from ..user_profile import Prompt, render_user_profile, require_template
from ..users import UserId


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
            user's). Users who are not in it keep their own. With `user_profile_column`, the profile is that user's too: the
            first one in `dataset` (`None`: no profile).
        user_id_column (`str`, *optional*, defaults to `"user_id"`): Column with the user of each pair.
        description (`str`, *optional*): Shown beside the progress bar.

    Returns:
        The metrics of each user of `dataset`, in order of first appearance, under the name in `dataset`. Shares are means over
        batches: exact if a user's rows fill batches evenly or are a single one.

    Raises:
        `ValueError`: if a user in `as_user` needs a profile and has no row in `dataset`.

    ```python
    own = evaluate_by_user(trainer, test)
    swapped = evaluate_by_user(trainer, test, as_user={"ann": "bo", "bo": "ann"})
    own["ann"]["eval_rewards/accuracies"], swapped["ann"]["eval_rewards/accuracies"]
    ```
    """
    as_user = as_user or {}
    profile_column: str | None = trainer.args.user_profile_column  # type: ignore[attr-defined]
    bars = [bar for bar in map(trainer.pop_callback, (ProgressCallback, PrinterCallback)) if bar is not None]
    positions: dict[str, list[int]] = {}
    for position, user_id in enumerate(dataset[user_id_column]):
        positions.setdefault(user_id, []).append(position)
    metrics = {}
    for user_id in track(positions, description, disable=bool(trainer.args.disable_tqdm), transient=True):
        rows = dataset.select(positions[user_id]).remove_columns(user_id_column)
        rows = rows.add_column(user_id_column, [as_user.get(user_id, user_id)] * len(rows))
        if profile_column is not None and user_id in as_user:
            profile = _profile_of(as_user[user_id], dataset, positions, profile_column)
            rows = rows.remove_columns(profile_column).add_column(profile_column, [profile] * len(rows))
        metrics[user_id] = trainer.evaluate(rows)
    for bar in bars:
        trainer.add_callback(bar)
    return metrics


def _profile_of(
    user_id: str | None, dataset: Dataset, positions: Mapping[str, Sequence[int]], column: str
) -> str | None:
    if user_id is None:
        return None
    if user_id not in positions:
        raise ValueError(
            "A user in `as_user` has no row in `dataset`, so that no profile is known to go with the soft prompt. Pass users "
            "of `dataset`, or `None` for the generic user."
        )
    return dataset[positions[user_id][0]][column]


def answers_by_user(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    user_ids: Sequence[UserId],
    batch_size: int = 32,
    description: str = "Writing answers",
    user_profiles: Mapping[Any, str | None] | None = None,
    **generate_kwargs: Any,
) -> dict[UserId, list[str]]:
    """
    An answer to every prompt for every user, generated in left-padded batches that mix users and prompts.

    Args:
        model: With a user model attached; a plain one writes for `user_ids=[None]`.
        tokenizer: Padded on the left here, whatever its own side; the next tokens are decoded without special tokens.
        prompts (`Sequence`): Texts, or conversations for the chat template; the same for all users.
        user_ids (`Sequence`): Users; `None` is the generic one.
        batch_size (`int`, *optional*, defaults to `32`): Rows generated at once.
        description (`str`, *optional*): Shown beside the progress bar.
        user_profiles (`Mapping`, *optional*): Text about users, put into their prompts as in training; users who are not in
            it have none.
        **generate_kwargs: Of `model.generate`.

    Returns:
        For each user the answers, in the order of `prompts`.

    Raises:
        `ValueError`: for profiles, if the model was trained without them.
    """
    rows = [(user_id, prompt) for prompt in prompts for user_id in user_ids]
    texts = with_user_profiles(model, tokenizer, rows, user_profiles or {})
    use_template = not all(isinstance(prompt, str) for prompt in prompts)
    answers: dict[UserId, list[str]] = {user_id: [] for user_id in user_ids}
    model.eval()
    generate: Any = model.generate
    for start in track(range(0, len(rows), batch_size), description, transient=True):
        users = [user_id for user_id, _ in rows[start : start + batch_size]]
        inputs = encode_prompts(tokenizer, texts[start : start + batch_size], use_template)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        of_users = {"user_ids": users} if is_personalized(model) else {}
        outputs = generate(**inputs, **of_users, **generate_kwargs)
        written = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for user_id, text in zip(users, written, strict=True):
            answers[user_id].append(text)
    return answers


def with_user_profiles(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[UserId, Prompt]],
    user_profiles: Mapping[Any, str | None],
) -> list[Prompt]:
    """
    The prompts of `rows`, each with the profile of its user, if there is one, as the model was trained to read it.

    Raises:
        `ValueError`: if there are profiles and the model was trained without.
    """
    if not user_profiles:
        return [prompt for _, prompt in rows]
    template = require_template(get_base_model(model).user_profile_template)
    bos_token = tokenizer.bos_token
    return [render_user_profile(prompt, user_profiles.get(user_id), template, bos_token) for user_id, prompt in rows]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], use_template: bool) -> Any:
    """
    A batch of prompts, padded on the left. With `use_template`, plain text becomes the first message of a conversation.

    Raises:
        `ValueError`: if a prompt is a conversation and there is no chat template.
    """
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if not use_template:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                "A prompt is a list of messages, which needs a chat template, but the tokenizer has none, or "
                "--no_chat_template is set. Give the prompts as text."
            )
        return tokenizer(list(prompts), **options)
    texts = [
        tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return tokenizer(texts, **options, add_special_tokens=False)  # the template has them


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """
    A prompt as a conversation.

    ```python
    >>> as_messages("Why?")
    [{'role': 'user', 'content': 'Why?'}]
    ```
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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

"""What is known about a user as text: written into the prompt of the user's own term, and nowhere else."""

import string
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

from datasets.features.features import Value
from transformers import PreTrainedTokenizerBase

from .user_column import AnyDataset, require_column


Prompt: TypeAlias = str | list[dict[str, Any]]
AnyPrompt = TypeVar("AnyPrompt", str, list[dict[str, Any]], Prompt)
Row: TypeAlias = Mapping[str, Any]

USER_PROFILE_TEMPLATE = "User profile: {profile}"
USER_PROMPT_IDS = "user_prompt_ids"  # in a tokenized row: the prompt with the profile in it
# in a row on its way there: the prompt without the profile, and the answers as tokenized behind the prompt with it
PLAIN_PROMPT, USER_CHOSEN_IDS, USER_REJECTED_IDS = "plain_prompt", "user_chosen_ids", "user_rejected_ids"
SYSTEM_ROLES = ("system", "developer")


def check_user_profile_template(template: str) -> None:
    """
    Make sure that `template` has `{profile}` where the profile goes, and nothing else to fill in.

    Raises:
        `ValueError`: if not.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        fields = set()
    if fields != {"profile"}:
        raise ValueError(
            f"`user_profile_template` must have `{{profile}}` where the profile goes and no other field, got {template!r}. "
            "Write braces that are text twice."
        )


def render_user_profile(
    prompt: AnyPrompt,
    user_profile: str | None,
    template: str = USER_PROFILE_TEMPLATE,
    bos_token: str | None = None,
) -> AnyPrompt:
    """
    `prompt` with what is known about its user: the explicit user information of arXiv 2402.05133. A text gets it as its
    first line, a conversation as its system turn, behind what the system turn says already.

    Args:
        prompt (`str` or `list[dict]`): The prompt, a text or messages. It is not changed in place.
        user_profile (`str`, *optional*): Text about the user. `None` and a blank text leave the prompt as it is.
        template (`str`, *optional*, defaults to `"User profile: {profile}"`): Text with `{profile}` where the profile goes. A
            model was trained with `model.user_profile_template`.
        bos_token (`str`, *optional*): The tokenizer's BOS token. A text that starts with it keeps it in front.

    Raises:
        `TypeError`: if the profile is no text. `ValueError`: for a template without `{profile}`.

    ```python
    >>> render_user_profile("Why is the sky blue?", "Is five years old.")
    'User profile: Is five years old.\\nWhy is the sky blue?'
    >>> render_user_profile([{"role": "user", "content": "Why?"}], "Likes it short.", template="About me: {profile}")
    [{'role': 'system', 'content': 'About me: Likes it short.'}, {'role': 'user', 'content': 'Why?'}]
    ```
    """
    check_user_profile_template(template)
    if user_profile is not None and not isinstance(user_profile, str):
        raise TypeError(f"A user profile must be text (or `None`), found {type(user_profile).__name__}.")
    if user_profile is None or not user_profile.strip():
        return prompt
    text = template.format(profile=user_profile.strip())
    if isinstance(prompt, str):
        bos = bos_token if bos_token and prompt.startswith(bos_token) else ""
        return f"{bos}{text}\n{prompt.removeprefix(bos)}"
    if not prompt or prompt[0]["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": text}, *prompt]
    content: Any = prompt[0]["content"]
    merged = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [{**prompt[0], "content": merged}, *prompt[1:]]


def insert_user_profile(text: str, user_profile: str | None, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    [`render_user_profile`] in a prompt that is text already. If it begins as the tokenizer's chat template begins a
    conversation, the profile goes into its system turn, else it becomes the first line.

    Raises:
        `ValueError`: for a chat template that writes the system turn elsewhere than at the beginning.
    """
    if tokenizer.chat_template is None or not (user_profile or "").strip():
        return render_user_profile(text, user_profile, template, str(tokenizer.bos_token or ""))
    first, second = "First text.", "Second text."
    system, user = {"role": "system", "content": first}, {"role": "user", "content": second}

    def write(*messages: dict[str, Any]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))

    def opening(*messages: dict[str, Any]) -> str:
        """What is in front of the user's text."""
        return write(*messages).rpartition(second)[0]

    conversation = write(system, user, {"role": "assistant", "content": "Third text."}, user)
    if not 0 <= conversation.find(first) < conversation.find(second):
        raise ValueError(
            "The chat template does not write a system turn in front of the conversation, so that the place of the profile is "
            "not to be found in token ids. Put it into the messages: `render_user_profile(messages, profile, template)`."
        )
    plain, (start, _, end) = opening(user), opening(system, user).partition(first)
    content, has_end, rest = text.removeprefix(start).partition(end)
    has_system = text.startswith(start) and has_end and not (len(plain) > len(start) and text.startswith(plain))
    if has_system and start != plain:  # a default system turn, which `plain` has, gives way to the profile
        messages = [{"role": "system", "content": content}, user]
    elif text.startswith(plain):
        messages, rest = [user], text.removeprefix(plain)
    else:
        return render_user_profile(text, user_profile, template, str(tokenizer.bos_token or ""))
    return opening(*render_user_profile(messages, user_profile, template)) + rest


def insert_profile_ids(
    input_ids: list[int], user_profile: str | None, template: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """
    [`insert_user_profile`] for token ids.

    Raises:
        `ValueError`: if the tokenizer does not make the same ids of their text.
    """
    if not (user_profile or "").strip():
        return input_ids
    text = str(tokenizer.decode(input_ids, clean_up_tokenization_spaces=False))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if encode(text) != input_ids:
        raise ValueError(
            "The tokenizer makes other ids of the text of a prompt than were given, so that the prompt would change with the "
            "profile. Put the profile into the text before the tokenizer: `render_user_profile(prompt, profile, template)`."
        )
    return encode(insert_user_profile(text, user_profile, template, tokenizer))


def require_template(template: str | None) -> str:
    """
    The template of a model that was trained with profiles.

    Raises:
        `ValueError`: if the model was trained without profiles.
    """
    if template is None:
        raise ValueError(
            "The model was trained without profiles, so `user_profiles` would be text it has never seen. Leave them out, or "
            "train with `user_profile_column`."
        )
    return template


def check_profile_column(dataset: AnyDataset, column: str, name: str) -> None:
    """
    Make sure that `dataset` has profiles.

    Raises:
        `ValueError`: if it has no column `column`. `TypeError`: if the column does not hold text.
    """
    require_column(
        dataset,
        column,
        name,
        "Add one (`None` for a user of whom nothing is known), or name yours with "
        "`PersonalizedDPOConfig(user_profile_column=...)`.",
    )
    feature = (dataset.features or {}).get(column)
    dtype = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    if feature is not None and dtype not in ("string", "large_string", "null"):
        raise TypeError(f"Column `{column}` of the {name} dataset must hold text (or `None`), found {dtype}.")


def with_profile(row: Row, column: str, template: str, bos_token: str | None) -> dict[str, Any]:
    """The row's prompt with the profile in it; the prompt itself is kept as `PLAIN_PROMPT`."""
    prompt = render_user_profile(row["prompt"], row.get(column), template, bos_token)
    return {"prompt": prompt, PLAIN_PROMPT: row["prompt"]}


def without_profile(row: Row) -> dict[str, Any]:
    """Undo [`with_profile`] in a tokenized row, and keep its tokens as those of the user's term."""
    return {
        "prompt": row[PLAIN_PROMPT],
        USER_PROMPT_IDS: row["prompt_ids"],
        USER_CHOSEN_IDS: row["chosen_ids"],
        USER_REJECTED_IDS: row["rejected_ids"],
    }


def check_user_prompt(row: Row, column: str, max_length: int | None) -> dict[str, Any]:
    """
    `USER_PROMPT_IDS` of a row that is tokenized both ways.

    Raises:
        `ValueError`: if the profile does not show in the tokens, changes the answers, or alone fills `max_length`.
    """
    plain, with_text = row["prompt_ids"], row[USER_PROMPT_IDS]
    has_profile = bool((row.get(column) or "").strip())
    if has_profile and plain == with_text:
        raise ValueError(
            "The chat template leaves the system turn out, so that profiles do not reach the model. Use a chat template with "
            "a system turn, or put the profile into the first message yourself."
        )
    if (row[USER_CHOSEN_IDS], row[USER_REJECTED_IDS]) != (row["chosen_ids"], row["rejected_ids"]):
        raise ValueError(
            "Behind a prompt with a profile, an answer has other tokens than behind the prompt alone, so that the reference "
            "would score another answer. Use a chat template that renders answers the same way with a system turn."
        )
    if max_length is not None and len(with_text) - len(plain) >= max_length:
        raise ValueError(
            f"A profile alone has {len(with_text) - len(plain)} tokens and fills `max_length` ({max_length}). Shorten the "
            f"texts in `{column}`, or raise `max_length`."
        )
    return {USER_PROMPT_IDS: with_text}


def truncate_like_plain(
    example: Row, completion: str, max_length: int | None, truncation_mode: str
) -> tuple[list[int], list[int]]:
    """
    The user's prompt and the tokens of `completion` (`"chosen_ids"` or `"rejected_ids"`), cut where TRL cuts the row without
    a profile: `max_length` counts text without profiles, and the profile itself is never cut.

    ```python
    >>> row = {"prompt_ids": [1, 5, 6], "user_prompt_ids": [1, 8, 9, 5, 6], "chosen_ids": [2, 3, 4]}
    >>> truncate_like_plain(row, "chosen_ids", 4, "keep_start")
    ([1, 8, 9, 5, 6], [2])
    >>> truncate_like_plain(row, "chosen_ids", 4, "keep_end")
    ([1, 8, 9, 6], [2, 3, 4])
    ```
    """
    prompt, user_prompt, answer = example["prompt_ids"], example[USER_PROMPT_IDS], example[completion]
    if max_length is None:
        return user_prompt, answer
    if truncation_mode == "keep_start":
        return user_prompt, answer[: max(max_length - len(prompt), 0)]
    answer = answer[-max_length:]
    shared = common_suffix_length(prompt, user_prompt)
    kept = min(shared, max_length - len(answer))
    return user_prompt[: len(user_prompt) - shared] + user_prompt[len(user_prompt) - kept :], answer


def common_suffix_length(one: list[int], other: list[int]) -> int:
    """
    How many items at the end are the same.

    ```python
    >>> common_suffix_length([1, 2, 3], [5, 2, 3])
    2
    ```
    """
    for length, (left, right) in enumerate(zip(reversed(one), reversed(other), strict=False)):
        if left != right:
            return length
    return min(len(one), len(other))

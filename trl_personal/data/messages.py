"""Prompts and answers as messages: TRL's conversational format."""

from typing import Any, TypeAlias

from datasets import Value

from .rows import SkippedRow, text_of


Message: TypeAlias = dict[str, str]


def user_message(content: str) -> Message:
    """
    What the user says.

    ```python
    >>> user_message("Why?")
    {'role': 'user', 'content': 'Why?'}
    ```
    """
    return {"role": "user", "content": content}


def assistant_message(content: str) -> Message:
    """What the model says."""
    return {"role": "assistant", "content": content}


def prompt_features(conversational: bool) -> dict[str, Any]:
    """Types of the columns `prompt`, `chosen` and `rejected`: messages or text."""
    messages = [{"role": Value("string"), "content": Value("string")}]
    return {column: messages if conversational else Value("string") for column in ("prompt", "chosen", "rejected")}


def is_messages(value: object) -> bool:
    """Whether `value` is a list of messages, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def messages_of(value: object, column: str) -> list[Message]:
    """
    `value` as messages with nothing but role and content.

    Raises:
        `SkippedRow`: if `value` is not a list of messages, or a message has no text.
    """
    if not isinstance(value, list) or not is_messages(value):
        raise SkippedRow(f"`{column}` is not a list of messages")
    if any(item.get("tool_calls") for item in value):
        raise SkippedRow(f"`{column}` has a message with `tool_calls`")
    if not all(isinstance(item.get("content"), str) and item["content"].strip() for item in value):
        raise SkippedRow(f"`{column}` has a message without text")
    return [{"role": str(item["role"]), "content": text_of({column: item["content"]}, column)} for item in value]

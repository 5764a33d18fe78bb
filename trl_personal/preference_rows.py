"""Rows that cannot teach: nothing in them says what a user prefers."""

import math
import os
from collections.abc import Mapping
from typing import Any


SAME_ANSWERS = "both responses are the same"
NO_SHARED_START = "no prompt, and two texts that share no start"


def why_it_cannot_teach(
    row: Mapping[str, Any],
    prompt: str | None = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    has_images: bool = False,
) -> str | None:
    """
    Why a pair cannot teach; `None` if it can. `prompt` is the name of its column, or `None` if answers begin with the prompt.
    Beside images, a prompt may be without text.

    ```python
    >>> why_it_cannot_teach({"prompt": "Why?", "chosen": "No.", "rejected": "No."})
    'both responses are the same'
    >>> why_it_cannot_teach({"prompt": " ", "chosen": "No.", "rejected": "Yes."})
    '`prompt` is blank'
    ```
    """
    for name in filter(None, (None if has_images else prompt, chosen, rejected)):
        if (fault := _fault_of(row.get(name))) is not None:
            return f"no `{name}`" if fault == "none" else f"`{name}` {fault}"
    if row[chosen] == row[rejected]:
        return SAME_ANSWERS
    if prompt is None and not has_images and not shared_start(row[chosen], row[rejected]):
        return NO_SHARED_START
    return None


def _fault_of(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, str):
        return None if value.strip() else "is blank"
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return "is neither text nor messages"
    if not value:
        return "is blank"
    return None if all(map(_says_something, value)) else "has a message without text"


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))


def shared_start(first: object, second: object) -> int:
    """
    How much two texts, or two lists of messages, share at the start. A space before the first difference belongs to the
    answers, as in TRL.

    ```python
    >>> shared_start("Why? Because.", "Why? No idea."), shared_start("Yes.", "No.")
    (4, 0)
    ```
    """
    if not isinstance(first, (str, list)) or type(first) is not type(second):
        return 0
    if isinstance(first, list):
        pairs = enumerate(zip(first, second, strict=False))
        return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
    length = len(os.path.commonprefix([first, str(second)]))
    return length - 1 if length and first[length - 1] == " " else length

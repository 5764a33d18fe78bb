"""Raw rows: fields checked one by one, and the exception that says why a row gives no pair."""

from typing import Any, TypeAlias

from ..users import as_user_id


Row: TypeAlias = dict[str, Any]


class SkippedRow(Exception):
    """
    A row, or a part of one, that gives no pair.

    Args:
        reason (`str`): Why the row gives no pair, in words that fit every such row: the report counts rows by reason.
        broken (`bool`): Whether the row is at fault, and not a rule or an option that leaves a sound row out.
    """

    def __init__(self, reason: str, *, broken: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.broken = broken


def text_of(row: Row, column: str) -> str:
    """
    The text in `column`, as it is.

    Raises:
        `SkippedRow`: if the value is missing, blank or not text.

    ```python
    >>> text_of({"prompt": " Why? "}, "prompt")
    ' Why? '
    ```
    """
    value = row.get(column)
    if value is None:
        raise SkippedRow(f"no `{column}`")
    if not isinstance(value, str):
        raise SkippedRow(f"`{column}` is not text")
    if not value.strip():
        raise SkippedRow(f"`{column}` is blank")
    return _checked(value, column)


def user_id_of(row: Row, column: str) -> str:
    """
    The user in `column`, as text.

    Raises:
        `SkippedRow`: if there is no user, or the id is neither text nor an integer.

    ```python
    >>> user_id_of({"worker": 7}, "worker")
    '7'
    ```
    """
    value = row.get(column)
    if value is None or value == "":
        raise SkippedRow(f"no `{column}`")
    try:
        return _checked(str(as_user_id(value)), column)
    except TypeError as error:
        raise SkippedRow(f"`{column}` is neither text nor an integer") from error


def _checked(value: str, column: str) -> str:
    """JSON can hold half of a character (a lone surrogate), which no file can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SkippedRow(f"`{column}` is not valid Unicode") from error
    return value

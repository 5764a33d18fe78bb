"""Raw rows: fields checked one by one, and the exception that says why a row gives no pair."""

from typing import Any, TypeAlias

from ..users import as_user_id, whole_number


Row: TypeAlias = dict[str, Any]


class UntypedRow(dict[str, Any]):
    """A row of a file that knows nothing but text, such as CSV: there `12.0` may be what pandas made of `12`."""


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
        `SkippedRow`: if there is no user, or the id is neither text nor a whole number.

    ```python
    >>> user_id_of({"worker": 7}, "worker"), user_id_of(UntypedRow(worker="7.0"), "worker")
    ('7', '7')
    ```
    """
    value = row.get(column)
    try:
        user_id = "" if value is None else as_user_id(value)
    except TypeError as error:
        raise SkippedRow(f"`{column}` is neither text nor a whole number") from error
    except ValueError:
        user_id = ""
    if not user_id:
        raise SkippedRow(f"no `{column}`")
    if not user_id.strip():
        raise SkippedRow(f"`{column}` is blank")
    if isinstance(row, UntypedRow):
        try:
            user_id = whole_number(user_id)
        except ValueError as error:
            raise SkippedRow(f"`{column}` is a number that was rounded, so it may stand for several users") from error
    return _checked(user_id, column)


def _checked(value: str, column: str) -> str:
    """JSON can hold half of a character (a lone surrogate), which no file can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SkippedRow(f"`{column}` is not valid Unicode") from error
    return value

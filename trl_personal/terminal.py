"""Text and tables on their way to a terminal or a file: what others wrote must not steer it, and nothing is cut off."""

import json
import os
import unicodedata
from typing import IO, TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.console import RenderableType


FILE_WIDTH = 200  # columns of tables in a file, unless `COLUMNS` says otherwise


# marks that let text read in another order than it is written in
DIRECTION_MARKS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}
LINE_ENDS = {"\u2028", "\u2029"}


def printable(text: str, keep: str = "") -> str:
    """
    `text` with its control characters written as escapes. Only those in `keep`, such as line ends and tabs, stay.

    ```python
    >>> printable("ann\\x1b[2Jbo")
    'ann\\\\x1b[2Jbo'
    >>> printable("two\\nlines", keep="\\n") == "two\\nlines"
    True
    ```
    """
    return "".join(
        character if character in keep or not _steers(character) else _escape(character) for character in text
    )


def json_line(value: Any, indent: int | None = None) -> str:
    """`value` as JSON for a terminal or a file: readable text as it is, control characters as escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if _steers(c) and c != "\n" else c for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or character in DIRECTION_MARKS or character in LINE_ENDS


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def print_whole(*renderables: "RenderableType", file: IO[str] | None = None) -> None:
    """
    Print tables and text with rich so that all of it can be read: a cell that is too wide goes on in its next line, where rich
    alone would cut it, and a file gets wider lines than a terminal.

    Args:
        renderables (`RenderableType`): What `rich.print` takes.
        file (`IO[str]`, *optional*): Where to, instead of the standard output.
    """
    from rich.console import Console  # rich takes a moment to load

    console = Console(file=file, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=file, markup=False, width=FILE_WIDTH)
    for renderable in renderables:
        _fold(renderable)
    console.print(*renderables)


def _fold(renderable: Any) -> None:
    """Let the columns of all tables in it fold."""
    for column in getattr(renderable, "columns", ()):
        column.overflow = "fold"
    for part in getattr(renderable, "renderables", ()):
        _fold(part)

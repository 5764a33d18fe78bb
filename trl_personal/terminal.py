"""Text on its way to a terminal: what others wrote must not steer it."""

import json
import unicodedata
from typing import Any


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

"""Files of JSON and CSV, row by row: a row that cannot be read is told and left out, and the rows after it are read."""

import csv
import gzip
import json
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from .rows import Row, SkippedRow, UntypedRow


JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip"}

Placed: TypeAlias = tuple[str, Row | SkippedRow]  # where a row stands, and the row or why there is none


class TwiceError(ValueError):
    """A key that stands twice in one JSON object: which of the two values counts is anybody's guess."""


def suffix_of(path: Path) -> str:
    """
    The type of a file by its name, without `.gz`.

    ```python
    >>> suffix_of(Path("rows.JSONL.gz")), suffix_of(Path("v1.2/rows.csv")), suffix_of(Path("rows"))
    ('.jsonl', '.csv', '')
    ```
    """
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def rows_of_file(path: Path) -> Iterator[Placed]:
    """
    The rows of a JSON or CSV file, each with its place.

    Raises:
        `ValueError`: if the file as a whole cannot be read; the message has its name and the line.
    """
    _check_encoding(path)
    try:
        yield from _rows_of_csv(path) if suffix_of(path) in CSV_SUFFIXES else _rows_of_json(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}). Copy it again.") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _check_encoding(path: Path) -> None:
    try:
        with _open(path) as stream:
            start = stream.read(4)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no gzip file, or is damaged ({error}).") from error
    for mark, name in OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path} is {name}, not text in UTF-8. Save it as UTF-8, under a name that says its type."
            )


# --- JSON ---------------------------------------------------------------------------------------------------------------


def _rows_of_json(path: Path) -> Iterator[Placed]:
    if is_json_list(path):
        for number, row in enumerate(read_json_list(path), start=1):
            yield f"{path}, row {number}", row if type(row) is dict else SkippedRow(_not_an_object(row))
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line := line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"").strip():
                yield f"{path}, line {number}", _parse_line(line)


def _parse_line(line: bytes) -> Row | SkippedRow:
    try:
        row = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return SkippedRow("not UTF-8")
    except RecursionError:
        return SkippedRow("nested too deeply")
    except TwiceError:
        return SkippedRow("a key twice")
    except ValueError:  # a JSONDecodeError, or a number of thousands of digits
        return SkippedRow("not JSON")
    return row if isinstance(row, dict) else SkippedRow(_not_an_object(row))


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise TwiceError
    return found


def _not_an_object(value: object) -> str:
    return "a key twice" if isinstance(value, dict) else "not a JSON object"


DECODER = json.JSONDecoder(object_pairs_hook=_once)


class _Twice(dict[str, Any]):
    """An object of a list with a key that stands twice: the rows beside it can be read."""


def _once_or_marked(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    inner = any(isinstance(value, _Twice) for value in found.values())
    return found if len(found) == len(pairs) and not inner else _Twice(found)


def is_json_list(path: Path) -> bool:
    """Whether a file is one JSON list, and not a value a line of which the first happens to be a list."""
    if suffix_of(path) not in JSON_SUFFIXES:
        return False
    _check_encoding(path)
    with _open(path) as stream:
        lines = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in stream)
        first = next(filter(None, lines), b"")
        if not first.startswith(b"["):
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return True
        return not any(lines)


def read_json_list(path: Path) -> list[Any]:
    """
    The rows of a file that is one JSON list.

    Raises:
        `ValueError`: if the file is damaged, or holds something else.
    """
    with _open(path) as stream:
        data = stream.read()
    try:
        rows = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once_or_marked)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, is not UTF-8. Save the file as UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). The file is cut off or damaged; copy it again.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a JSON list of rows, found {type(rows).__name__}.")
    return rows


# --- CSV ----------------------------------------------------------------------------------------------------------------


def _rows_of_csv(path: Path) -> Iterator[Placed]:
    """
    Fields are kept as text: user 007 is not user 7, and user "NA" is a user. An empty field is `None`.

    A quote that is never closed would swallow what follows, so reading goes on in the line after the one with that quote.
    """
    with _open(path) as stream:
        lines = _Lines(stream)
        names: list[str] | None = None
        for line in lines:
            taken = [line]
            fields = _fields_of_row(lines, taken, path)
            number = line[0]
            if fields is None:  # a quote is wrong somewhere in what was taken: only its first line is at fault
                lines.put_back(taken[1:])
                if names is None:
                    raise ValueError(f"{path}, line {number}, must name the columns, and its quotes do not match.")
                yield f"{path}, line {number}", SkippedRow("quotes that do not match")
            elif names is None:
                names = _check_header(fields, path) if fields else None
            elif fields:
                yield f"{path}, line {number}", _row_of(fields, names)
    if names is None:
        raise ValueError(f"{path} is empty; its first line must name the columns.")


class _Lines:
    """Lines as text, each with its number. What is not UTF-8 is kept as it is, to be told with its row."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.numbered = enumerate(stream, start=1)
        self.waiting: deque[tuple[int, str]] = deque()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> tuple[int, str]:
        if self.waiting:
            return self.waiting.popleft()
        number, line = next(self.numbered)
        data = line.removeprefix(BYTE_ORDER_MARK if number == 1 else b"")
        return number, data.decode("utf-8", "surrogateescape")

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        self.waiting.extendleft(reversed(lines))


def _fields_of_row(lines: _Lines, taken: list[tuple[int, str]], path: Path) -> list[str] | None:
    """The fields of the row that starts in `taken`, to which its other lines are added; `None` if its quotes do not match."""

    def texts() -> Iterator[str]:
        yield taken[0][1]
        for line in lines:
            taken.append(line)
            yield line[1]

    csv.field_size_limit(sys.maxsize)
    try:
        return next(csv.reader(texts(), delimiter=_delimiter(path), strict=True), [])
    except csv.Error:
        return None


def _delimiter(path: Path) -> str:
    return "\t" if suffix_of(path) == ".tsv" else ","


def _check_header(names: list[str], path: Path) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}, line 1, has the column {twice[0]!r} twice. Give each column a name of its own.")
    if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
        raise ValueError(
            f"{path}, line 1, names one column, {names[0]!r}. Separate the fields of a CSV file by commas."
        )
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line 1, is not UTF-8. Save the file as UTF-8.") from error
    return names


def _row_of(fields: list[str], names: list[str]) -> Row | SkippedRow:
    if len(fields) != len(names):
        return SkippedRow(f"{'fewer' if len(fields) < len(names) else 'more'} fields than columns")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return SkippedRow("not UTF-8")
    return UntypedRow((name, text or None) for name, text in zip(names, fields, strict=True))

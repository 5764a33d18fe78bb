"""Open a data set by its path or by its name on the Hugging Face Hub: raw rows with their places, nothing interpreted yet."""

import logging
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict

from ..user_column import AnyDataset
from .folders import SUFFIXES, TABLE_BUILDERS, files_of_folder, known_types
from .rows import Row, SkippedRow
from .text_files import Placed, is_json_list, read_json_list, rows_of_file, suffix_of


logger = logging.getLogger(__name__)

NUM_PEEKED = 100  # rows that are looked at before reading
PARQUET_REVISION = "refs/convert/parquet"  # where the Hub keeps its own conversion of a set that has a loading script
KINDS_OF_FILES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

__all__ = ["Source", "check_columns", "open_source", "peek", "read_json_list"]


@dataclass(frozen=True)
class FileSource:
    """The rows of JSON and CSV files. A file that is one JSON list is parsed once, all others as they are iterated."""

    files: tuple[Path, ...]
    lists: dict[Path, list[Placed]] = field(default_factory=dict, compare=False, repr=False)

    def __iter__(self) -> Iterator[Placed]:
        for file in self.files:
            if file not in self.lists and is_json_list(file):
                self.lists[file] = list(rows_of_file(file))
            yield from self.lists.get(file) or rows_of_file(file)


@dataclass(frozen=True)
class TableSource:
    """The rows of a dataset, which knows its columns and their types."""

    table: AnyDataset
    name: str

    def __iter__(self) -> Iterator[Placed]:
        table = self.table.with_format(None) if isinstance(self.table, Dataset) else self.table
        for number, row in enumerate(table, start=1):
            yield f"{self.name}, row {number}", dict(row)


@dataclass(frozen=True)
class RowSource:
    """Rows that a loader has put together."""

    rows: Sequence[Placed]

    def __iter__(self) -> Iterator[Placed]:
        return iter(self.rows)


Source: TypeAlias = FileSource | TableSource | RowSource  # may be iterated over more than once


def open_source(
    name_or_path: str | Path, *, config_name: str | None = None, revision: str | None = None, streaming: bool = False
) -> dict[str, Source]:
    """
    The raw rows of a data set, per split of the source. A file is one split, `train`.

    Args:
        name_or_path (`str` or `Path`): A file (`.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, also with `.gz`, `.parquet`,
            `.arrow`), a folder with such files, all of one type, a folder that `save_to_disk` wrote, or a set on the Hub,
            `owner/name`. A path that exists wins over a name on the Hub.
        config_name (`str`, *optional*): Name of the configuration of a set on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a set on the Hub.
        streaming (`bool`): Whether tables are read while they are iterated. JSON and CSV always are.

    Raises:
        `FileNotFoundError`: if there is no such file or folder, or no such set. `ValueError`: for a file type that is not
        known, or a file that cannot be read.
    """
    if not str(name_or_path).strip():
        raise FileNotFoundError(
            "The name of the data set is empty. Give a file, a folder or a name on the hub, `owner/name`."
        )
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return open_files({"train": [path]}, streaming)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _open_saved(path)
        return open_files(files_of_folder(path, config_name), streaming)
    if path.exists():
        kind = KINDS_OF_FILES.get(stat.S_IFMT(path.stat().st_mode), "something else")
        raise ValueError(f"{path} must be a file or a folder, found {kind}. Write the rows into a file first.")
    check_source_name(str(name_or_path))
    found = _open_hub(str(name_or_path), config_name, revision, streaming)
    return {split: TableSource(table, f"{name_or_path}, {split}") for split, table in found.items()}


def check_source_name(name: str) -> None:
    """
    Make sure that `name` is a path that exists or a name on the hub, `owner/name`, without asking the hub.

    Raises:
        `FileNotFoundError`: if it can be neither.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return
    is_hub_name = name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
    if not is_hub_name or suffix_of(path) in SUFFIXES:
        raise FileNotFoundError(
            f"There is no file or folder {name or repr(name)}. Give a path that exists, or a name on the hub, `owner/name`."
        )


def _open_hub(name: str, config_name: str | None, revision: str | None, streaming: bool) -> Mapping[str, AnyDataset]:
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        return dict(datasets.load_dataset(name, config_name, revision=revision, **options))
    except RuntimeError as error:
        # `datasets` 4 and later run no loading scripts; the Hub's conversion has one folder per configuration
        if "scripts are no longer supported" not in str(error) or revision is not None:
            raise
        logger.info("%s has a loading script; reading its conversion on the Hub, %s.", name, PARQUET_REVISION)
        return dict(datasets.load_dataset(name, data_dir=config_name, revision=PARQUET_REVISION, **options))
    except (OSError, ValueError) as error:
        error.add_note(f"There is no folder {name}, so it was looked up on the Hugging Face Hub.")
        raise


def open_files(splits: Mapping[str, Sequence[Path]], streaming: bool = False) -> dict[str, Source]:
    """
    The rows of files, by split; the files of a split are all JSON, all CSV, or tables of one type.

    Raises:
        `FileNotFoundError`: if one is not there. `ValueError`: for a file type that is not known, or a table that cannot be
        read.
    """
    sources: dict[str, Source] = {}
    for split, files in splits.items():
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"There is no file {file}. Give a path that exists.")
            if suffix_of(file) not in SUFFIXES or (suffix_of(file) in TABLE_BUILDERS and file.suffix == ".gz"):
                raise ValueError(
                    f"{file} must be a file of type {known_types()}, found {[file.suffix] if file.suffix else file.name}."
                )
        if suffix_of(files[0]) in TABLE_BUILDERS:
            name = str(files[0] if len(files) == 1 else files[0].parent)
            sources[split] = TableSource(_open_tables(files, streaming), name)
        else:
            sources[split] = FileSource(tuple(files))
    return sources


def _open_tables(files: Sequence[Path], streaming: bool) -> AnyDataset:
    builder = TABLE_BUILDERS[suffix_of(files[0])]
    try:
        names = [str(file) for file in files]
        table = datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming)
        if streaming:
            next(iter(table), None)  # a damaged file is told now
        return table
    except Exception as error:  # `datasets` raises errors of several packages
        if len(files) > 1:
            for file in files:
                _open_tables([file], streaming)  # says which one it is
            raise ValueError(f"{files[0].parent} has files whose columns differ ({_reason(error)}).") from error
        raise ValueError(
            f"{files[0]} cannot be read as {builder} ({_reason(error)}). It is damaged or empty."
        ) from error


def _open_saved(folder: Path) -> dict[str, Source]:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise ValueError(f"{folder} cannot be read as a folder of `save_to_disk` ({_reason(error)}).") from error
    splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    return {split: TableSource(table, f"{folder}, {split}") for split, table in splits.items()}


def _reason(error: BaseException) -> str:
    """The first cause: `datasets` wraps it in errors that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def peek(source: Iterable[Placed], name: str) -> list[Row]:
    """
    The first rows of `source` that can be read, to see what it holds: JSON need not have every field in every row.

    Raises:
        `ValueError`: if there is none; the message says what is wrong with the first one.
    """
    problems: list[str] = []
    rows = list(islice(_readable(source, problems), NUM_PEEKED))
    if not rows:
        raise ValueError(f"No row of {name} can be read: {problems[0]}." if problems else f"{name} holds no row.")
    return rows


def _readable(source: Iterable[Placed], problems: list[str]) -> Iterator[Row]:
    for place, row in source:
        if not isinstance(row, SkippedRow):
            yield row
        elif not problems:
            problems.append(f"{place}: {row.reason}")


class MissingColumnError(ValueError):
    """A column that a loader reads and the data lack."""


def check_columns(rows: list[Row], needed: Iterable[str], name: str, hint: str) -> None:
    """
    Make sure that the first rows of a source have the columns a loader reads.

    Raises:
        `ValueError`: with the missing columns, the columns found, and `hint` on what to do.
    """
    found = columns_of(rows)
    if missing := sorted(set(needed) - set(found)):
        raise MissingColumnError(f"{name} has no column {missing}; found {sorted(found)}. {hint}")


def columns_of(rows: list[Row]) -> list[str]:
    """The columns of the first rows, in order."""
    return list(dict.fromkeys(column for row in rows for column in row))


def nearest(name: str, names: Iterable[str], others: Sequence[str] = ()) -> str | None:
    """
    The one of `names` that was probably meant by `name`: a similar one, or one of `others`.

    ```python
    >>> nearest("prompt", ["promptt", "answer"]), nearest("prompt", ["question"], ["query", "question"])
    ('promptt', 'question')
    ```
    """
    by_plain = {other.strip().lower(): other for other in names}
    close = get_close_matches(name.lower(), by_plain, n=1, cutoff=0.75)
    begins = [other for other in by_plain if len(other) > 2 and (name.startswith(other) or other.startswith(name))]
    found = close or begins or [other for other in others if other in by_plain]
    return by_plain[found[0]] if found else None

"""Open a data set by its name on the Hugging Face Hub or by its path: raw rows, nothing interpreted yet."""

import csv
import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from ..user_column import AnyDataset


logger = logging.getLogger(__name__)

# Local JSON is read as text, one row a line, and parsed row by row. A broken line is then one broken row, not the end of
# the loading, and fields that are left out or change their type (Azure's TL;DR files) need no common schema.
JSON_LINE = "json_line"
JSON_LINE_FEATURES = Features({JSON_LINE: Value("string")})
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
NUM_PEEKED = 100  # rows that are looked at before reading
PARQUET_REVISION = "refs/convert/parquet"  # where the Hub keeps its own conversion of a set that has a loading script


def open_source(
    name_or_path: str | Path, *, config_name: str | None = None, revision: str | None = None
) -> dict[str, Dataset]:
    """
    The raw rows of a data set, per split of the source. A local file or folder is one split, `train`.

    Args:
        name_or_path (`str` or `Path`): A set on the Hub, a file (`.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, `.parquet`) or
            a folder with such files, all of one suffix. A path that exists wins over a name on the Hub. Values in CSV files
            are kept as text: user 007 is not user 7.
        config_name (`str`, *optional*): Name of the configuration of a set on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a set on the Hub.

    Raises:
        `FileNotFoundError`: if there is no such file, or no such set. `ValueError`: for a file type that is not known.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _open_files(path)
    if path.suffix in (*JSON_SUFFIXES, *TABLE_SUFFIXES) or str(name_or_path).startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file or folder {path}. Give a path that exists, or a name on the Hub.")
    return _open_hub(str(name_or_path), config_name, revision)


def _open_hub(name: str, config_name: str | None, revision: str | None) -> dict[str, Dataset]:
    try:
        return dict(datasets.load_dataset(name, config_name, revision=revision))
    except RuntimeError as error:
        # `datasets` 4 and later run no loading scripts; the Hub's conversion has one folder per configuration
        if "scripts are no longer supported" not in str(error) or revision is not None:
            raise
        logger.info("%s has a loading script; reading its conversion on the Hub, %s.", name, PARQUET_REVISION)
        return dict(datasets.load_dataset(name, data_dir=config_name, revision=PARQUET_REVISION))
    except (OSError, ValueError) as error:
        error.add_note(f"`{name}` was looked up on the Hugging Face Hub. A path to a local copy works too.")
        raise


def _open_files(path: Path) -> dict[str, Dataset]:
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    known = [file for file in files if file.suffix in (*JSON_SUFFIXES, *TABLE_SUFFIXES)]
    suffixes = {file.suffix for file in known}
    if len(suffixes) != 1:
        found = f"{sorted(suffixes)}" if suffixes else f"{sorted({file.suffix for file in files})}"
        raise ValueError(
            f"{path} must be a file of type {', '.join((*JSON_SUFFIXES, *TABLE_SUFFIXES))} or a folder with files of one such "
            f"type, found {found}. Name a single file."
        )
    rows = _open_json(known) if suffixes <= set(JSON_SUFFIXES) else load_files(known)
    return {"train": rows}


def load_files(files: list[Path], *, streaming: bool = False, empty_is_none: bool = False) -> AnyDataset:
    """
    The rows of files of one type, a key of `BUILDERS`, with the columns that `datasets` finds in them. Values in CSV files are
    kept as text: user 007 is not user 7, and user "NA" is a user.

    Args:
        files (`list[Path]`): The files; the suffix of the first is that of all.
        streaming (`bool`): Whether to return a stream, which reads the files while it is iterated.
        empty_is_none (`bool`): Whether an empty field of a CSV file is `None` and not an empty text.

    Returns:
        `Dataset`, or `IterableDataset` with `streaming`.

    Raises:
        `ValueError`: if a CSV file has no line with the names of its columns.
    """
    builder = BUILDERS[files[0].suffix]
    options = _csv_options(files[0], empty_is_none) if builder == "csv" else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(builder, data_files=names, split="train", streaming=streaming, **options)


def _csv_options(file: Path, empty_is_none: bool) -> dict[str, Any]:
    separator = "\t" if file.suffix == ".tsv" else ","
    with open(file, encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream, delimiter=separator), [])
    if not header:
        raise ValueError(f"{file} is empty; its first line must name the columns.")
    features = Features({column: Value("string") for column in header})
    empty = {"na_values": [""]} if empty_is_none else {}
    return {"sep": separator, "features": features, "keep_default_na": False, "encoding": "utf-8-sig", **empty}


def _open_json(files: list[Path]) -> Dataset:
    features = JSON_LINE_FEATURES
    if not _is_json_list(files[0]):
        names = [str(file) for file in files]
        return datasets.load_dataset("text", data_files=names, split="train", features=features, encoding="utf-8-sig")
    lines = [json.dumps(row) for file in files for row in read_json_list(file)]
    return Dataset.from_dict({JSON_LINE: lines}, features=features)


def _is_json_list(file: Path) -> bool:
    with open(file, encoding="utf-8-sig") as stream:
        return stream.read(256).lstrip().startswith("[")


def read_json_list(file: Path) -> list[Any]:
    """
    The rows of a file that is one JSON list.

    Raises:
        `ValueError`: if the file is damaged, or holds something else.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}). The file is cut off or damaged; copy it again.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a JSON list of rows, found {type(rows).__name__}.")
    return rows


def peek(source: Dataset) -> list[dict[str, Any]]:
    """
    The first rows of `source`, parsed, to see what it holds: JSON need not have every field in every row.

    Raises:
        `ValueError`: if none of them can be read.
    """
    rows = [row for row in map(parse_row, islice(source, NUM_PEEKED)) if row is not None]
    if not rows:
        raise ValueError(
            "The data set has no rows that can be read. Is the file empty, or neither JSON lines nor a list?"
        )
    return rows


def parse_row(raw: dict[str, Any]) -> dict[str, Any] | None:
    """A raw row as a mapping from column to value; `None` if its line is not a JSON object."""
    if JSON_LINE not in raw:
        return raw
    try:
        row = json.loads(raw[JSON_LINE])
    except (json.JSONDecodeError, TypeError):
        return None
    return row if isinstance(row, dict) else None


def check_columns(rows: list[dict[str, Any]], needed: set[str], name: str, hint: str) -> None:
    """
    Make sure that the first rows of a source have the columns a loader reads.

    Raises:
        `ValueError`: with the missing columns, the columns found, and `hint` on what to do.
    """
    found = {column for row in rows for column in row}
    if missing := sorted(needed - found):
        raise ValueError(f"{name} has no column {missing}; found {sorted(found)}. {hint}")

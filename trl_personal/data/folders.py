"""Which files of a folder are data, and which split each of them belongs to."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from .text_files import CSV_SUFFIXES, JSON_SUFFIXES, suffix_of


TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *TABLE_BUILDERS)
FAMILIES = {suffix: suffix for suffix in SUFFIXES} | dict.fromkeys(JSON_SUFFIXES, ".json") | {".tsv": ".csv"}
# what may lie beside data and is none
BESIDE = {
    *(
        "",
        ".md",
        ".txt",
        ".py",
        ".ipynb",
        ".yaml",
        ".yml",
        ".toml",
        ".cfg",
        ".sh",
        ".lock",
        ".cff",
        ".bib",
        ".license",
    ),
    *(".png", ".jpg", ".jpeg", ".svg", ".pdf", ".html"),
}
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
MAX_FILES = 100_000
# the words of `datasets`, between marks or digits
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def known_types() -> str:
    """The types of files that can be read, for messages."""
    return f"{', '.join(SUFFIXES)} (JSON and CSV also with .gz)"


def files_of_folder(folder: Path, config_name: str | None = None) -> dict[str, list[Path]]:
    """
    The data files in a folder and the folders in it, by split. All of them are read, or none.

    Files named after splits (`train.jsonl`, `test-00000-of-00002.parquet`, `valid/1.csv`) belong to these splits; if no name
    has a split in it, all files are `train`. A README that says which files belong to which configuration decides instead.

    Raises:
        `FileNotFoundError`: if there is no data file. `ValueError`: if there are several types of them, files that may be data
        and cannot be read, or files that name a split beside files that do not.
    """
    if _has_configurations(folder):
        return _files_of_configuration(folder, config_name)
    files = [path for path in sorted(_walk(folder)) if suffix_of(path) not in BESIDE and path.name not in METADATA]
    if not files:
        names = sorted(path.name for path in folder.iterdir())[:10]
        raise FileNotFoundError(f"{folder} holds no data file ({known_types()}); found {names}.")
    types = sorted({suffix_of(path) for path in files})
    if any(suffix not in FAMILIES for suffix in types) or len({FAMILIES[suffix] for suffix in types}) > 1:
        raise ValueError(
            f"{folder} must be a folder with files of one type out of {known_types()}, found {types[:8]}"
            f"{' and more' if len(types) > 8 else ''}. Name a single file."
        )
    return _by_split(folder, files)


def _walk(folder: Path) -> Iterator[Path]:
    number = 0
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        number += len(names) + len(folders)
        if number > MAX_FILES:
            raise ValueError(
                f"{folder} holds more than {MAX_FILES:,} files. Name the folder with the data, or a file."
            )
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str | None, list[Path]] = {}
    for path in files:
        splits.setdefault(split_in(str(path.relative_to(folder))), []).append(path)
    without = splits.pop(None, [])
    if not splits:
        return {"train": without}
    if without:
        raise ValueError(
            f"{folder} has files named after the splits {sorted(map(str, splits))}, and others that name no split, such as "
            f"{without[0].relative_to(folder)}. Name a single file, or move the others away."
        )
    return {str(split): paths for split, paths in sorted(splits.items(), key=lambda item: item[0] != "train")}


def split_in(name: str) -> str | None:
    """
    The split that the name of a file, or of a folder around it, says.

    ```python
    >>> split_in("train.jsonl"), split_in("dev/1.csv"), split_in("ood-00000-of-00001.parquet"), split_in("people.jsonl")
    ('train', 'validation', 'ood', None)
    ```
    """
    shard = SHARD.match(Path(name).name)
    if shard is not None:
        return shard[1]
    words = set(re.split(r"[/\\\-_. 0-9]+", name.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & set(known)), None)


def _has_configurations(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace")
    return head.startswith("---") and "\nconfigs:" in head.split("\n---", 1)[0]


def _files_of_configuration(folder: Path, config_name: str | None) -> dict[str, list[Path]]:
    builder = datasets.load_dataset_builder(str(folder), config_name)
    found = {
        str(split): [Path(str(file)) for file in files] for split, files in dict(builder.config.data_files).items()
    }
    types = {FAMILIES.get(suffix_of(path), suffix_of(path)) for paths in found.values() for path in paths}
    if len(types) != 1 or not types <= set(FAMILIES):
        raise ValueError(f"{folder} must have files of one type out of {known_types()}, found {sorted(types)}.")
    return found

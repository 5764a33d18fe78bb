"""The dataset of `trl-personal dpo`: as in `trl dpo`, and local files."""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset


logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
Splits: TypeAlias = Mapping[str, AnyDataset]

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load_preferences(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Splits:
    """
    The splits of the dataset: a mixture from the YAML file, or `--dataset_name`.

    `dataset_name` may be a file (one split, `train`), a folder of files, a folder that `save_to_disk` wrote, or a name on
    the hub.

    Raises:
        `FileNotFoundError`: if it names a file that is not there.
    """
    name = script_args.dataset_name or ""
    if dataset_args.datasets:
        if name:
            logger.warning("Both `datasets` and `dataset_name` are given; `dataset_name` (%s) is ignored.", name)
        return get_dataset(dataset_args)
    path = Path(name)
    if path.suffix in BUILDERS:
        return _load_file(path, script_args.dataset_streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {"train": saved}
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def select_split(dataset: Splits, split: str, purpose: str) -> AnyDataset:
    """
    The split to train on, or to evaluate on.

    Raises:
        `ValueError`: if there is no such split; the message names those found.
    """
    if split in dataset:
        return dataset[split]
    without = ", or leave `--eval_strategy` out to train without evaluation" if purpose == "test" else ""
    raise ValueError(
        f"The dataset has no split {split!r} to {'evaluate' if purpose == 'test' else 'train'} on; found {sorted(dataset)}. "
        f"Name one with `--dataset_{purpose}_split`{without}. (A folder with train.jsonl and test.jsonl has both splits.)"
    )


def _load_file(path: Path, streaming: bool) -> Splits:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a file or folder that exists, or a name on the hub.")
    options: dict[str, Any] = _csv_options(path) if BUILDERS[path.suffix] == "csv" else {}
    return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=streaming, **options)


def _csv_options(path: Path) -> dict[str, Any]:
    """All columns as text: user 007 is not user 7, and user "NA" is a user. An empty field is `None`."""
    separator = "\t" if path.suffix == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        columns = next(csv.reader(file, delimiter=separator), [])
    features = Features({column: Value("string") for column in columns})
    return {"sep": separator, "features": features, "keep_default_na": False, "na_values": [""]}

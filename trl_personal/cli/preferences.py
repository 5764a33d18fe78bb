"""The dataset of `trl-personal dpo`: as in `trl dpo`, and local files."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from datasets import DatasetDict, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..data.source import BUILDERS, load_files
from ..user_column import AnyDataset


logger = logging.getLogger(__name__)

Splits: TypeAlias = Mapping[str, AnyDataset]


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
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {path}. Give a file or folder that exists, or a name on the hub."
            )
        return {"train": load_files([path], streaming=script_args.dataset_streaming, empty_is_none=True)}
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

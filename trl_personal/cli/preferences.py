"""The dataset of a command, read as the loaders read it: one door for files, folders, the hub, mixtures and streams."""

import glob
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset, ReadInstruction, concatenate_datasets
from trl import DatasetMixtureConfig, ScriptArguments

from ..data.columns import Columns
from ..data.folders import TABLE_BUILDERS
from ..data.generic import Splits, read_splits
from ..data.pairs import OnReport
from ..data.source import Source, TableSource, check_source_name, open_files, open_source
from ..user_column import AnyDataset
from .arguments import ColumnArguments
from .words import in_flags


logger = logging.getLogger(__name__)

FILE_BUILDERS = {"json", "csv", *TABLE_BUILDERS.values()}
ALSO_READ = ("tools", "conflict")  # columns that TRL or the evaluation looks for by these names
# the arguments of the loaders, as they are called on the command line
FLAGS_OF_COLUMNS = {
    "user_id": "user_id_column",
    "user_profile": "user_profile_column",
    "prompt": "prompt_column",
    "chosen": "chosen_column",
    "rejected": "rejected_column",
    "responses": "response_columns",
    "choice": "choice_column",
    "choice_values": "choice_values",
    "ratings": "rating_columns",
    "ranking": "ranking_columns",
}


def load_preferences(
    script_args: ScriptArguments,
    dataset_args: DatasetMixtureConfig,
    columns: ColumnArguments | None = None,
    *,
    user_id_column: str = "user_id",
    user_profile_column: str | None = None,
    extra_columns: Iterable[str | None] = (),
    on_report: OnReport | None = None,
) -> Splits:
    """
    The splits of the dataset: a mixture from the YAML file, or `--dataset_name`. Rows are pairs under TRL's names; those that
    cannot be read, or cannot teach, are left out and told on the screen.

    Args:
        script_args (`ScriptArguments`): `dataset_name` may be a file (one split, `train`), a folder of files, a folder that
            `save_to_disk` wrote, or a name on the hub.
        dataset_args (`DatasetMixtureConfig`): The mixture, if there is one.
        columns ([`ColumnArguments`], *optional*): Which columns hold the pairs.
        user_id_column (`str`): The column of the user, which keeps its name.
        user_profile_column (`str`, *optional*): The column of the text about the user, which keeps its name.
        extra_columns (`Iterable[str | None]`): Other columns to keep.
        on_report (`Callable`, *optional*): Function that is called with each [`~data.LoadReport`].

    Raises:
        `FileNotFoundError`: if it names a file that is not there. `ValueError`: if the rows cannot be pairs.
    """
    if int(os.environ.get("RANK", 0)) > 0:  # one of several processes tells what was left out
        logging.getLogger("trl_personal.data").setLevel(logging.ERROR)
    wanted = tuple(column for column in extra_columns if column is not None)
    try:
        chosen = make_columns(columns or ColumnArguments(), user_id_column, user_profile_column, wanted)
    except ValueError as error:
        raise ValueError(in_flags(str(error), FLAGS_OF_COLUMNS)) from error
    ties = columns.ties if columns is not None else "skip"
    try:
        if dataset_args.datasets:
            if script_args.dataset_name:
                logger.warning(
                    "Both `datasets` and `dataset_name` are given; `dataset_name` (%s) is ignored.",
                    script_args.dataset_name,
                )
            return _mixture(dataset_args, chosen, ties)
        name, streaming = script_args.dataset_name or "", script_args.dataset_streaming
        sources = open_source(name, config_name=script_args.dataset_config, streaming=streaming)
        return read_splits(
            sources, chosen, name=name, ties=ties, streaming=streaming, also=ALSO_READ, on_report=on_report
        )
    except ValueError as error:
        raise ValueError(in_flags(str(error), FLAGS_OF_COLUMNS, alone=False)) from error


def make_columns(
    arguments: ColumnArguments, user_id_column: str, user_profile_column: str | None, extra: tuple[str, ...]
) -> Columns:
    """
    The columns that the arguments name.

    Raises:
        `ValueError`: for arguments that do not go together, or values that cannot be read.
    """
    return Columns(
        user_id=user_id_column,
        prompt=arguments.prompt_column,
        chosen=arguments.chosen_column,
        rejected=arguments.rejected_column,
        responses=_names(arguments.response_columns),
        choice=arguments.choice_column,
        choice_values=_choice_values(arguments.choice_values),
        ratings=_names(arguments.rating_columns),
        ranking=_names(arguments.ranking_columns),
        user_profile=user_profile_column,
        split=None,
        missing_user="generic",
        extra=extra,
    )


def _names(columns: list[str] | str | None) -> str | tuple[str, ...] | None:
    """Several columns, or the one that holds a list."""
    if columns is None or isinstance(columns, str):
        return columns
    return columns[0] if len(columns) == 1 else tuple(columns)


def _choice_values(texts: list[str] | Mapping[str, Any] | None) -> dict[str, int | None] | None:
    """
    `["A=0", "draw=tie"]`, or a mapping from a YAML file, as the loaders take it.

    Raises:
        `ValueError`: for anything else.
    """
    if texts is None:
        return None
    pairs = texts.items() if isinstance(texts, Mapping) else [str(text).rpartition("=")[::2] for text in texts]
    values: dict[str, int | None] = {}
    for value, meaning in pairs:
        text = str(meaning).lower()
        if not str(value) or not (text.isdecimal() or text in ("tie", "none")):
            raise ValueError(
                f"`choice_values` must be VALUE=N, where N is the number of the best answer from 0 or `tie`; found "
                f"{value}={meaning}."
            )
        values[str(value)] = int(text) if text.isdecimal() else None
    return values


# --- Mixtures -----------------------------------------------------------------------------------------------------------


def _mixture(config: DatasetMixtureConfig, columns: Columns, ties: str) -> Splits:
    """The datasets of a mixture, each read as `--dataset_name` is, put together as TRL does."""
    parts = [_part(dict(vars(part)), config.streaming, columns, ties) for part in config.datasets]
    parts = _in_shares(parts, [part.fraction for part in config.datasets])
    together: Any = concatenate_datasets(parts)
    if config.test_split_size is None:
        return {"train": together}
    if isinstance(together, IterableDataset):
        raise ValueError("`test_split_size` cannot split a stream. Leave out either it or `streaming`.")
    return together.train_test_split(test_size=config.test_split_size)


def _part(part: dict[str, Any], streaming: bool, columns: Columns, ties: str) -> AnyDataset:
    name, split = str(part["path"]), str(part["split"])
    sources = _sources_of_part(part, streaming)
    plain = split.split("[")[0]
    if plain not in sources:
        raise ValueError(f"{name} has no split {plain!r}; found {sorted(sources)}.")
    found = read_splits({plain: sources[plain]}, columns, name=name, ties=ties, streaming=streaming, also=ALSO_READ)[
        plain
    ]
    if plain != split:
        found = _slice(found, plain, split)
    if part["columns"] is None:
        return found
    kept = {"prompt", "chosen", "rejected", columns.user_id, columns.user_profile, *columns.extra, *part["columns"]}
    return found.remove_columns([column for column in found.column_names or [] if column not in kept])


def _sources_of_part(part: dict[str, Any], streaming: bool) -> Mapping[str, Source]:
    name, files = str(part["path"]), part["data_files"]
    folder = Path(part["data_dir"] or "") if name in FILE_BUILDERS else Path(name, part["data_dir"] or "")
    if name in FILE_BUILDERS or (files is not None and folder.is_dir()):
        named = files if isinstance(files, Mapping) else {"train": files if files is not None else "*"}
        if not any("://" in str(pattern) for pattern in named.values()):
            return open_files({split: _expanded(folder, patterns) for split, patterns in named.items()}, streaming)
    elif folder.exists() or part["data_dir"] is None and files is None:
        return open_source(folder if folder.exists() else name, config_name=part["name"], streaming=streaming)
    options = {key: part[key] for key in ("path", "name", "data_dir", "data_files")}
    table = datasets.load_dataset(**options, split=part["split"], streaming=streaming)
    return {part["split"].split("[")[0]: TableSource(table, name)}


def _expanded(folder: Path, patterns: str | list[str]) -> list[Path]:
    """
    The files that names or patterns stand for.

    Raises:
        `FileNotFoundError`: if one stands for none.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = folder / pattern
        files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise FileNotFoundError(f"There is no file {path}.")
        found += files
    return found


def _slice(found: AnyDataset, plain: str, split: str) -> AnyDataset:
    if not isinstance(found, Dataset):
        raise ValueError(f"A stream has no rows by number, so it cannot be cut: {split}.")
    (part,) = ReadInstruction.from_spec(split).to_absolute({plain: len(found)})
    return found.select(range(part.from_ or 0, len(found) if part.to is None else part.to))


def _in_shares(parts: list[AnyDataset], fractions: list[float | None]) -> list[AnyDataset]:
    """The first rows of each part, in the shares asked for and as many as no part is short of."""
    if all(fraction is None for fraction in fractions):
        return parts
    if any(fraction is None or fraction < 0 for fraction in fractions) or not sum(filter(None, fractions)):
        raise ValueError(
            "`fraction` must be set for all datasets of the mixture or for none, and must not be negative."
        )
    tables = [part for part in parts if isinstance(part, Dataset)]
    if len(tables) < len(parts):
        raise ValueError("`fraction` cannot be combined with streams.")
    weights = [(fraction or 0.0) / sum(filter(None, fractions)) for fraction in fractions]
    total = min(len(part) / weight for part, weight in zip(tables, weights, strict=True) if weight > 0)
    return [part.select(range(round(weight * total))) for part, weight in zip(tables, weights, strict=True)]


def check_dataset_name(name: str | None) -> None:
    """
    Make sure that a name is of something here or of a set on the hub, before anything is loaded.

    Raises:
        `FileNotFoundError`: if it is not.
    """
    if name is not None:
        check_source_name(name)


def select_split(dataset: Splits, split: str, purpose: str) -> AnyDataset:
    """
    The split to train on, or to evaluate on.

    Raises:
        `ValueError`: if there is no such split, or nothing is left of it; the message names those found.
    """
    without = ", or leave `--eval_strategy` out to train without evaluation" if purpose == "test" else ""
    if split not in dataset:
        verb = "evaluate" if purpose == "test" else "train"
        raise ValueError(
            f"The dataset has no split {split!r} to {verb} on; found {sorted(dataset)}. "
            f"Name one with `--dataset_{purpose}_split`{without}. (A folder with train.jsonl and test.jsonl has both splits.)"
        )
    found = dataset[split]
    if isinstance(found, Dataset) and not len(found):
        raise ValueError(f"No pair is left in the split {split!r}: what was left out, and why, is told above.")
    return found


def in_memory(split: AnyDataset) -> Dataset:
    """A split whose rows have numbers: a stream is read to its end."""
    return split if isinstance(split, Dataset) else Dataset.from_list(list(split))

"""The users of a dataset: found, checked and counted before training starts."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets.features.features import Value
from tqdm.auto import tqdm

from .users import UserVocab, as_user_id, describe_variants, find_variants


logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

TEXTS_OF_MISSING = {"nan", "NaN", "NAN", "<NA>", "NA", "N/A", "NaT", "None", "none", "null", "NULL"}


def check_user_column(dataset: AnyDataset, column: str, name: str) -> None:
    """
    Make sure that `dataset` can say who each row belongs to.

    Raises:
        `ValueError`: if it is empty, or has no column `column`. `TypeError`: if the column holds neither text nor
        numbers.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"The {name} dataset has no rows.")
    require_column(dataset, column, name, "Add one, or name yours with `PersonalizedDPOConfig(user_id_column=...)`.")
    _check_type(dataset.features, column, name)


def require_column(dataset: AnyDataset, column: str, name: str, advice: str) -> None:
    """
    Make sure that `dataset`, a stream too, has a column.

    Raises:
        `ValueError`: if not; the message has the columns found, and `advice`.
    """
    columns = dataset.column_names
    if columns is None:  # a stream that does not declare its columns
        columns = list(next(iter(dataset)))
    if column not in columns:
        raise ValueError(f"The {name} dataset has no `{column}` column; found {sorted(columns)}. {advice}")


def _check_type(features: Features | None, column: str, name: str) -> None:
    feature = (features or {}).get(column)
    if feature is None:
        return
    dtype = feature.dtype if isinstance(feature, Value) else None
    if hasattr(feature, "names"):  # ClassLabel: integers
        dtype = "int64"
    if dtype is None or not dtype.startswith(("string", "large_string", "int", "uint", "null", "float64")):
        raise TypeError(
            f"Column `{column}` of the {name} dataset must hold text or whole numbers (or None, for the generic user), found "
            f"{dtype or type(feature).__name__}. Turn it into text, e.g. with `dataset.cast_column({column!r}, "
            'Value("string"))`.'
        )


def with_user_names(dataset: AnyDataset, column: str) -> AnyDataset:
    """
    The dataset with the names of its users in place of numbers, if `column` is a `ClassLabel`, else the dataset itself.
    """
    label = _class_label(dataset, column)
    if label is None:
        return dataset
    if isinstance(dataset, Dataset):
        user_ids = list(iterate_user_ids(dataset, column, "given"))
        return dataset.remove_columns(column).add_column(column, user_ids, feature=Value("string"))
    features = Features({**(dataset.features or {}), column: Value("string")})
    return dataset.map(lambda row: {column: _name_of(row[column], label)}, features=features)


def _class_label(dataset: AnyDataset, column: str) -> ClassLabel | None:
    feature = (dataset.features or {}).get(column)
    return feature if isinstance(feature, ClassLabel) else None


def _name_of(value: object, label: ClassLabel | None) -> object:
    """`datasets` keeps the users of a `ClassLabel` as numbers, and a missing one as -1."""
    if label is None or not isinstance(value, int):
        return value
    return label.int2str(value) if value >= 0 else None


def warn_of_missing_users(user_ids: Sequence[str | None], name: str) -> None:
    """Count the rows without a user, and those whose user looks like a missing value that became text."""
    missing = sum(user_id is None for user_id in user_ids)
    if missing:
        logger.warning(
            "%d of %d rows of the %s dataset have no user (None, or a missing value of pandas): they train the generic user "
            "alone.",
            missing,
            len(user_ids),
            name,
        )
    looks_missing = sum(user_id in TEXTS_OF_MISSING for user_id in user_ids)
    if looks_missing:
        logger.warning(
            "%d of %d rows of the %s dataset have a user id such as 'nan' or 'None', which looks like a missing value that "
            "was turned into text: they count as one user. Use None for rows without a user.",
            looks_missing,
            len(user_ids),
            name,
        )


def warn_of_variants(user_ids: Iterable[str], name: str) -> None:
    """Say that ids differ only in white space, case or the way they are written; they are not put together."""
    groups = find_variants(user_ids)
    if groups:
        logger.warning(
            "Users of the %s dataset: %s. `trl-personal audit --list_users` lists them.",
            name,
            describe_variants(groups),
        )


def iterate_user_ids(dataset: AnyDataset, column: str, name: str) -> Iterator[str | None]:
    """
    The user of each row, as text. Streams are read once, with a progress bar.

    Raises:
        `TypeError` or `ValueError`: for an id that is neither text nor integer, or is empty; the message has the row's number.
    """
    if isinstance(dataset, Dataset):
        rows: Iterable[Mapping[str, object]] = dataset.select_columns([column]).with_format(None)
    else:
        rows = tqdm(dataset, desc=f"Collecting the users of the {name} dataset", unit=" rows")
    label = _class_label(dataset, column)
    for number, row in enumerate(rows):
        try:
            yield as_user_id(_name_of(row.get(column), label))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Row {number} of the {name} dataset, column `{column}`: {error}") from error


def collect_users(dataset: AnyDataset, column: str, name: str = "train") -> UserVocab:
    """
    The users of `dataset`, in order of first appearance: the same on every process that sees the same dataset.

    Raises:
        `ValueError`: if no row has a user; or as [`iterate_user_ids`].
    """
    found = list(iterate_user_ids(dataset, column, name))
    if not found:
        raise ValueError(f"The {name} dataset has no row that can teach.")
    user_ids = dict.fromkeys(found)
    user_ids.pop(None, None)
    if not user_ids:
        raise ValueError(
            f"Column `{column}` of the {name} dataset is `None` in every row, so there is no user to learn. For vanilla DPO, "
            'set `user_model_kind="none"`.'
        )
    warn_of_missing_users(found, name)
    return UserVocab(user_id for user_id in user_ids if user_id is not None)

"""The users of a dataset: found, checked and counted before training starts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from datasets import Dataset, Features, IterableDataset
from datasets.features.features import Value
from tqdm.auto import tqdm

from .users import UserVocab, as_user_id


AnyDataset: TypeAlias = Dataset | IterableDataset


def check_user_column(dataset: AnyDataset, column: str, name: str) -> None:
    """
    Make sure that `dataset` can say who each row belongs to.

    Raises:
        `ValueError`: if it is empty, or has no column `column`. `TypeError`: if the column holds neither text nor
        integers.
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
    if dtype is None or not dtype.startswith(("string", "large_string", "int", "uint", "null")):
        raise TypeError(
            f"Column `{column}` of the {name} dataset must hold text or integers (or None, for the generic user), found "
            f"{dtype or type(feature).__name__}. Turn it into text, e.g. with `dataset.cast_column({column!r}, "
            'Value("string"))`.'
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
    for number, row in enumerate(rows):
        try:
            yield as_user_id(row.get(column))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Row {number} of the {name} dataset, column `{column}`: {error}") from error


def collect_users(dataset: AnyDataset, column: str, name: str = "train") -> UserVocab:
    """
    The users of `dataset`, in order of first appearance: the same on every process that sees the same dataset.

    Raises:
        `ValueError`: if no row has a user; or as [`iterate_user_ids`].
    """
    user_ids = dict.fromkeys(iterate_user_ids(dataset, column, name))
    user_ids.pop(None, None)
    if not user_ids:
        raise ValueError(
            f"Column `{column}` of the {name} dataset is `None` in every row, so there is no user to learn. For vanilla DPO, "
            'set `user_model_kind="none"`.'
        )
    return UserVocab(user_id for user_id in user_ids if user_id is not None)

"""The pairs of a dataset that can teach: the others are counted, told and left out, as the loaders do."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ..preference_rows import why_it_cannot_teach


logger = logging.getLogger(__name__)

PAIR = ("chosen", "rejected")
IMAGES = ("images", "image")


class TeachingRows:
    """
    Leaves out the rows of a dataset that cannot teach: two equal answers, a blank answer or prompt.

    Args:
        name (`str`): Name of the dataset, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_seen = 0
        self.reasons: Counter[str] = Counter()

    def of(self, dataset: Any) -> Any:
        """
        `dataset` without these rows, which are told; a stream leaves them out, and counts them, as it is read.

        Raises:
            `ValueError`: if no row is left.
        """
        if isinstance(dataset, IterableDataset):
            return dataset.filter(self)
        if not isinstance(dataset, Dataset) or not set(PAIR) <= set(dataset.column_names):
            return dataset
        columns = [column for column in ("prompt", *PAIR) if column in dataset.column_names]
        has_images = any(column in dataset.column_names for column in IMAGES)
        rows = dataset.select_columns(columns).with_format(None)
        kept = [number for number, row in enumerate(rows) if self._teaches(row, has_images)]
        self.tell()
        return dataset if len(kept) == len(dataset) else dataset.select(kept)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a stream can teach."""
        return not set(PAIR) <= row.keys() or self._teaches(row, any(row.get(column) for column in IMAGES))

    def _teaches(self, row: Mapping[str, Any], has_images: bool) -> bool:
        self.num_seen += 1
        reason = why_it_cannot_teach(row, "prompt" if "prompt" in row else None, has_images=has_images)
        if reason is not None:
            self.reasons[reason] += 1
        return reason is None

    def tell(self) -> None:
        """
        Say how many rows were left out, and why.

        Raises:
            `ValueError`: if no row is left.
        """
        if not self.reasons:
            return
        number = self.reasons.total()
        why = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.reasons.items()))
        if number == self.num_seen:
            raise ValueError(f"No row of the {self.name} dataset can teach: {why}.")
        logger.warning(
            "%d of %d rows of the %s dataset cannot teach and are left out: %s.", number, self.num_seen, self.name, why
        )


def rows_that_teach(datasets: Any, name: str = "eval") -> Any:
    """One dataset or several, without the rows that cannot teach; streams stay as they are, as nothing reads them now."""
    if isinstance(datasets, dict):
        return type(datasets)({key: rows_that_teach(dataset, key) for key, dataset in datasets.items()})
    return datasets if isinstance(datasets, IterableDataset) else TeachingRows(name).of(datasets)

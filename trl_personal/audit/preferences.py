"""Preference data as arrays: who judged what, about which prompt, in which split."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..agreement import compare, encode
from ..arrays import BoolArray, IntArray
from ..user_column import AnyDataset, check_user_column, iterate_user_ids
from ..users import as_user_id


NO_USER = -1  # stands for the generic user, who owns the pairs without a user id
COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class PreferenceTable:
    """
    `n` pairs, in the order of the splits.

    Args:
        user_ids (`list[str]`): Ids of the users, in order of first appearance.
        users (`IntArray`): Place of each pair's user in `user_ids`, or `NO_USER`. Shape: `(n,)`.
        prompts (`IntArray`): Number of each pair's prompt. Prompts that differ in case and white space only have the same
            number. Shape: `(n,)`.
        comparisons (`IntArray`): Number of each pair's prompt with its two answers, whichever was chosen. Shape: `(n,)`.
        directions (`BoolArray`): Whether the chosen answer comes first in the order of text. Shape: `(n,)`.
        splits (`IntArray`): Place of each pair's split in `split_names`. Shape: `(n,)`.
        split_names (`list[str]`): Names of the splits.
        prompt_texts, chosen_texts, rejected_texts (`list[str]`): The texts of each pair. The messages of a conversation are
            joined by newlines.
        num_identical (`int`): Number of rows whose two answers are the same. Nothing else here counts them.
        num_blank (`int`): Number of other rows with a blank prompt or answer. Nothing else here counts them either.
    """

    user_ids: list[str]
    users: IntArray
    prompts: IntArray
    comparisons: IntArray
    directions: BoolArray
    splits: IntArray
    split_names: list[str]
    prompt_texts: list[str]
    chosen_texts: list[str]
    rejected_texts: list[str]
    num_identical: int
    num_blank: int

    def __len__(self) -> int:
        return len(self.users)


def read_preferences(
    dataset: AnyDataset | Mapping[str, AnyDataset], user_id_column: str, split_column: str | None
) -> PreferenceTable:
    """
    The pairs of a dataset or of its splits.

    Args:
        dataset (`Dataset`, `IterableDataset` or a mapping of them): Rows with `chosen`, `rejected`, the user, and `prompt`
            unless both answers start with it. Prompts and answers are text or messages.
        user_id_column (`str`): Name of the column with the user of each row; `None` in it is the generic user.
        split_column (`str`, *optional*): Name of the column with the split of each row. By default the mapping says which
            split a row is in.

    Raises:
        `ValueError`: if a column is missing or there are no pairs. `TypeError`: for values that are neither text nor messages.
    """
    splits = {"train": dataset} if isinstance(dataset, (Dataset, IterableDataset)) else dict(dataset)
    if not splits:
        raise ValueError("There is no split to audit: the mapping is empty.")
    users: list[str | None] = []
    texts: list[tuple[str, str, str]] = []
    split_of: list[str] = []
    for name, split in splits.items():
        check_user_column(split, user_id_column, name)
        users += _user_ids(split, user_id_column, name)
        columns = _columns(split, name, split_column)
        split_of += [name] * len(columns["chosen"]) if split_column is None else map(str, columns[split_column])
        texts += [_texts_of(row, name, number) for number, row in enumerate(_rows(columns))]
    differ = [row for row, (_, chosen, rejected) in enumerate(texts) if chosen != rejected]
    kept = [row for row in differ if all(text.strip() for text in texts[row])]
    if not kept:
        raise ValueError(
            f"There are no pairs to audit: {len(texts)} rows were read, and none has a prompt and two answers that differ."
        )
    return _table(
        [users[row] for row in kept],
        [texts[row] for row in kept],
        [split_of[row] for row in kept],
        num_identical=len(texts) - len(differ),
        num_blank=len(differ) - len(kept),
    )


def _user_ids(split: AnyDataset, column: str, name: str) -> list[str | None]:
    if not isinstance(split, Dataset):
        return list(iterate_user_ids(split, column, name))
    values = split.with_format(None)[column][:]
    try:
        known = {value: as_user_id(value) for value in set(values)}
    except (TypeError, ValueError):
        return list(iterate_user_ids(split, column, name))  # says which row is wrong
    return [known[value] for value in values]


def _table(
    users: Sequence[str | None],
    texts: Sequence[tuple[str, str, str]],
    split_of: Sequence[str],
    num_identical: int,
    num_blank: int,
) -> PreferenceTable:
    known, user_ids = encode([user for user in users if user is not None])
    codes = np.full(len(users), NO_USER, dtype=np.intp)
    codes[[user is not None for user in users]] = known
    prompts, chosen, rejected = (list(column) for column in zip(*texts, strict=True))
    same_prompt = {prompt: " ".join(prompt.split()).casefold() for prompt in prompts}
    keys = [same_prompt[prompt] for prompt in prompts]
    comparisons, directions = compare(keys, chosen, rejected)
    splits, split_names = encode(split_of)
    return PreferenceTable(
        user_ids=user_ids,
        users=codes,
        prompts=encode(keys)[0],
        comparisons=comparisons,
        directions=directions,
        splits=splits,
        split_names=split_names,
        prompt_texts=prompts,
        chosen_texts=chosen,
        rejected_texts=rejected,
        num_identical=num_identical,
        num_blank=num_blank,
    )


def _columns(split: AnyDataset, name: str, split_column: str | None) -> dict[str, list[Any]]:
    found = split.column_names if split.column_names is not None else list(next(iter(split)))
    needed = ["chosen", "rejected", *([split_column] if split_column is not None else [])]
    if missing := sorted(set(needed) - set(found)):
        raise ValueError(
            f"The {name} dataset has no column {missing}; found {sorted(found)}. Rename yours, or read the data with "
            "`trl_personal.data.load_generic`, which makes pairs from ratings and choices too."
        )
    wanted = [column for column in dict.fromkeys([*COLUMNS, *needed]) if column in found]
    if isinstance(split, Dataset):
        return split.select_columns(wanted).with_format(None)[:]
    rows = list(split)
    return {column: [row.get(column) for row in rows] for column in wanted}


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[tuple[Any, Any, Any]]:
    if "prompt" in columns:
        return [tuple("" if value is None else value for value in row) for row in _in_rows(columns)]  # type: ignore[misc]
    prompts = [None] * len(columns["chosen"])
    return list(zip(prompts, columns["chosen"], columns["rejected"], strict=True))


def _in_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, Any, Any]]:
    return zip(columns["prompt"], columns["chosen"], columns["rejected"], strict=True)


def _texts_of(row: tuple[Any, Any, Any], name: str, number: int) -> tuple[str, str, str]:
    prompt, chosen, rejected = row
    if prompt is None:
        prompt, chosen, rejected = split_off_prompt(chosen, rejected)
    if type(prompt) is type(chosen) is type(rejected) is str:
        return prompt, chosen, rejected
    try:
        return _as_text(prompt), _as_text(chosen), _as_text(rejected)
    except TypeError as error:
        raise TypeError(f"Row {number} of the {name} dataset: {error}") from error


def split_off_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """
    What two whole conversations share at the start, and the two ends.

    ```python
    >>> split_off_prompt("Why? Because.", "Why? No idea.")
    ('Why? ', 'Because.', 'No idea.')
    ```
    """
    if not isinstance(chosen, (str, list)) or type(chosen) is not type(rejected):
        return "", chosen, rejected
    if isinstance(chosen, str):
        length = len(os.path.commonprefix((chosen, str(rejected))))
    else:
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        length = same.index(False) if False in same else len(same)
    return chosen[:length], chosen[length:], rejected[length:]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("content"), str) for item in value
    ):
        return "\n".join(item["content"] for item in value)
    raise TypeError(f"prompt and answers must be text or lists of messages, found {type(value).__name__}.")

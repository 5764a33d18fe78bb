"""The users of a model: a text id for each row of the user table."""

import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from operator import index
from pathlib import Path
from typing import Any

from .files import read_json, write_atomically


GENERIC_USER_INDEX = 0  # row 0 of every user table: the generic user, whom unknown users share
USERS_FILE = "users.json"
JOINED_FILE = "joined_users.json"  # beside it, if users came after the shared training

UserId = str | int | None

LARGEST_EXACT = 2**53  # beyond it, neighbouring integers become the same float
WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")  # as pandas writes an integer where a column has a gap
ROUNDED_NUMBER = re.compile(r"-?\d(?:\.\d+)?e\+\d+", re.IGNORECASE)  # as pandas writes a float above 1e16


def as_user_id(value: object) -> str | None:
    """
    A raw user id as the text it is stored under; `None` stays `None` (the generic user). A float that is a whole number is
    that number, and NaN is `None`: pandas turns a column of integers into floats where one of them is missing.

    Raises:
        `TypeError`: for anything but `str`, `int`, `None` and whole numbers. `ValueError`: for an empty text.

    ```python
    >>> as_user_id(7), as_user_id("alice"), as_user_id(None), as_user_id(7.0)
    ('7', 'alice', None, '7')
    ```
    """
    if value is None:
        return None
    # `bool` is an `int` for Python, but never a person; integers of numpy and torch are no `int`, but can be an index
    if isinstance(value, str):
        if not value:
            raise ValueError("A user id is an empty text. Give the user an id, or use `None` for the generic user.")
        return str(value)
    if isinstance(value, float):
        return None if math.isnan(value) else _whole(value)
    if not _is_integer(value):
        raise TypeError(
            f"A user id must be a text or an integer (or `None` for the generic user), found "
            f"{type(value).__name__}. Turn the column into text, e.g. with `dataset.cast_column`."
        )
    return str(index(value))  # type: ignore[arg-type]


def _whole(value: float) -> str:
    if not value.is_integer():
        raise TypeError(f"A user id must be a text or a whole number (or `None` for the generic user), found {value}.")
    if abs(value) > LARGEST_EXACT:
        raise TypeError(
            f"A user id is the float {value:g}, which several integers are rounded to. Keep the column as integers or text."
        )
    return str(int(value))


def whole_number(text: str) -> str:
    """
    A whole number in a file without types as it would be written without a gap in its column; other text stays as it is.

    Raises:
        `ValueError`: for a number so large that it was rounded.

    ```python
    >>> whole_number("12.0"), whole_number("-3.0"), whole_number("007"), whole_number("1.5")
    ('12', '-3', '007', '1.5')
    ```
    """
    found = WHOLE_NUMBER.fullmatch(text)
    if ROUNDED_NUMBER.fullmatch(text) or (found and abs(int(found[1])) > LARGEST_EXACT):
        raise ValueError(f"{text} is a number that was rounded when it was written.")
    return found[1] if found else text


def find_variants(user_ids: Iterable[str]) -> list[list[str]]:
    """
    Ids that differ only in white space, letter case, Unicode normalization or characters that do not show, and numbers
    written as `12` and `12.0`: each list is perhaps one person.

    ```python
    >>> find_variants(["ann", "bo", "Ann ", "12", "bob", "12.0"])
    [['ann', 'Ann '], ['12', '12.0']]
    ```
    """
    alike: dict[str, dict[str, None]] = defaultdict(dict)
    for user_id in user_ids:
        alike[_plain(user_id)][user_id] = None
    return [list(group) for group in alike.values() if len(group) > 1]


def _plain(user_id: str) -> str:
    text = user_id
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    text = " ".join(text.casefold().split())
    found = WHOLE_NUMBER.fullmatch(text)
    return found[1] if found else text


def describe_variants(groups: Sequence[Sequence[str]]) -> str:
    """
    What to say of the groups of [`find_variants`], without the ids.

    ```python
    >>> describe_variants([["ann", "Ann "], ["12", "12.0"]])
    '4 user ids are 2 but for white space, letter case or the way they are written; each counts as a user of its own'
    ```
    """
    number = sum(map(len, groups))
    return (
        f"{number} user ids are {len(groups)} but for white space, letter case or the way they are written; each counts as a "
        "user of its own"
    )


def _is_integer(value: object) -> bool:
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def check_user_ids(user_ids: object, name: str) -> None:
    """
    Make sure that `user_ids` lists users, one after the other, in an order of its own.

    Raises:
        `TypeError`: for a single text, bytes, a mapping, or a set, whose order is another one in each process.

    ```python
    >>> check_user_ids(["alice", "bob"], "user_vocab")
    >>> check_user_ids("alice", "user_vocab")
    Traceback (most recent call last):
    TypeError: `user_vocab` must be a list of user ids, found str. Write a single user as a list: `["..."]`.
    ```
    """
    if isinstance(user_ids, (str, bytes)):
        raise TypeError(
            f"`{name}` must be a list of user ids, found {type(user_ids).__name__}. Write a single user as a list: "
            '`["..."]`.'
        )
    if isinstance(user_ids, (Mapping, Set)):
        raise TypeError(
            f"`{name}` must be a list of user ids, found {type(user_ids).__name__}: the order decides which row is whose. "
            "Give a list."
        )
    if not isinstance(user_ids, Iterable):
        raise TypeError(f"`{name}` must be a list of user ids, found {type(user_ids).__name__}.")


class UserVocab:
    """
    The known users, in the order of their rows. Row `GENERIC_USER_INDEX` (0) is the generic user, who has no id.

    Ids may be texts or integers and are kept as text. Once made, a vocabulary does not change: [`UserVocab.extend`]
    returns a larger one in which every known user keeps the row.

    Args:
        user_ids (`Iterable[str | int]`): Ids of the known users. The first one gets row 1.

    Raises:
        `ValueError`: for an empty id, a missing id or the same id twice (7 and "7" are the same).

    ```python
    >>> vocab = UserVocab(["alice", "bob", 7])
    >>> len(vocab), vocab.encode(["bob", "7", "nobody", None])
    (3, [2, 3, 0, 0])
    >>> vocab.decode([1, 0])
    ['alice', None]
    ```
    """

    def __init__(self, user_ids: Iterable[str | int] = ()) -> None:
        check_user_ids(user_ids, "user_ids")
        counts = Counter(map(as_user_id, user_ids))
        if None in counts:
            raise ValueError("A user vocabulary holds known users only, found `None`. Leave the generic user out.")
        if counts.total() > len(counts):
            twice = next(user_id for user_id, count in counts.items() if count > 1)
            raise ValueError(f"User id {twice!r} occurs twice in the vocabulary. Each user has one row.")
        self._user_ids = [user_id for user_id in counts if user_id is not None]
        self._index = {user_id: row for row, user_id in enumerate(self._user_ids, start=GENERIC_USER_INDEX + 1)}

    def __len__(self) -> int:
        """Number of known users; the generic user is not counted."""
        return len(self._user_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._user_ids)

    def __contains__(self, user_id: object) -> bool:
        try:
            return as_user_id(user_id) in self._index
        except (TypeError, ValueError):
            return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserVocab) and self._user_ids == other._user_ids

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UserVocab(num_users={len(self)})"  # ids are people: they do not belong in a log line

    def encode(self, user_ids: Sequence[UserId]) -> list[int]:
        """
        Rows of `user_ids`; an unknown user and `None` get `GENERIC_USER_INDEX`.

        Raises:
            `TypeError`: if `user_ids` is no list, or an id is neither text nor an integer. `ValueError`: for an empty id.
        """
        check_user_ids(user_ids, "user_ids")
        ids = [as_user_id(user_id) for user_id in user_ids]
        return [self._index.get(user_id, GENERIC_USER_INDEX) if user_id else GENERIC_USER_INDEX for user_id in ids]

    def decode(self, user_indices: Iterable[int]) -> list[str | None]:
        """
        Ids of the rows `user_indices`; `None` for the generic user.

        Raises:
            `IndexError`: for a row that there is not.
        """
        user_indices = [index(row) for row in user_indices]
        for row in user_indices:
            if not 0 <= row <= len(self):
                raise IndexError(
                    f"There is no row {row} in a vocabulary of {len(self)} users: rows are 0 to {len(self)}."
                )
        return [None if row == GENERIC_USER_INDEX else self._user_ids[row - 1] for row in user_indices]

    def extend(self, user_ids: Iterable[str | int]) -> "UserVocab":
        """A vocabulary with the new ones among `user_ids` appended; known users keep their rows."""
        check_user_ids(user_ids, "user_ids")
        new = dict.fromkeys(as_user_id(user_id) for user_id in user_ids)
        return UserVocab([*self._user_ids, *(user_id for user_id in new if user_id and user_id not in self._index)])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `users.json`, a JSON object from user id to row (like a tokenizer's `vocab.json`)."""
        # one user a line, by separators: with `indent`, Python's json leaves its fast path (a million users: seconds)
        text = json.dumps(self._index, ensure_ascii=False, separators=(",\n", ": "))
        write_atomically(Path(directory) / USERS_FILE, f"{{\n{text[1:-1]}\n}}".encode())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "UserVocab":
        """
        Read `users.json`.

        Raises:
            `FileNotFoundError`: if there is none. `ValueError`: if its rows are not 1, 2, ... in some order, or if an id is
            empty or occurs twice.
        """
        path = Path(directory) / USERS_FILE
        rows = read_json(path)
        numbers = list(rows.values())
        if not all(type(row) is int for row in numbers) or sorted(numbers) != list(range(1, len(rows) + 1)):
            raise ValueError(f"{path} is not a user vocabulary: its rows must be 1 to {len(rows)}, each once.")
        by_row: list[Any] = sorted(rows, key=rows.__getitem__)
        try:
            return cls(by_row)
        except ValueError as error:
            raise ValueError(f"{path} is not a user vocabulary. {error}") from error

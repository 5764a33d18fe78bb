"""How the ids of users can be written in a file, and where they stand in what a file says."""

import html
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote


LONG = 8  # characters from which an id is looked for anywhere; a shorter one is a word that may mean something else
REMOVED_TEXT = "[removed]"
USER_COLUMNS = ("user_id", "user", "user_ids", "users")
USER_MAPS = ("answers", "users", "user_profiles", "preferences")  # objects whose names are ids of users
NOTHING: Final = object()  # what is left of a record of a removed user


@dataclass(frozen=True)
class Traces:
    """
    What to look for.

    Args:
        ids (`Collection[str]`): The ids of the users who are removed.
        known (`Collection[str]`): The ids of all users of the model: an object or list that names one of them names users.
        user_columns (`Collection[str]`): Names of columns with the id of a user.
        words (`Collection[str]`): Names that stand in files of any model. An id that is a part of one is not looked for
            anywhere, as a short one is not.

    ```python
    >>> traces = Traces(["ann", "0123456789abcdef"], ["ann", "bo", "0123456789abcdef"])
    >>> traces.in_bytes(b"of 0123456789abcdef"), traces.in_bytes(b"of ann")
    (True, False)
    >>> traces.without([{"user_id": "ann", "gain": 1}, {"user_id": "bo", "note": "not 0123456789abcdef"}])
    [{'user_id': 'bo', 'note': 'not [removed]'}]
    >>> traces.without({"answers": {"ann": "x", "bo": "y"}, "kind": "ann"})
    {'answers': {'bo': 'y'}, 'kind': 'ann'}
    ```
    """

    ids: Collection[str]
    known: Collection[str]
    user_columns: Collection[str] = USER_COLUMNS
    words: Collection[str] = ()
    forms: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", frozenset(self.ids))
        object.__setattr__(self, "known", frozenset(self.known) - frozenset(self.ids))
        forms = {form for user_id in self.long for form in forms_of(user_id)}
        object.__setattr__(self, "forms", tuple(sorted(forms)))

    @property
    def long(self) -> list[str]:
        """Ids that are looked for anywhere, longest first: one may be a part of another."""
        return sorted(filter(self.is_long, self.ids), key=lambda user_id: (-len(user_id), user_id))

    def is_long(self, user_id: str) -> bool:
        """Whether an id can be told from other words wherever it stands."""
        return len(user_id) >= LONG and not any(user_id in word for word in self.words)

    def in_bytes(self, data: Any) -> bool:
        """Whether a long id stands in `data` (`bytes` or `mmap`), in any of its [`forms_of`]."""
        return any(data.find(form) >= 0 for form in self.forms)

    def in_text(self, text: str) -> bool:
        """Whether a long id is a part of a text."""
        return self.in_bytes(text.encode("utf-8", "surrogatepass"))

    def words_in(self, text: str) -> int:
        """How often a short id stands in a text as a word of its own, which may mean something else."""
        words = [re.escape(user_id) for user_id in self.ids if not self.is_long(user_id)]
        return len(re.findall(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", text)) if words else 0

    def without_text(self, text: str) -> str:
        """A text with [`REMOVED_TEXT`] in the place of each long id, and without a user's line in a list of ids."""
        lines = text.splitlines(keepends=True)
        if any(line.strip() in self.known for line in lines):
            text = "".join(line for line in lines if line.strip() not in self.ids)
        for user_id in self.long:
            for form in sorted(
                {form.decode("utf-8", "replace") for form in text_forms_of(user_id)}, key=len, reverse=True
            ):
                text = text.replace(form, REMOVED_TEXT)
        return text

    def without(self, value: Any) -> Any:
        """
        What is read from JSON or a table, without the removed users: their records, their entries in lists and objects of
        users, and their ids in longer texts. [`NOTHING`] if it is itself a user's record.
        """
        if isinstance(value, Mapping):
            return self._without_record(value)
        if isinstance(value, list):
            return self._without_entries(value)
        if isinstance(value, str):
            if value in self.ids and self.is_long(value):
                return None
            return self.without_text(value) if self.in_text(value) else value
        return value

    def is_user(self, value: Any) -> bool:
        """Whether a value in a column of users is one of those who are removed."""
        is_id = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        if isinstance(value, float):
            value = int(value) if value.is_integer() else value
        return is_id and str(value) in self.ids

    def _without_record(self, record: Mapping[str, Any]) -> Any:
        if any(self.is_user(record[name]) for name in self.user_columns if name in record):
            return NOTHING
        for name in self.user_columns:  # a table by columns
            column = record.get(name)
            if isinstance(column, list) and any(map(self.is_user, column)):
                kept = [row for row, entry in enumerate(column) if not self.is_user(entry)]
                record = {
                    other: [values[row] for row in kept] if _is_column(values, len(column)) else values
                    for other, values in record.items()
                }
        left: dict[str, Any] = {}
        names_users = any(name in self.known for name in record)
        for name, value in record.items():
            if (name in self.ids and (names_users or self.is_long(name))) or self.in_text(str(name)):
                continue
            if name in USER_MAPS and isinstance(value, Mapping):
                value = {other: entry for other, entry in value.items() if other not in self.ids}
            found = self.without(value)
            left[name] = None if found is NOTHING else found
        return left

    def _without_entries(self, entries: list[Any]) -> list[Any]:
        names_users = any(isinstance(entry, str) and entry in self.known for entry in entries)
        left = []
        for entry in entries:
            if isinstance(entry, str) and entry in self.ids and (names_users or self.is_long(entry)):
                continue
            found = self.without(entry)
            if found is not NOTHING:
                left.append(found)
        return left


def text_forms_of(user_id: str) -> set[bytes]:
    """An id as it may stand in UTF-8 text: plain, in JSON, in HTML, in an address, in Python."""
    texts = {
        *(user_id, json.dumps(user_id)[1:-1], json.dumps(user_id, ensure_ascii=False)[1:-1]),
        json.dumps(user_id)[1:-1].replace("/", "\\/"),  # as pandas does
        *(html.escape(user_id), quote(user_id), quote(user_id, safe=""), repr(user_id)[1:-1]),
    }
    return {text.encode("utf-8", "surrogatepass") for text in texts}


def forms_of(user_id: str) -> set[bytes]:
    """An id as it may stand in a file: as text in UTF-8, or in UTF-16 and UTF-32, as Windows and numpy write it."""
    wide = {
        user_id.encode(encoding, "surrogatepass") for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    }
    return text_forms_of(user_id) | wide


def masked(path: str, ids: Iterable[str]) -> str:
    """
    A path without ids of users, for a certificate.

    ```python
    >>> masked("model/answers/ann.json", ["ann"])
    'model/answers/[removed].json'
    ```
    """
    for user_id in sorted(ids, key=len, reverse=True):
        for form in {user_id, quote(user_id, safe="")}:
            edge = r"(?![^\W_])" if len(form) < LONG else ""
            start = r"(?<![^\W_])" if len(form) < LONG else ""
            path = re.sub(start + re.escape(form) + edge, REMOVED_TEXT, path)
    return path


def _is_column(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length

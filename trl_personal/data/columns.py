"""Which column of a preference set holds what, and the pairs that one row gives."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeAlias

from ..preference_rows import NO_SHARED_START, SAME_ANSWERS, shared_start
from ..users import whole_number
from .messages import Message, assistant_message, is_messages, messages_of, user_message
from .pairs import GROUP, SPLIT
from .rows import Row, SkippedRow, text_of, user_id_of
from .source import check_columns, columns_of, nearest
from .splits import TEST, TRAIN


Names: TypeAlias = str | tuple[str, ...] | None  # one column, several, or none
Completion: TypeAlias = str | list[Message]
TEST_WORDS = ("test", "valid", "dev", "eval")  # a value of the split column that starts so means `test`
# what others call a column, for "did you mean"
OTHER_NAMES = {
    "user_id": (
        "user",
        "userid",
        "worker",
        "worker_id",
        "annotator",
        "annotator_id",
        "rater",
        "judge",
    ),
    "prompt": ("question", "instruction", "query", "input", "context", "post", "request", "prompts", "messages"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "better", "good", "winner", "accepted", "positive"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "worse", "bad", "loser", "negative"),
}


@dataclass(frozen=True)
class Columns:
    """Which column holds what; see [`load_generic`]."""

    user_id: str
    prompt: str | None
    chosen: str
    rejected: str
    responses: Names
    choice: str | None
    choice_values: Mapping[Any, int | None] | None
    ratings: Names
    ranking: Names
    user_profile: str | None
    split: str | None
    missing_user: str = "skip"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"choice": self.choice, "ratings": self.ratings, "ranking": self.ranking}
        given = [name for name, column in kinds.items() if column is not None]
        if self.responses is None and given:
            raise ValueError(f"`{given[0]}` needs `responses`: the columns that hold the answers it is about.")
        if self.responses is not None and len(given) != 1:
            raise ValueError(
                f"`responses` needs exactly one of `choice`, `ratings` and `ranking`, found {given or 'none'}. For pairs that "
                "are in order already, name `chosen` and `rejected` instead."
            )
        if self.choice_values is not None and self.choice is None:
            raise ValueError("`choice_values` says what the values of `choice` mean; name that column too.")
        if any(best is not None and best < 0 for best in (self.choice_values or {}).values()):
            raise ValueError(f"`choice_values` must lead to numbers from 0 or `None`, found {self.choice_values}.")

    def by_argument(self) -> dict[str, tuple[str, ...]]:
        """The columns that must be there, by the argument that names them."""
        names = ["user_id", "prompt", "user_profile", "split", "choice", "ratings", "ranking"]
        names += ["responses"] if self.responses is not None else ["chosen", "rejected"]
        return {name: columns for name in names if (columns := _as_tuple(getattr(self, name)))}

    def needed(self) -> set[str]:
        """Every column that must be there."""
        return {column for columns in self.by_argument().values() for column in columns}

    def check(self, rows: list[Row], name: str) -> None:
        """
        Make sure that the first rows of a source have these columns.

        Raises:
            `ValueError`: if not; the message has the columns found, and what to do.
        """
        found = columns_of(rows)
        hint = " ".join(self._suggestions(found)) or "Say which columns hold what, such as `prompt='question'`."
        check_columns(rows, self.needed(), name, hint)
        if wrong := [column for column in self.extra if column not in found]:
            raise ValueError(f"{name} has no column {wrong}; found {sorted(found)}.")

    def _suggestions(self, found: list[str]) -> Iterator[str]:
        taken = self.needed()
        for argument, columns in self.by_argument().items():
            for column in columns:
                others = OTHER_NAMES.get(argument, ())
                close = nearest(column, [name for name in found if name not in taken], others)
                if column not in found and close is not None:
                    yield f"Did you mean `{argument}={close!r}`?" if len(columns) == 1 else f"Did you mean {close!r}?"

    def with_implicit_prompt(self, rows: list[Row]) -> "Columns":
        """
        These columns, without one for the prompt if there is none and both answers of the first rows begin with it.
        """
        columns = {column for row in rows for column in row}
        if self.prompt is None or self.prompt in columns or self.responses is not None:
            return self
        starts = [shared_start(row.get(self.chosen), row.get(self.rejected)) for row in rows]
        return replace(self, prompt=None) if any(starts) else self


def as_columns(names: Names | Sequence[str]) -> Names:
    """Names that cannot be changed any more."""
    return names if names is None or isinstance(names, str) else tuple(names)


def _as_tuple(names: Names) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def is_conversational(rows: list[Row], columns: Columns) -> bool:
    """Whether the first response in `rows`, or the first prompt, is made of messages."""
    if columns.prompt is not None and is_messages(_first_value(rows, columns.prompt)):
        return True
    value = _first_response(rows, columns)
    return is_messages(value) or (isinstance(value, list) and bool(value) and is_messages(value[0]))


def is_one_response_a_row(rows: list[Row], columns: Columns) -> bool:
    """Whether `responses` names a column with a single response."""
    if not isinstance(columns.responses, str) or columns.choice is not None:
        return False
    value = _first_response(rows, columns)
    return isinstance(value, str) or is_messages(value)


def _first_response(rows: list[Row], columns: Columns) -> object:
    column = columns.chosen if columns.responses is None else _as_tuple(columns.responses)[0]
    return _first_value(rows, column)


def _first_value(rows: list[Row], column: str) -> object:
    return next((row[column] for row in rows if row.get(column)), None)


def pairs_of_row(row: Row, columns: Columns, conversational: bool, ties: str) -> Iterator[Row | SkippedRow]:
    """The pairs of one row, and why there are none of the others."""
    base = _base(row, columns)
    responses = _responses(row, columns, conversational)
    yield from (response for response in responses if isinstance(response, SkippedRow))
    for better, worse, is_tie in _comparisons(row, columns, len(responses)):
        chosen, rejected = responses[better], responses[worse]
        if isinstance(chosen, SkippedRow) or isinstance(rejected, SkippedRow):
            continue
        try:
            yield from _both_ways(_pair(row, columns.prompt, chosen, rejected) | base, is_tie, ties)
        except SkippedRow as skipped:
            yield skipped


def _base(row: Row, columns: Columns) -> Row:
    base: Row = {"user_id": user_of(row, columns)}
    base |= {column: as_text(row.get(column)) for column in columns.extra}
    if columns.user_profile is not None:
        base["user_profile"] = as_text(row.get(columns.user_profile))
    if columns.split is not None:
        split = text_of(row, columns.split).lower()
        if split != TRAIN and not split.startswith(TEST_WORDS):
            raise SkippedRow(f"`{columns.split}` is neither train nor a word for test")
        base[SPLIT] = TRAIN if split == TRAIN else TEST
    return base


def user_of(row: Row, columns: Columns) -> str | None:
    """The user's id; `None` for a missing one, if rows without a user are the generic user's."""
    value = row.get(columns.user_id)
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    return None if is_missing and columns.missing_user == "generic" else user_id_of(row, columns.user_id)


def as_text(value: object) -> str | None:
    """
    A value as text: JSON, if it is none.

    ```python
    >>> as_text("a child"), as_text(None), as_text([1, True])
    ('a child', None, '[1, true]')
    ```
    """
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _responses(row: Row, columns: Columns, conversational: bool) -> list[Completion | SkippedRow]:
    names = columns.responses if columns.responses is not None else (columns.chosen, columns.rejected)
    if isinstance(names, tuple):
        return [_completion(row.get(name), name, conversational, columns) for name in names]
    return [_completion(value, names, conversational, columns) for value in _list_in(row, names)]


def _completion(value: object, name: str, conversational: bool, columns: Columns) -> Completion | SkippedRow:
    try:
        if conversational and isinstance(value, str) and columns.prompt is not None:
            return [assistant_message(text_of({name: value}, name))]
        return messages_of(value, name) if conversational else text_of({name: value}, name)
    except SkippedRow as skipped:
        return skipped


def _list_in(row: Row, names: Names) -> list[Any]:
    """The values in several columns, or in one column with a list."""
    if isinstance(names, tuple):
        return [row.get(name) for name in names]
    values = row.get(str(names))
    if not isinstance(values, list):
        raise SkippedRow(f"`{names}` is not a list")
    return values


def _comparisons(row: Row, columns: Columns, count: int) -> Iterator[tuple[int, int, bool]]:
    """For every two responses that are compared: numbers of the better and of the worse one, and whether they are tied."""
    if columns.responses is None:
        yield 0, 1, False
        return
    if count < 2:
        raise SkippedRow("fewer than two responses", broken=False)
    if columns.choice is not None:
        best = _best(row, columns, columns.choice, count)
        if best is None:
            yield from ((one, other, True) for one, other in combinations(range(count), 2))
        else:
            yield from ((best, other, False) for other in range(count) if other != best)
        return
    names = columns.ratings if columns.ratings is not None else columns.ranking
    sign = 1 if columns.ratings is not None else -1
    scores = [sign * number_of(value, str(names)) for value in _list_in(row, names)]
    if len(scores) != count:
        raise SkippedRow(f"`{names}` has not as many values as there are responses")
    for one, other in combinations(range(count), 2):
        better, worse = (one, other) if scores[one] >= scores[other] else (other, one)
        yield better, worse, scores[one] == scores[other]


def _best(row: Row, columns: Columns, column: str, count: int) -> int | None:
    """Number of the best response; `None` for a tie."""
    value = row.get(column)
    text = _as_key(value)
    if columns.choice_values is not None:
        meanings = {_as_key(key): best for key, best in columns.choice_values.items()}  # CSV has texts only
        if text not in meanings:
            raise SkippedRow(f"`{column}` has a value that is not in `choice_values`")
        best = meanings[text]
        if best is not None and best >= count:
            raise SkippedRow(f"`choice_values` gives `{column}` a number that no response has")
        return best
    if value is None or not text:
        raise SkippedRow(f"no `{column}`")
    if text.lower().startswith("tie"):
        return None
    names = _as_tuple(columns.responses)
    if len(names) == count and text in names:
        return names.index(text)
    if not text.isdecimal() or int(text) >= count:
        raise SkippedRow(f"`{column}` is no number of a response; `choice_values` can explain it")
    return int(text)


def _as_key(value: object) -> str:
    """A value of the column `choice` as text: 1, 1.0 and "1.0" are the same, as are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return whole_number(str(value))
    except ValueError:
        return str(value)


def number_of(value: object, name: str) -> float:
    """
    The number that `value` is, or that a text says.

    Raises:
        `SkippedRow`: if `value` is not a number.
    """
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise SkippedRow(f"`{name}` has no number")
    return number


def _pair(row: Row, prompt_column: str | None, chosen: Completion, rejected: Completion) -> Row:
    if chosen == rejected:
        raise SkippedRow(SAME_ANSWERS, broken=False)
    prompt: Completion
    if prompt_column is None:
        prompt, chosen, rejected = _split_off_prompt(chosen, rejected)
    elif isinstance(chosen, str):
        prompt = text_of(row, prompt_column)
    elif isinstance(row.get(prompt_column), str):
        prompt = [user_message(text_of(row, prompt_column))]
    else:
        prompt = messages_of(row.get(prompt_column), prompt_column)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, GROUP: _opening(prompt)}


def _opening(prompt: Completion) -> str:
    """What a prompt is about: of a conversation its first question, which keeps all its turns in one split."""
    if isinstance(prompt, str):
        return prompt
    return next((message for message in prompt if message["role"] == "user"), prompt[0])["content"]


def _both_ways(pair: Row, is_tie: bool, ties: str) -> Iterator[Row]:
    if is_tie and ties == "skip":
        raise SkippedRow("a tie", broken=False)
    yield pair
    if is_tie:
        yield {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def _split_off_prompt(first: Completion, second: Completion) -> tuple[Completion, Completion, Completion]:
    """What two texts, or two conversations, share at the start, and how each goes on."""
    length = shared_start(first, second)
    if isinstance(first, str) and not first[:length].strip():
        raise SkippedRow(NO_SHARED_START)
    if not length or length in (len(first), len(second)):
        raise SkippedRow("two conversations that share no start, or one of which goes on where the other ends")
    return first[:length], first[length:], second[length:]

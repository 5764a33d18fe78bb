"""Which column of a preference set holds what, and the pairs that one row gives."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from .messages import Message, is_messages, messages_of
from .pairs import GROUP, SPLIT
from .rows import Row, SkippedRow, text_of, user_id_of
from .splits import TEST, TRAIN


Names: TypeAlias = str | tuple[str, ...] | None  # one column, several, or none
Completion: TypeAlias = str | list[Message]
TEST_WORDS = ("test", "valid", "dev", "eval")  # a value of the split column that starts so means `test`


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

    def needed(self) -> set[str]:
        """Every column that must be there."""
        groups = [self.user_id, self.prompt, self.user_profile, self.split, self.choice, self.ratings, self.ranking]
        groups += [self.responses] if self.responses is not None else [self.chosen, self.rejected]
        return {column for group in groups for column in _as_tuple(group)}


def as_columns(names: Names | Sequence[str]) -> Names:
    """Names that cannot be changed any more."""
    return names if names is None or isinstance(names, str) else tuple(names)


def _as_tuple(names: Names) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def is_conversational(rows: list[Row], columns: Columns) -> bool:
    """Whether the first response in `rows` is made of messages."""
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
    base: Row = {"user_id": user_id_of(row, columns.user_id)}
    if columns.user_profile is not None:
        profile = row.get(columns.user_profile)
        base["user_profile"] = None if profile is None else str(profile)
    if columns.split is not None:
        split = text_of(row, columns.split).lower()
        if split != TRAIN and not split.startswith(TEST_WORDS):
            raise SkippedRow(f"`{columns.split}` is neither train nor a word for test")
        base[SPLIT] = TRAIN if split == TRAIN else TEST
    return base


def _responses(row: Row, columns: Columns, conversational: bool) -> list[Completion | SkippedRow]:
    names = columns.responses if columns.responses is not None else (columns.chosen, columns.rejected)
    if isinstance(names, tuple):
        return [_completion(row.get(name), name, conversational) for name in names]
    return [_completion(value, names, conversational) for value in _list_in(row, names)]


def _completion(value: object, name: str, conversational: bool) -> Completion | SkippedRow:
    try:
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
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if columns.choice_values is not None:
        meanings = {str(key): best for key, best in columns.choice_values.items()}  # CSV has texts only
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
        raise SkippedRow("both responses are the same", broken=False)
    prompt: Completion
    if prompt_column is None:
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
    elif isinstance(chosen, str):
        prompt = text_of(row, prompt_column)
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


def _split_conversations(first: Completion, second: Completion) -> tuple[Completion, Completion, Completion]:
    """What two conversations share at the start, and how each goes on."""
    if isinstance(first, str) or isinstance(second, str):
        raise SkippedRow("`prompt=None` takes the prompt from messages, and the responses are text")
    length = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), 0)
    if not length:
        raise SkippedRow("two conversations that share no start, or one of which goes on where the other ends")
    return first[:length], first[length:], second[length:]

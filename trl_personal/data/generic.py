"""Any preference data with users: say which columns hold what."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, DatasetDict, Features, Value

from ..user_column import AnyDataset, with_user_names
from .columns import (
    Columns,
    as_columns,
    as_text,
    is_conversational,
    is_one_response_a_row,
    number_of,
    pairs_of_row,
    user_of,
)
from .messages import prompt_features
from .pairs import OnReport, make_splits, make_streams
from .rows import Row, SkippedRow
from .source import RowSource, Source, TableSource, columns_of, open_source, peek
from .splits import TEST, TRAIN, SourceSplits, SplitRule, choose_split_rule
from .tables import keep_rows_that_teach


def load_generic(
    name_or_path: str | Path,
    *,
    user_id: str = "user_id",
    prompt: str | None = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    responses: str | Sequence[str] | None = None,
    choice: str | None = None,
    choice_values: Mapping[Any, int | None] | None = None,
    ratings: str | Sequence[str] | None = None,
    ranking: str | Sequence[str] | None = None,
    ties: Literal["skip", "both"] = "skip",
    user_profile: str | None = None,
    split: str | None = None,
    missing_user: Literal["skip", "generic"] = "skip",
    test_size: float | None = None,
    unknown_users: float = 0.0,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    Preferences from a file or a folder of JSON, CSV, parquet or Arrow, or from the Hub, in any of four forms:

    - *pairs*: columns `chosen` and `rejected`;
    - *a choice* among `responses`: `choice` has the number of the best one (from 0), its column's name, or a value that
      `choice_values` explains. It is paired with every other response;
    - *ratings* (higher is better) or a *ranking* (1 is best) of `responses`: every better one is paired with every worse one;
    - *one rated response a row*: `responses` and `ratings` (or `ranking`) each name a column with one value. The rows of one
      user about one prompt are put together first.

    `responses`, `ratings` and `ranking` are the names of several columns, or of one column with a list.

    Prompt and responses are text or messages, as they are in the data; where one of them has messages, a text becomes a
    message too. With `prompt=None` each response is a whole text or conversation, whose prompt is what they share at the
    start.

    Rows that cannot be read, or cannot teach, are left out and counted with their reason and the place of the first one.

    Args:
        name_or_path (`str` or `Path`): A set on the Hub, a file (`.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, these also with
            `.gz`, `.parquet` or `.arrow`), a folder with files of one type, whose names may say their splits, or a folder that
            `save_to_disk` wrote.
        user_id (`str`): Name of the column with the user, text or whole numbers. 12.0 is user 12, as pandas writes integers
            where a column has a gap.
        prompt (`str`, *optional*): Name of the column with the prompt.
        chosen (`str`): Name of the column with the preferred response. It is not read if `responses` is given.
        rejected (`str`): Name of the column with the other response. It is not read if `responses` is given.
        responses (`str` or `Sequence[str]`, *optional*): Name or names of the columns with the responses.
        choice (`str`, *optional*): Name of the column that says which response is best.
        choice_values (`Mapping`, *optional*): What the values of `choice` mean: the number of the best response, or `None` for
            a tie. Without it, a value that starts with "tie" is a tie.
        ratings (`str` or `Sequence[str]`, *optional*): Name or names of the columns with the ratings.
        ranking (`str` or `Sequence[str]`, *optional*): Name or names of the columns with the ranks.
        ties (`str`, defaults to `"skip"`): What to make of two equally good responses: `"skip"` counts them in the report,
            `"both"` gives one pair each way, which teaches indifference.
        user_profile (`str`, *optional*): Name of the column with the text about the user.
        split (`str`, *optional*): Name of the column with the row's split: `train`, or a word that starts with test, valid,
            dev or eval.
        missing_user (`str`, defaults to `"skip"`): What to make of rows without a user: `"skip"` counts them in the report,
            `"generic"` gives them to the generic user.
        test_size (`float`, *optional*): Share of the prompts in `test`. `None` keeps the splits of a source that has several,
            and means 0.1 for one that has none. It cannot be given with `split`.
        unknown_users (`float`): Share of the users to keep for `test_unknown_users`. It cannot be given with `split`.
        seed (`int`): Random seed for holding out. Another seed holds out other prompts and users.
        config_name (`str`, *optional*): Name of the configuration of the set on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the set on the Hub.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`].

    Returns:
        `DatasetDict` with the source's splits, or `train`, `test` (unless its share is 0) and, if
        asked for, `test_unknown_users`; columns `prompt`, `chosen`, `rejected` (text or messages), `user_id` (text) and, if
        named, `user_profile`.

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: for options that do not go together, a column that is not
        there (the message has those found), or if no pair is left.

    Example:

    ```python
    load_generic("judgments.csv", user_id="judge", responses=("a", "b"), choice="winner", choice_values={"A": 0, "B": 1})
    ```
    """
    if ties not in ("skip", "both"):
        raise ValueError(f'`ties` must be "skip" or "both", found {ties!r}.')
    if missing_user not in ("skip", "generic"):
        raise ValueError(f'`missing_user` must be "skip" or "generic", found {missing_user!r}.')
    columns = Columns(
        user_id=user_id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        responses=as_columns(responses),
        choice=choice,
        choice_values=choice_values,
        ratings=as_columns(ratings),
        ranking=as_columns(ranking),
        user_profile=user_profile,
        split=split,
        missing_user=missing_user,
    )
    sources = open_source(name_or_path, config_name=config_name, revision=revision)
    rule = _split_rule(sources, split, test_size, unknown_users, seed)
    return make_pairs(sources, columns, rule, name=str(name_or_path), ties=ties, on_report=on_report)


Splits: TypeAlias = Mapping[str, AnyDataset]


def read_splits(
    sources: dict[str, Source],
    columns: Columns,
    *,
    name: str,
    ties: str = "skip",
    streaming: bool = False,
    also: Sequence[str] = (),
    on_report: OnReport | None = None,
) -> Splits:
    """
    The pairs of a source in its own splits, as [`load_generic`] makes them, under the names that TRL reads; users and profiles
    keep the names of their columns. A table of pairs keeps its other columns too, such as images.

    Args:
        sources (`dict`): Raw rows per split of the source, from [`~data.source.open_source`].
        columns ([`Columns`]): Which column holds what. If there is none for the prompt, answers may begin with it.
        name (`str`): Name of the source, for the report.
        ties (`str`): What to make of two equally good responses.
        streaming (`bool`): Whether to read the rows while they are iterated.
        also (`Sequence[str]`): Columns to keep if they are there.
        on_report (`Callable`, *optional*): Function that is called with each [`LoadReport`].

    Raises:
        `ValueError`: as [`load_generic`].
    """
    tables = {split: source.table for split, source in sources.items() if isinstance(source, TableSource)}
    are_pairs = columns.responses is None and len(tables) == len(sources)
    if are_pairs and not streaming and all(isinstance(table, Dataset) for table in tables.values()):
        return keep_rows_that_teach(sources, columns, name, on_report)
    rule = SourceSplits(tuple(sources))
    found_there = columns_of(peek((placed for source in sources.values() for placed in source), name))
    if typed := sorted({"images", "image", "chat_template_kwargs"} & set(found_there)):
        raise ValueError(
            f"{name} has the column {typed[0]!r}, which only tables of pairs can hold: parquet, Arrow or `save_to_disk`."
        )
    columns = replace(columns, extra=(*columns.extra, *(column for column in also if column in found_there)))
    found = make_pairs(sources, columns, rule, name=name, ties=ties, streaming=streaming, on_report=on_report)
    names = {"user_id": columns.user_id, "user_profile": columns.user_profile}
    changed = {old: new for old, new in names.items() if new is not None and old != new}
    return {split: table.rename_columns(changed) if changed else table for split, table in found.items()}


def make_pairs(
    sources: dict[str, Source],
    columns: Columns,
    rule: SplitRule,
    *,
    name: str,
    ties: str,
    streaming: bool = False,
    on_report: OnReport | None = None,
) -> Any:
    """The work that every door shares: look at the first rows, make pairs of all of them, count what gives none."""
    sources = {split: _with_user_names(source, columns.user_id) for split, source in sources.items()}
    first = peek((placed for source in sources.values() for placed in source), name)
    if columns.prompt is not None:
        columns = columns.with_implicit_prompt(first)
    for split, source in sources.items():
        columns.check(peek(source, f"{name}, {split}") if len(sources) > 1 else first, name)
    conversational = is_conversational(first, columns)
    joined_rows = 0
    broken: Counter[str] = Counter()
    places: dict[str, str] = {}
    if is_one_response_a_row(first, columns):
        sources, joined_rows = _join_rows(sources, columns, broken, places)
    features = prompt_features(conversational) | {"user_id": Value("string")}
    features |= {} if columns.user_profile is None else {"user_profile": Value("string")}
    features |= {column: Value("string") for column in columns.extra}
    work = partial(pairs_of_row, columns=columns, conversational=conversational, ties=ties)
    if streaming:
        return make_streams(sources, work, Features(features), name=name, on_report=on_report)
    return make_splits(
        sources,
        work,
        Features(features),
        rule,
        name=name,
        rows_read=joined_rows,
        broken=broken,
        places=places,
        on_report=on_report,
    )


def _with_user_names(source: Source, column: str) -> Source:
    if not isinstance(source, TableSource):
        return source
    return TableSource(with_user_names(source.table, column), source.name)


def _split_rule(
    sources: dict[str, Source], split: str | None, test_size: float | None, unknown_users: float, seed: int
) -> SplitRule:
    if split is None:
        return choose_split_rule(sources, test_size, unknown_users, seed)
    if test_size is not None or unknown_users:
        raise ValueError(
            "`split` names the split of each row: leave out either it or `test_size` and `unknown_users`."
        )
    return SourceSplits((TRAIN, TEST))


def _join_rows(
    sources: dict[str, Source], columns: Columns, broken: Counter[str], places: dict[str, str]
) -> tuple[dict[str, Source], int]:
    """One row for all responses of a user to a prompt, and how many rows went into other ones."""
    response, score = str(columns.responses), str(columns.ratings or columns.ranking)
    shared = [column for column in (columns.prompt, columns.user_profile, columns.split, *columns.extra) if column]
    joined: dict[str, Source] = {}
    rows_read = 0
    for source_split, source in sources.items():
        groups: dict[str, tuple[str, Row]] = {}
        for place, row in source:
            rows_read += 1
            try:
                if isinstance(row, SkippedRow):
                    raise row
                user_id, number = user_of(row, columns), number_of(row.get(score), score)
            except SkippedRow as skipped:
                broken[skipped.reason] += 1
                places.setdefault(skipped.reason, place)
                continue
            key = as_text([user_id, row.get(columns.prompt or ""), row.get(columns.split or "")]) or ""
            group: Row = {
                columns.user_id: user_id,
                **{column: row.get(column) for column in shared},
                response: [],
                score: [],
            }
            _, group = groups.setdefault(key, (place, group))
            group[response].append(row.get(response))
            group[score].append(number)
        joined[source_split] = RowSource(list(groups.values()))
        rows_read -= len(groups)
    return joined, rows_read

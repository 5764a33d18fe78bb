"""Any preference data with users: say which columns hold what."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, Value

from .columns import Columns, as_columns, is_conversational, is_one_response_a_row, number_of, pairs_of_row
from .messages import prompt_features
from .pairs import OnReport, make_splits
from .rows import Row, SkippedRow, user_id_of
from .source import JSON_LINE, JSON_LINE_FEATURES, check_columns, open_source, parse_row, peek
from .splits import TEST, TRAIN, SourceSplits, SplitRule, choose_split_rule


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
    test_size: float | None = None,
    unknown_users: float = 0.0,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    Preferences from a JSON, CSV or parquet file, or from the Hub, in any of four forms:

    - *pairs*: columns `chosen` and `rejected`;
    - *a choice* among `responses`: `choice` has the number of the best one (from 0), its column's name, or a value that
      `choice_values` explains. It is paired with every other response;
    - *ratings* (higher is better) or a *ranking* (1 is best) of `responses`: every better one is paired with every worse one;
    - *one rated response a row*: `responses` and `ratings` (or `ranking`) each name a column with one value. The rows of one
      user about one prompt are put together first.

    `responses`, `ratings` and `ranking` are the names of several columns, or of one column with a list.

    Prompt and responses are text or messages, as they are in the data. With `prompt=None` each response is a whole
    conversation, and what they share at the start is the prompt.

    Args:
        name_or_path (`str` or `Path`): A set on the Hub, a file, or a folder with files of one type.
        user_id (`str`): Name of the column with the user, text or integers.
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
    )
    sources = open_source(name_or_path, config_name=config_name, revision=revision)
    rows = peek(next(iter(sources.values())))
    check_columns(rows, columns.needed(), str(name_or_path), "Say which columns hold what, e.g. `prompt=...`.")
    rule = _split_rule(sources, split, test_size, unknown_users, seed)
    conversational = is_conversational(rows, columns)
    joined_rows = 0
    broken: Counter[str] = Counter()
    if is_one_response_a_row(rows, columns):
        sources, joined_rows = _join_rows(sources, columns, broken)
    features = prompt_features(conversational) | {"user_id": Value("string")}
    if user_profile is not None:
        features["user_profile"] = Value("string")
    return make_splits(
        sources,
        partial(pairs_of_row, columns=columns, conversational=conversational, ties=ties),
        Features(features),
        rule,
        name=str(name_or_path),
        rows_read=joined_rows,
        broken=broken,
        on_report=on_report,
    )


def _split_rule(
    sources: dict[str, Dataset], split: str | None, test_size: float | None, unknown_users: float, seed: int
) -> SplitRule:
    if split is None:
        return choose_split_rule(sources, test_size, unknown_users, seed)
    if test_size is not None or unknown_users:
        raise ValueError(
            "`split` names the split of each row: leave out either it or `test_size` and `unknown_users`."
        )
    return SourceSplits((TRAIN, TEST))


def _join_rows(sources: dict[str, Dataset], columns: Columns, broken: Counter[str]) -> tuple[dict[str, Dataset], int]:
    """One row for all responses of a user to a prompt, and how many rows went into other ones."""
    response, score = str(columns.responses), str(columns.ratings or columns.ranking)
    shared = [column for column in (columns.user_id, columns.prompt, columns.user_profile, columns.split) if column]
    joined: dict[str, Dataset] = {}
    rows_read = 0
    for source_split, source in sources.items():
        groups: dict[str, Row] = {}
        for raw in source:
            rows_read += 1
            row = parse_row(raw)
            try:
                if row is None:
                    raise SkippedRow("not a JSON object")
                user_id, number = user_id_of(row, columns.user_id), number_of(row.get(score), score)
            except SkippedRow as skipped:
                broken[skipped.reason] += 1
                continue
            key = json.dumps([user_id, row.get(columns.prompt or ""), row.get(columns.split or "")])
            group = groups.setdefault(key, {**{column: row.get(column) for column in shared}, response: [], score: []})
            group[response].append(row.get(response))
            group[score].append(number)
        lines = [json.dumps(group) for group in groups.values()]
        joined[source_split] = Dataset.from_dict({JSON_LINE: lines}, features=JSON_LINE_FEATURES)
        rows_read -= len(lines)
    return joined, rows_read

"""From raw rows to the splits of preference pairs, with every row accounted for."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from .report import LoadReport
from .rows import Row, SkippedRow
from .source import parse_row
from .splits import TRAIN, HeldOut, SplitRule


# Columns that say what became of a row. A loader fills the first two, and none of them leaves this file.
GROUP = "_group"  # what a pair is about, such as its prompt: no group should be in two splits
SPLIT = "_split"  # only if the row itself names its split
FILTERED, BROKEN, ROWS = "_filtered", "_broken", "_rows"
BOOKKEEPING = {column: Value("string") for column in (GROUP, SPLIT, FILTERED, BROKEN)} | {ROWS: Value("int64")}

# A loader's work on one raw row: it gives the pairs with the columns promised and `GROUP`, and raises `SkippedRow` for a
# row without pairs, or gives one for the part of a row that has none.
RowToPairs: TypeAlias = Callable[[Row], Iterable[Row | SkippedRow]]
OnReport: TypeAlias = Callable[[LoadReport], None]
BATCH_SIZE = 256


@dataclass
class Tally:
    """Counts rows as they pass; `filtered` and `broken` may start with what a loader left out before."""

    name: str
    split_names: tuple[str, ...]
    rows_read: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pairs = dict.fromkeys(self.split_names, 0)
        self.users: dict[str, set[str]] = {split: set() for split in self.split_names}
        self.groups: dict[str, set[str]] = {split: set() for split in self.split_names}

    def add(self, row: Row) -> None:
        """Count a mapped row."""
        self.rows_read += row[ROWS]
        if row[BROKEN] is not None:
            self.broken[row[BROKEN]] += 1
        elif row[FILTERED] is not None:
            self.filtered[row[FILTERED]] += 1
        else:
            self.pairs[row[SPLIT]] += 1
            self.users[row[SPLIT]].add(row["user_id"])
            self.groups[row[SPLIT]].add(row[GROUP])

    def report(self) -> LoadReport:
        """The counts so far."""
        elsewhere = set().union(*(groups for split, groups in self.groups.items() if split != TRAIN))
        return LoadReport(
            source=self.name,
            rows_read=self.rows_read,
            pairs=dict(self.pairs),
            users={split: len(users) for split, users in self.users.items()},
            filtered=dict(self.filtered),
            broken=dict(self.broken),
            shared_prompts=len(self.groups.get(TRAIN, set()) & elsewhere),
        )


def make_splits(
    sources: dict[str, Dataset],
    row_to_pairs: RowToPairs,
    features: Features,
    split_rule: SplitRule,
    *,
    name: str,
    rows_read: int = 0,
    filtered: Counter[str] | None = None,
    broken: Counter[str] | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    Turn every raw row into pairs and sort the pairs into splits; log the report and hand it to `on_report`.

    Args:
        sources (`dict`): Raw rows per split of the source.
        row_to_pairs (`Callable`): The loader's work on one raw row, see `RowToPairs`.
        features (`Features`): Columns of the pairs, `user_id` among them.
        split_rule (`SplitRule`): Rule that places the pairs that do not name their split.
        name (`str`): Name of the source, for the report.
        rows_read (`int`): Number of rows that the loader has read and left out before.
        filtered (`Counter`, *optional*): Number of sound rows among them, for each reason.
        broken (`Counter`, *optional*): Number of broken rows among them, for each reason.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`].

    Raises:
        `ValueError`: if no pair is left; the message has the report.
    """
    if isinstance(split_rule, HeldOut) and split_rule.unknown_users:
        split_rule = split_rule.after(_users_and_groups(sources, row_to_pairs))
    tally = Tally(name, split_rule.names, rows_read, Counter(filtered), Counter(broken))
    work = {"row_to_pairs": row_to_pairs, "split_rule": split_rule, "columns": (*features, *BOOKKEEPING)}
    mapped = [
        source.map(
            _map_batch,
            batched=True,
            batch_size=BATCH_SIZE,
            features=Features({**features, **BOOKKEEPING}),
            remove_columns=source.column_names,
            fn_kwargs=work | {"source_split": source_split},
            load_from_cache_file=False,  # `datasets` would not notice that this package has changed
            desc="Reading preferences",
        )
        for source_split, source in sources.items()
    ]
    return _count_and_split(concatenate_datasets(mapped), list(features), tally, on_report)


def _users_and_groups(sources: dict[str, Dataset], row_to_pairs: RowToPairs) -> Iterator[tuple[str, str]]:
    for source in sources.values():
        for raw in source:
            for pair in _pairs_of(raw, row_to_pairs):
                if not isinstance(pair, SkippedRow):
                    yield pair["user_id"], pair[GROUP]


def _pairs_of(raw: Row, row_to_pairs: RowToPairs) -> Iterator[Row | SkippedRow]:
    row = parse_row(raw)
    try:
        if row is None:
            raise SkippedRow("not a JSON object")
        yield from row_to_pairs(row)
    except SkippedRow as skipped:
        yield skipped


def _map_batch(
    batch: dict[str, list[Any]],
    row_to_pairs: RowToPairs,
    split_rule: SplitRule,
    source_split: str,
    columns: tuple[str, ...],
) -> dict[str, list[Any]]:
    out: list[Row] = []
    for values in zip(*batch.values(), strict=True):
        raw = dict(zip(batch, values, strict=True))
        pairs = [_placed(pair, split_rule, source_split) for pair in _pairs_of(raw, row_to_pairs)]
        out += [{**pair, ROWS: int(number == 0)} for number, pair in enumerate(pairs)]
    return {column: [row.get(column) for row in out] for column in columns}


def _placed(pair: Row | SkippedRow, split_rule: SplitRule, source_split: str) -> Row:
    try:
        if isinstance(pair, SkippedRow):
            raise pair
        return {SPLIT: split_rule.place(pair["user_id"], pair[GROUP], source_split), **pair}
    except SkippedRow as skipped:
        return {BROKEN if skipped.broken else FILTERED: skipped.reason}


def _count_and_split(rows: Dataset, columns: list[str], tally: Tally, on_report: OnReport | None) -> DatasetDict:
    place = []
    for row in rows.select_columns([*BOOKKEEPING, "user_id"]):
        tally.add(row)
        place.append(row[SPLIT])
    report = tally.report()
    if not sum(report.pairs.values()):
        raise ValueError(f"No preference pair is left; check the options and the data.\n{report}")
    _publish(report, on_report)
    kept = rows.select_columns(columns)
    splits = np.array(place, dtype=object)
    return DatasetDict({split: kept.select(np.flatnonzero(splits == split)) for split in tally.split_names})


def _publish(report: LoadReport, on_report: OnReport | None) -> None:
    report.log()
    if on_report is not None:
        on_report(report)

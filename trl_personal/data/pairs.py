"""From raw rows to the splits of preference pairs, with every row accounted for."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.arrow_writer import ArrowWriter

from ..users import describe_variants, find_variants
from .report import LoadReport
from .rows import Row, SkippedRow
from .source import Source
from .splits import TRAIN, HeldOut, SourceSplits, SplitRule


# What a loader says of a pair beside its columns. Neither leaves this file.
GROUP = "_group"  # what a pair is about, such as its prompt: no group should be in two splits
SPLIT = "_split"  # only if the row itself names its split

# A loader's work on one raw row: it gives the pairs with the columns promised and `GROUP`, and raises `SkippedRow` for a
# row without pairs, or gives one for the part of a row that has none.
RowToPairs: TypeAlias = Callable[[Row], Iterable[Row | SkippedRow]]
OnReport: TypeAlias = Callable[[LoadReport], None]

BATCH_SIZE = 1000
_FOLDERS: list[TemporaryDirectory[str]] = []  # of datasets that this process has made; removed when it ends


@dataclass
class Tally:
    """Counts rows as they pass; `filtered` and `broken` may start with what a loader left out before."""

    name: str
    split_names: tuple[str, ...]
    rows_read: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pairs = dict.fromkeys(self.split_names, 0)
        self.users: dict[str, dict[str, None]] = {split: {} for split in self.split_names}
        self.groups: dict[str, set[str]] = {split: set() for split in self.split_names}

    def skip(self, skipped: SkippedRow, place: str) -> None:
        """Count what gives no pair."""
        (self.broken if skipped.broken else self.filtered)[skipped.reason] += 1
        self.places.setdefault(skipped.reason, place)

    def add(self, split: str, user_id: str | None, group: str) -> None:
        """Count a pair."""
        self.pairs[split] += 1
        if user_id is not None:
            self.users[split][user_id] = None
        self.groups[split].add(group)

    def report(self) -> LoadReport:
        """The counts so far."""
        elsewhere = set().union(*(groups for split, groups in self.groups.items() if split != TRAIN))
        variants = find_variants(user_id for users in self.users.values() for user_id in users)
        return LoadReport(
            source=self.name,
            rows_read=self.rows_read,
            pairs=dict(self.pairs),
            users={split: len(users) for split, users in self.users.items()},
            filtered=dict(self.filtered),
            broken=dict(self.broken),
            shared_prompts=len(self.groups.get(TRAIN, set()) & elsewhere),
            places=dict(self.places),
            variants=describe_variants(variants) if variants else "",
        )

    def checked_report(self) -> LoadReport:
        """
        The counts.

        Raises:
            `ValueError`: if no pair is left; the message has the report.
        """
        report = self.report()
        if not sum(report.pairs.values()):
            raise ValueError(f"No preference pair is left; check the options and the data.\n{report}")
        return report


@dataclass
class PairReader:
    """Gives the pairs of raw rows, each with its split, and counts all rows in `tally`."""

    sources: Mapping[str, Source]
    row_to_pairs: RowToPairs
    split_rule: SplitRule
    columns: tuple[str, ...]
    tally: Tally

    def __call__(self) -> Iterator[Row]:
        for source_split, source in self.sources.items():
            for place, raw in source:
                self.tally.rows_read += 1
                for pair in pairs_of(raw, self.row_to_pairs):
                    try:
                        yield self._placed(pair, source_split)
                    except SkippedRow as skipped:
                        self.tally.skip(skipped, place)

    def _placed(self, pair: Row | SkippedRow, source_split: str) -> Row:
        if isinstance(pair, SkippedRow):
            raise pair
        user_id, group = pair["user_id"], pair[GROUP]
        split = pair[SPLIT] if SPLIT in pair else self.split_rule.place(user_id or "", group, source_split)
        self.tally.add(split, user_id, group)
        return {**{column: pair.get(column) for column in self.columns}, SPLIT: split}


def pairs_of(raw: Row | SkippedRow, row_to_pairs: RowToPairs) -> Iterator[Row | SkippedRow]:
    """The pairs of a raw row, and why there are none of the others."""
    if isinstance(raw, SkippedRow):
        yield raw
        return
    try:
        yield from row_to_pairs(raw)
    except SkippedRow as skipped:
        yield skipped


def make_splits(
    sources: Mapping[str, Source],
    row_to_pairs: RowToPairs,
    features: Features,
    split_rule: SplitRule,
    *,
    name: str,
    rows_read: int = 0,
    filtered: Counter[str] | None = None,
    broken: Counter[str] | None = None,
    places: Mapping[str, str] | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    Turn every raw row into pairs and sort the pairs into splits; log the report and hand it to `on_report`.

    Args:
        sources (`Mapping`): Raw rows per split of the source.
        row_to_pairs (`Callable`): The loader's work on one raw row, see `RowToPairs`.
        features (`Features`): Columns of the pairs, `user_id` among them.
        split_rule (`SplitRule`): Rule that places the pairs that do not name their split.
        name (`str`): Name of the source, for the report.
        rows_read (`int`): Number of rows that the loader has read and left out before.
        filtered (`Counter`, *optional*): Number of sound rows among them, for each reason.
        broken (`Counter`, *optional*): Number of broken rows among them, for each reason.
        places (`Mapping[str, str]`, *optional*): Where the first row of each reason stands.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`].

    Raises:
        `ValueError`: if no pair is left; the message has the report.
    """
    if isinstance(split_rule, HeldOut) and split_rule.unknown_users:
        split_rule = split_rule.after(_users_and_groups(sources, row_to_pairs))
    tally = Tally(name, split_rule.names, rows_read, Counter(filtered), Counter(broken), dict(places or {}))
    reader = PairReader(sources, row_to_pairs, split_rule, tuple(features), tally)
    rows = on_disk(reader(), Features({**features, SPLIT: Value("string")}))
    report = tally.checked_report()
    publish(report, on_report)
    splits = np.array(rows[SPLIT][:], dtype=object)
    kept = rows.remove_columns(SPLIT)
    return DatasetDict({split: kept.select(np.flatnonzero(splits == split)) for split in tally.split_names})


def on_disk(rows: Iterable[Row], features: Features) -> Dataset:
    """`rows` as a dataset in a temporary folder of this process. They are read anew each time, as the counts are."""
    if not _FOLDERS:
        _FOLDERS.append(TemporaryDirectory(prefix="trl_personal-pairs-", ignore_cleanup_errors=True))
    path = Path(mkdtemp(dir=_FOLDERS[0].name), "pairs.arrow")
    remaining = iter(rows)
    with ArrowWriter(features=features, path=str(path)) as writer:
        while batch := list(islice(remaining, BATCH_SIZE)):
            writer.write_batch({column: [row[column] for row in batch] for column in features})
        writer.finalize()
    return Dataset.from_file(str(path))


@dataclass
class StreamReader:
    """The pairs of one split, read while they are iterated. The first time that all were read, the report is published."""

    reader: PairReader
    on_report: OnReport | None
    is_told: bool = False

    def __call__(self) -> Iterator[Row]:
        tally = Tally(self.reader.tally.name, self.reader.tally.split_names)
        for row in replace(self.reader, tally=tally)():
            del row[SPLIT]
            yield row
        report = tally.checked_report()
        if not self.is_told:
            self.is_told = True
            publish(report, self.on_report)


def make_streams(
    sources: Mapping[str, Source],
    row_to_pairs: RowToPairs,
    features: Features,
    *,
    name: str,
    on_report: OnReport | None = None,
) -> dict[str, IterableDataset]:
    """[`make_splits`] with the source's own splits, each as a stream. Its report comes when it was read to its end."""
    streams = {}
    for split, source in sources.items():
        tally = Tally(f"{name}, {split}" if len(sources) > 1 else name, (split,))
        reader = PairReader({split: source}, row_to_pairs, SourceSplits((split,)), tuple(features), tally)
        streams[split] = IterableDataset.from_generator(StreamReader(reader, on_report), features=features)
    return streams


def _users_and_groups(sources: Mapping[str, Source], row_to_pairs: RowToPairs) -> Iterator[tuple[str, str]]:
    for source in sources.values():
        for _, raw in source:
            for pair in pairs_of(raw, row_to_pairs):
                if not isinstance(pair, SkippedRow):
                    yield pair["user_id"], pair[GROUP]


def publish(report: LoadReport, on_report: OnReport | None) -> None:
    """Log the report and hand it to `on_report`."""
    report.log()
    if on_report is not None:
        on_report(report)

"""Tables whose rows are pairs already: they stay as they are, but for rows that cannot teach and for names of columns."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from datasets import Dataset, Value

from ..preference_rows import SAME_ANSWERS, why_it_cannot_teach
from ..user_column import with_user_names
from .columns import Columns, user_of
from .pairs import OnReport, Tally, publish
from .rows import SkippedRow
from .source import Source, TableSource, peek


IMAGES = ("images", "image")  # with them, a prompt may be without text


def keep_rows_that_teach(
    sources: Mapping[str, Source], columns: Columns, name: str, on_report: OnReport | None
) -> dict[str, Dataset]:
    """
    The tables with `prompt`, `chosen`, `rejected` and the user as text, and all other columns as they are.

    Raises:
        `ValueError`: if a column is missing, or no pair is left.
    """
    tally = Tally(name, tuple(sources), 0, Counter(), Counter())
    tables = {split: _kept(source, split, columns, tally) for split, source in sources.items()}
    publish(tally.checked_report(), on_report)
    return tables


def _kept(source: Source, split: str, columns: Columns, tally: Tally) -> Dataset:
    assert isinstance(source, TableSource)
    assert isinstance(source.table, Dataset)
    table = with_user_names(source.table, columns.user_id)
    assert isinstance(table, Dataset)
    if not len(table):
        return table
    first = peek(TableSource(table.select(range(min(100, len(table)))), source.name), source.name)
    columns = columns.with_implicit_prompt(first)
    columns.check(first, source.name)
    has_images = any(column in table.column_names for column in IMAGES)
    looked_at = replace(columns, user_profile=None, split=None, prompt=None if has_images else columns.prompt)
    users: list[str | None] = []
    kept: list[int] = []
    rows = TableSource(table.select_columns(sorted(looked_at.needed())), source.name)
    for index, (place, row) in enumerate(rows):
        tally.rows_read += 1
        try:
            assert not isinstance(row, SkippedRow)
            user_id = user_of(row, columns)
            if reason := why_it_cannot_teach(row, looked_at.prompt, columns.chosen, columns.rejected, has_images):
                raise SkippedRow(reason, broken=reason != SAME_ANSWERS)
        except SkippedRow as skipped:
            tally.skip(skipped, place)
            continue
        tally.add(split, user_id, str(row.get(columns.prompt or "", "")))
        users.append(user_id)
        kept.append(index)
    table = table if len(kept) == len(table) else table.select(kept)
    table = table.remove_columns(columns.user_id).add_column(columns.user_id, users, feature=Value("string"))
    return _renamed(table, {columns.prompt: "prompt", columns.chosen: "chosen", columns.rejected: "rejected"})


def _renamed(table: Dataset, names: Mapping[str | None, str]) -> Dataset:
    changed = {old: new for old, new in names.items() if old is not None and old != new}
    table = table.remove_columns([new for new in changed.values() if new in table.column_names and new not in changed])
    return table.rename_columns(changed) if changed else table

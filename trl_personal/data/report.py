"""What a loader read, what it made of it and what it left out, as numbers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..terminal import printable


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """
    The counts of one loading. Whatever gave no pair is in `filtered` or in `broken`, under its reason.

    Every loader logs its report, at `INFO` if all is well and at `WARNING`, which is on the screen by default, if something
    was left out, prompts leaked, a split is empty or ids look alike, and hands it to `on_report`. A report holds no user id
    and no text of a row.

    Args:
        source (`str`): Name of the set, or path of the file.
        rows_read (`int`): Number of raw rows (for PRISM: of conversations), before anything was left out.
        pairs (`Mapping[str, int]`): Number of pairs in each split.
        users (`Mapping[str, int]`): Number of users in each split.
        filtered (`Mapping[str, int]`): Number of sound rows that a rule or an option leaves out (a tie, too long, ...), for
            each reason.
        broken (`Mapping[str, int]`): Number of rows that cannot be used (not JSON, no user, ...), for each reason.
        shared_prompts (`int`): Number of prompts of `train` that occur in another split too. It is above 0 only if the
            source's own splits leak.
        places (`Mapping[str, str]`): Where the first row of each reason stands, such as `my.jsonl, line 3`.
        variants (`str`): What to say of user ids that differ only in white space, case or the way they are written.

    ```python
    >>> report = LoadReport("my.jsonl", 6, {"train": 3, "test": 1}, {"train": 2, "test": 1}, broken={"no `prompt`": 2})
    >>> print(report)
    my.jsonl: 6 rows read; train: 3 pairs, 2 users; test: 1 pairs, 1 users
      broken: 2 x no `prompt`
    ```
    """

    source: str
    rows_read: int
    pairs: Mapping[str, int]
    users: Mapping[str, int]
    filtered: Mapping[str, int] = field(default_factory=dict)
    broken: Mapping[str, int] = field(default_factory=dict)
    shared_prompts: int = 0
    places: Mapping[str, str] = field(default_factory=dict)
    variants: str = ""

    def __str__(self) -> str:
        splits = [f"{split}: {pairs} pairs, {self.users[split]} users" for split, pairs in self.pairs.items()]
        lines = [f"{self.source}: {'; '.join([f'{self.rows_read} rows read', *splits])}"]
        for kind, reasons in (("filtered", self.filtered), ("broken", self.broken)):
            lines += [
                f"  {kind}: {count} x {reason}{self._place(reason)}" for reason, count in sorted(reasons.items())
            ]
        if self.shared_prompts:
            lines.append(f"  leakage: {self.shared_prompts} prompts of train occur in another split too")
        if self.variants:
            lines.append(f"  variants: {self.variants}")
        return printable("\n".join(lines), keep="\n")

    def left_out(self) -> str:
        """A sentence on the rows that were left out, if there are any."""
        reasons = [f"{count:,} x {reason}" for reason, count in sorted({**self.filtered, **self.broken}.items())]
        return f"Left out while reading {self.source}: {', '.join(reasons)}." if reasons else ""

    def _place(self, reason: str) -> str:
        return f", first in {self.places[reason]}" if reason in self.places else ""

    def log(self) -> None:
        """Write the report to the log: a warning if something was left out or is wrong with the data."""
        wrong = self.broken or self.filtered or self.shared_prompts or self.variants or 0 in self.pairs.values()
        logger.log(logging.WARNING if wrong else logging.INFO, "%s", self)

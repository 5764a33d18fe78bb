"""An audit as tables to print: aggregates, and users only if asked for."""

from collections.abc import Iterator

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..terminal import printable
from .report import Audit


NUM_TASTES = 3


def audit_table(audit: Audit, list_users: bool = False) -> RenderableType:
    """
    What an audit found, to print with rich. No id of a user unless `list_users`.

    ```python
    rich.print(audit_table(audit))
    ```
    """
    table = Table(show_header=False, box=None)
    for name, value in _rows(audit):
        table.add_row(Text(name, style="bold"), Text(value))
    parts: list[RenderableType] = [table, *(Text(f"note: {note}") for note in audit.notes)]
    if list_users:
        parts.append(_users(audit))
        parts += [Text(f"perhaps one user: {printable(', '.join(map(repr, group)))}") for group in audit.variants]
    return Group(*parts)


def _rows(audit: Audit) -> Iterator[tuple[str, str]]:
    counts = audit.counts
    yield "pairs, users, prompts", f"{counts.num_pairs:,}, {counts.num_users:,}, {counts.num_prompts:,}"
    for name, split in audit.splits.items() if len(audit.splits) > 1 else ():
        yield f"  {name}", f"{split.num_pairs:,}, {split.num_users:,}, {split.num_prompts:,}"
    yield "pairs per user", ", ".join(f"{name} {value:,.0f}" for name, value in counts.pairs_per_user.items())
    yield f"users under {counts.min_pairs} pairs", f"{counts.num_users_with_few_pairs:,}"
    yield "prompts of several users", f"{counts.shared_prompt_rate:.0%}"
    yield from _agreement(audit)
    if audit.leakage is not None:
        yield from _leakage(audit)
    if audit.room is not None:
        yield from _room(audit)
    yield "recommended user model", audit.recommendation.kind
    yield "because", audit.recommendation.reason


def _agreement(audit: Audit) -> Iterator[tuple[str, str]]:
    found = audit.agreement
    judged = f"{found.num_shared:,} of {found.num_comparisons:,} comparisons judged by several users"
    if found.disagreement_rate is None:
        yield "disagreement", f"unknown: {judged}"
        return
    yield (
        "disagreement",
        f"{found.disagreement_rate:.0%} of user pairs; {judged}, {found.num_conflicting:,} in conflict",
    )
    yield "ceiling without users", f"{found.pooled_ceiling:.3f} pair accuracy there, for any rule"
    if found.contradiction_rate is not None:
        yield "users against themselves", f"{found.contradiction_rate:.0%} of repeated judgements"


def _leakage(audit: Audit) -> Iterator[tuple[str, str]]:
    leakage = audit.leakage
    assert leakage is not None
    yield (
        f"shared with {leakage.reference}",
        f"of {leakage.num_other_pairs:,} other pairs: {leakage.same_prompt:,} by prompt, {leakage.same_comparison:,} by "
        f"prompt and answers, {leakage.same_judgement:,} by user too; {leakage.unknown_users:,} unknown users",
    )


def _room(audit: Audit) -> Iterator[tuple[str, str]]:
    room = audit.room
    assert room is not None
    yield "accuracy, one rule", f"{room.pooled_accuracy:.3f}"
    yield "accuracy, a rule per user", f"{room.personal_accuracy:.3f}"
    yield "room for personalization", f"{room.gap:+.3f}, {'evidence' if room.has_evidence else 'no evidence'}"
    low, high = np.quantile(room.shuffled_gaps, [0.025, 0.975])
    yield (
        "  with shuffled ids",
        f"{np.mean(room.shuffled_gaps):+.3f} [{low:+.3f}, {high:+.3f}], p = {room.p_value:.3f}",
    )
    gains = [(user.personal_accuracy or 0) - (user.pooled_accuracy or 0) for user in audit.users]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    yield "users whose own rule is better", f"{better:,}; worse: {worse:,}"
    for kind, accuracy in audit.recommendation.accuracy_by_kind.items():
        yield f"  accuracy, shared as `{kind}`", f"{accuracy:.3f}"
    if not room.has_evidence:
        return
    tastes = [f"{taste.feature.replace('_', ' ')} ({taste.spread:.2f})" for taste in audit.tastes[:NUM_TASTES]]
    yield "users differ most in", f"{', '.join(tastes)}: spread of the share who choose more"


def _users(audit: Audit) -> Table:
    table = Table("user", title="Users")
    for heading in ("pairs", "one rule", "own rule"):
        table.add_column(heading, justify="right")
    for user in audit.users:
        accuracies = [
            "" if value is None else f"{value:.2f}" for value in (user.pooled_accuracy, user.personal_accuracy)
        ]
        table.add_row(Text(printable(user.user_id)), f"{user.num_pairs:,}", *accuracies)
    return table

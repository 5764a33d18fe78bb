"""What a fit of rows came to: for each user the number of answers, the accuracy to expect, and whether that is enough."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ..intervals import Interval
from ..terminal import printable


ENOUGH, NOT_ENOUGH = "fitted", "not enough answers yet"
CLEARS = 0.95  # how probable a gain has to be


@dataclass(frozen=True)
class FittedUser:
    """
    One user whose row was fitted.

    Args:
        user_id (`str`): The user.
        num_pairs (`int`): The number of pairs that the row was fitted to.
        accuracy ([`Interval`]): The share of further pairs that is expected to come out right with the row, and the interval
            in which it lies with a probability of 0.9, if the model is right.
        start_accuracy (`float`): The same with the row that the fit started from: the generic user's for one who joins, the
            user's own for one who is updated.
        probability_of_gain (`float`): How probable it is that the first is higher than the second.
        moved (`bool`): Whether the row is another one than that.
        status (`str`): `"fitted"`, or `"not enough answers yet"`: a gain is not yet as good as certain (0.95).
    """

    user_id: str
    num_pairs: int
    accuracy: Interval
    start_accuracy: float
    probability_of_gain: float
    moved: bool
    status: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class UsersFit:
    """
    What came of [`add_users`] or [`update_users`].

    Args:
        users (`tuple[FittedUser, ...]`): The users, in the order of their rows.
        num_left_out (`int`): The number of pairs that were left out, because their prompt alone fills `max_length`.
        knows_spread (`bool`): Whether known users told in which directions users differ. If not, rows are free offsets with
            an initial spread.
    """

    users: tuple[FittedUser, ...]
    num_left_out: int
    knows_spread: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, for JSON. The ids of users are in `users`."""
        return asdict(self)

    def summary(self) -> str:
        """One sentence, without ids."""
        enough = sum(user.status == ENOUGH for user in self.users)
        mean = sum(user.accuracy.value for user in self.users) / max(len(self.users), 1)
        start = sum(user.start_accuracy for user in self.users) / max(len(self.users), 1)
        return (
            f"{len(self.users)} users: {enough} fitted, {len(self.users) - enough} without enough answers yet; expected "
            f"accuracy {mean:.2f} on average, {start:.2f} before."
        )


def fits_table(users: Sequence[FittedUser], start_name: str) -> Table:
    """A row for each user, for the screen. `start_name` says what the fit started from."""
    table = Table(box=None, pad_edge=False)
    table.add_column("user")
    for heading in ("pairs", "expected accuracy", f"with the {start_name}"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for user in users:
        table.add_row(
            Text(printable(user.user_id)),
            str(user.num_pairs),
            f"{user.accuracy:.2f}",
            f"{user.start_accuracy:.2f}",
            user.status,
        )
    return table

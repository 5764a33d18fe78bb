"""What the processes of a run decide together: one that stopped alone would leave the others waiting for it."""

from accelerate import PartialState
from accelerate.utils import gather_object


def said_by_any(problem: str | None) -> str | None:
    """
    What is wrong in this process, or else in the first one where something is; `None` if all is well in all of them. Every
    process must call it at the same moment.

    ```python
    >>> said_by_any("The disk is full."), said_by_any(None)
    ('The disk is full.', None)
    ```
    """
    if PartialState().num_processes == 1:
        return problem
    others = [other for other in gather_object([problem]) if other is not None]
    return problem or next(iter(others), None)

"""
What the hooks of a model know of the call they are in.

Hooks on a causal LM and on its decoder belong together, and torch hands nothing from one to the next. An attribute of theirs
would be shared by all calls: by other threads, by a call inside a call, and by the call after one that failed. So each call
has a list of its own, where one hook leaves what a later one takes.
"""

import threading
from typing import Any


# Not an attribute of a model or of a hook, as models are copied and pickled together with their hooks; and not a
# `contextvars.ContextVar`, which `torch.compile` cannot trace.
_THREAD = threading.local()


class OwnCalls:
    """
    Added in front of a causal LM's class: hooks that run in a call may [`keep`] something for the hooks after them.

    Python's own stack restores what the call around it has kept, whatever happens inside. (Hooks could not: after a
    `KeyboardInterrupt`, or where another hook fails before them, they do not run.)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = getattr(_THREAD, "kept", None)
        _THREAD.kept = []
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            _THREAD.kept = outer


def in_call() -> bool:
    """Whether this thread is inside the call of a model with [`OwnCalls`]."""
    return getattr(_THREAD, "kept", None) is not None


def keep(owner: object, name: str, value: Any) -> None:
    """
    Leave `value` for later hooks of this call. What was kept under the name before comes back once this is taken.

    Args:
        owner (`object`): The object that the hooks are methods of. Another object does not see the value.
        name (`str`): What the value is.
        value (`Any`): Anything, also `None`, which hides what was kept before.

    Raises:
        `RuntimeError`: if the thread is in no call of a model with [`OwnCalls`].
    """
    if not in_call():
        raise RuntimeError(
            f"{type(owner).__name__} has hooks on a model whose class is not that of `attach_user_model` any more, so a call "
            "has no place for its users. Attach the user model again."
        )
    _THREAD.kept.append((owner, name, value))


def take(owner: object, name: str) -> Any:
    """What a hook of this call kept last and nobody took yet; `None` if there is nothing."""
    kept = getattr(_THREAD, "kept", None) or []
    for i in range(len(kept) - 1, -1, -1):
        if kept[i][0] is owner and kept[i][1] == name:
            return kept.pop(i)[2]
    return None

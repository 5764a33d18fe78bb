"""
Puts a mixin in front of the class of one object, and takes it off again.

The object keeps its type and its name: its class becomes a subclass of the class it had. Others do the same, FSDP2's
`fully_shard` for one, before or after us. So each of our classes remembers the class it replaced.
"""

from functools import cache
from typing import Any

from torch import nn


def add_mixin(module: nn.Module, mixin: type) -> None:
    """Let the methods of `mixin` come first in `module`, and in no other object of its class."""
    module.__class__ = _with_mixin(mixin, module.__class__)  # type: ignore[arg-type]


def remove_mixin(module: nn.Module, mixin: type) -> None:
    """Undo [`add_mixin`], also where another class has been put on top of it since: that one stays."""
    module.__class__ = _without_mixin(mixin, module.__class__)  # type: ignore[arg-type]


@cache
def _with_mixin(mixin: type, cls: Any) -> Any:
    # transformers and PEFT write and compare class names, so the subclass keeps the name of the class
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    ours = {"_replaced": (mixin, cls), "__reduce_ex__": _reduce, "__new__": _new_object}
    return type(cls.__name__, (mixin, cls), {**names, **ours})


@cache
def _without_mixin(mixin: type, cls: Any) -> Any:
    added, replaced = vars(cls).get("_replaced", (None, None))  # of this class, not of one that it inherits from
    if added is mixin:
        return replaced
    if added is not None:
        return _with_mixin(added, _without_mixin(mixin, replaced))
    bases = tuple(
        _without_mixin(mixin, base) if base is not mixin and issubclass(base, mixin) else base
        for base in cls.__bases__
    )
    if bases == cls.__bases__:
        return cls
    return type(cls)(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


def _new_object(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """
    A call of the class, as in `type(model)(config)` or `type(model).from_pretrained(name)`, makes an object of the class that
    ours replaced: what has been added to one object is not in a new one. Copies come without arguments.
    """
    if not args and not kwargs:
        return object.__new__(cls)
    while (ours := next((base for base in cls.__mro__ if "_replaced" in vars(base)), None)) is not None:
        cls = vars(ours)["_replaced"][1]
    return cls(*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> Any:
    """For pickle, which finds a class by its name and would find the class that ours replaced: how to make it anew."""
    mixins, cls = [], type(self)
    while "_replaced" in vars(cls):
        mixin, cls = vars(cls)["_replaced"]
        mixins.append(mixin)
    if not mixins:  # another class is on top
        return object.__reduce_ex__(self, protocol)
    return _new, (cls, *reversed(mixins)), self.__dict__


def _new(cls: Any, *mixins: type) -> Any:
    for mixin in mixins:
        cls = _with_mixin(mixin, cls)
    return cls.__new__(cls)

"""Weights that are cast for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """
    Whatever is cast inside comes back: afterwards each parameter and buffer holds the tensor that it held before, which takes
    the memory of both for that time.

    ```python
    >>> import torch
    >>> model = nn.Linear(2, 2)
    >>> before = model.weight.clone()
    >>> with kept_weights(model):
    ...     _ = model.to(torch.bfloat16)
    >>> model.weight.dtype, torch.equal(model.weight, before)
    (torch.float32, True)
    ```
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)

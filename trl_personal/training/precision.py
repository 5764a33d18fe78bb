"""Weights that are cast for a while, and those that must not be."""

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


def keep_quantized_weights(model: nn.Module) -> None:
    """
    Keep bitsandbytes from repacking 4-bit weights. On CPUs with AVX512-BF16 it does so when a layer is first used without a
    gradient, for good: after an evaluation no gradient would go through, and after a save the weights would be others.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

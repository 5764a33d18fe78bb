"""How many threads a small model takes on this machine, now."""

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn


def fastest_num_threads(rounds: int = 4) -> int:
    """
    The number of threads with which steps like those of a model of half a million parameters take the least time now, out of
    1, 2 and 4 as far as there are cores. More are faster on an idle machine, and several times slower on a busy one, where
    threads wait for each other. Takes about a second; the number of threads that torch uses stays as it was.

    Args:
        rounds (`int`, *optional*, defaults to `4`): How often each number has its turn.
    """
    numbers = [number for number in (1, 2, 4) if number <= (os.cpu_count() or 1)]
    layers = nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.Linear(128, 4096)
    model, rows = nn.Sequential(*layers), torch.randn(1024, 128)
    return fastest(numbers, lambda: model(rows).square().mean().backward(), rounds)


def fastest(numbers: Sequence[int], step: Callable[[], object], rounds: int) -> int:
    """
    The one of these numbers of threads with which `step` takes the least time. They take turns, so that what else the machine
    does falls on all of them.

    ```python
    >>> fastest([1], lambda: None, rounds=4)
    1
    ```
    """
    before, seconds = torch.get_num_threads(), dict.fromkeys(numbers, 0.0)
    try:
        for number in list(numbers) * (rounds if len(numbers) > 1 else 0):
            torch.set_num_threads(number)
            start = time.perf_counter()
            step()
            seconds[number] += time.perf_counter() - start
    finally:
        torch.set_num_threads(before)
    return min(numbers, key=lambda number: seconds[number])

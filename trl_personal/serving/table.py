"""The tables of an export, read row by row. Knows torch and safetensors only, as engines do."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .manifest import EMBEDDINGS_FILE, EMBEDDINGS_NAME, TABLE_FILE, TABLE_NAME


class Table:
    """
    A tensor in a file that is mapped into memory: a row is read when it is asked for.

    Args:
        path (`Path`): The file.
        name (`str`): The name of the tensor in it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._file: Any = safe_open(str(path), framework="pt")
        self._rows: Any = self._file.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._rows.get_shape())

    def __getitem__(self, row: int) -> Tensor:
        """One row, a copy."""
        if not 0 <= row < self.shape[0]:
            raise IndexError(f"There is no row {row} in a table of {self.shape[0]} rows.")
        found: Tensor = self._rows[row : row + 1][0].clone()
        return found

    def rows(self, numbers: list[int]) -> Tensor:
        """Several rows, `(n, ...)`; of no rows, an empty tensor."""
        return torch.stack([self[row] for row in numbers]) if numbers else self._rows[0:0]


def soft_prompt_table(folder: str | Path) -> Table:
    """The soft prompts of all users in an exported folder, `(num_users + 1, num_virtual_tokens, token_dim)`."""
    return Table(Path(folder) / TABLE_FILE, TABLE_NAME)


def token_embedding_table(folder: str | Path) -> Table:
    """What a lookup of each token gives, `(vocab_size, token_dim)`, in a folder that was exported beside its adapter."""
    return Table(Path(folder) / EMBEDDINGS_FILE, EMBEDDINGS_NAME)

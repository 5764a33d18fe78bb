"""A removal that is done whole or not at all: what it will write is prepared, then listed, then put in place."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import read_json, replaced_file, write_atomically


JOURNAL_FOLDER = ".removing-users"  # in the model's folder, while users are removed
LIST_FILE = "list.json"
TEMPORARY = ".removing.tmp"


class Journal:
    """
    The changes of one removal. Until [`commit`] nothing is changed; after it, [`apply`] does the rest, also in another process
    after a kill, and may be done again.

    Args:
        folder (`Path`): The model's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.model = folder
        self.folder = folder / JOURNAL_FOLDER
        self._changes: list[tuple[str, str | None]] = []

    @property
    def is_committed(self) -> bool:
        """Whether a removal was prepared to its end, by this process or an earlier one."""
        return (self.folder / LIST_FILE).is_file()

    def start(self) -> None:
        """Forget what a killed process prepared and did not list."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def place(self, path: Path) -> str:
        """A path as it is listed: relative to the model's folder, which may be moved before a removal is finished."""
        return os.path.relpath(path, self.model)

    def write(self, path: Path, content: bytes | Callable[[Path], None]) -> None:
        """Let a file have another content: its bytes, or what a function writes to the path that it is given."""
        name = str(len(self._changes))
        with replaced_file(self.folder / name) as temporary:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
        self._changes.append((self.place(path), name))

    def delete(self, path: Path) -> None:
        """Let a file be gone."""
        self._changes.append((self.place(path), None))

    def commit(self, note: dict[str, Any]) -> None:
        """List the changes: from here on the removal will be done. `note` is kept for who finishes it."""
        content = {"changes": self._changes, "note": note}
        write_atomically(self.folder / LIST_FILE, json.dumps(content).encode())

    def apply(self) -> dict[str, Any]:
        """Put all changes in place, in their order. Returns the note."""
        content = read_json(self.folder / LIST_FILE)
        changes: Sequence[tuple[str, str | None]] = content["changes"]
        for name, source in changes:
            path = self.model / name
            if source is None:
                path.unlink(missing_ok=True)
                continue
            temporary = path.with_name(path.name + TEMPORARY)
            shutil.copyfile(self.folder / source, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        note: dict[str, Any] = content["note"]
        return note

    def close(self) -> None:
        """Forget the removal, which is done."""
        (self.folder / LIST_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder)

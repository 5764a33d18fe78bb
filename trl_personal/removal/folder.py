"""Takes users out of a model's folder: their rows, optimizer moments, ids, and every trace in any file of it."""

import itertools
import logging
import mmap
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch

from ..files import STAGING_PREFIX, beside, read_json, remove_left_folders, write_atomically
from ..models.carry import read_rows
from ..models.folder_users import load_known_users, write_user_files
from ..models.known_users import KnownUsers
from ..models.saving import USER_MODEL_FOLDER
from ..training.config import PersonalizedDPOConfig
from ..training.run_folder import only_run_in
from ..training.settings import SETTINGS_FILE
from ..user_models.base import CONFIG_FILE, USER_MODELS, WEIGHTS_FILE
from ..users import JOINED_FILE, as_user_id
from .certificate import (
    as_json,
    file_hash,
    files_below,
    make_certificate,
    path_in_certificate,
    salted_hash,
    searched_roots,
    user_entry,
)
from .files import KEPT_FILES, PICTURES, Cleaned, cleaned
from .journal import JOURNAL_FOLDER, Journal
from .optimizer import OPTIMIZER_FILE, SHARDED, optimizer_without_rows
from .traces import LONG, USER_COLUMNS, Traces, masked


LEFT_FILE = re.compile(
    r"\..+\.\d+\.tmp|.+\.removing\.tmp"
)  # as `files.replaced_file` and a removal name what they write
STANDARD_NAME = re.compile(r"user_model|checkpoint-\d+|(adapter_)?model.*|tokenizer.*|vanilla|warmed_up|cache")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """
    What [`remove_from_folder`] did.

    Args:
        certificate (`dict`): The content of the certificate.
        path (`Path`): Where it is.
        salt (`str`): Hexadecimal. With it and an id, one can show that the certificate is about that user; it is kept nowhere.
        digest (`str`): The certificate's. Kept elsewhere, it tells a certificate that was written anew.
        finished (`bool`): Whether an interrupted removal of the same users was brought to its end.
    """

    certificate: dict[str, Any]
    path: Path
    salt: str
    digest: str
    finished: bool = False


def remove_from_folder(
    folder: str | Path,
    user_ids: Iterable[str | int],
    *,
    checkpoints: bool = False,
    also: Iterable[str | Path] = (),
    certificate: str | Path | None = None,
) -> Removal:
    """
    Take users out of the folder of a model and out of `FOLDER-evaluation` beside it, and write a certificate. All is prepared
    first; a process that is killed leaves the old files, or a removal that the next call finishes.

    Args:
        folder (`str` or `Path`): The folder that training wrote.
        user_ids (`list`): The users.
        checkpoints (`bool`, *optional*, defaults to `False`): Whether to take them out of checkpoints in the folder too, with
            their moments in the optimizer.
        also (`list`, *optional*): Other folders and files to search, such as an evaluation elsewhere.
        certificate (`str` or `Path`, *optional*): Where to write the certificate. Defaults to a file beside the folder.

    Raises:
        `ValueError`: before anything is changed: if a user is unknown, if checkpoints know the user and `checkpoints` is off,
        or if a file names the user and cannot be rewritten. `RuntimeError`: if a run is training in the folder.
    """
    folder, ids = Path(folder), [str(as_user_id(user_id)) for user_id in _as_list(user_ids)]
    with only_run_in(folder):
        journal = Journal(folder)
        if journal.is_committed:
            done = _finish(journal)
            if _is_about(done, ids):
                return done
            logger.warning(
                "An interrupted removal of other users was finished first. certificate: %s, digest: %s, salt: %s",
                *(done.path, done.digest, done.salt),
            )
        users, _ = load_known_users(folder)
        users.removed(ids)
        journal.start()
        try:
            note = _Plan(folder, users, ids, checkpoints, list(also)).prepare(journal)
            path = Path(certificate) if certificate else _new_certificate(folder)
            journal.commit(note | {"certificate": str(path.absolute())})
        except BaseException:
            journal.close()
            raise
        return _finish(journal, finished=False)


def _as_list(user_ids: Iterable[str | int]) -> list[str | int]:
    if isinstance(user_ids, (str, bytes)):
        raise TypeError("`user_ids` must be a list of user ids, found a text. Write a single user as a list.")
    return list(user_ids)


def _new_certificate(folder: Path) -> Path:
    """A file beside the folder that there is not yet, with the time in its name."""
    name = f"-removed-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(path for ending in endings if not (path := beside(folder, f"{name}{ending}.json")).exists())


def _is_about(removal: Removal, ids: list[str]) -> bool:
    named = {user["sha256_of_salt_and_id"] for user in removal.certificate["users"]}
    return named == {salted_hash(removal.salt, user_id.encode()) for user_id in ids}


def _finish(journal: Journal, finished: bool = True) -> Removal:
    """Put the changes in place, hash what is there now, write the certificate, and forget the removal."""
    note = journal.apply()
    for entry in note["files"]:
        path = journal.model / entry.pop("place")
        if path.is_file():
            entry["sha256_after"] = file_hash(path)
    for place in sorted(note["new"]):  # files that were not there before
        if (journal.model / place).is_file():
            note["files"].append(
                {"path": note["new"][place], "searched": "written", "action": "new", "sha256_before": None}
                | {"sha256_after": file_hash(journal.model / place)}
            )
    for place in note["emptied"]:
        parent = journal.model / place
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    content = make_certificate(note["users"], note["counts"], note["files"], note["left"])
    path = Path(note["certificate"])
    write_atomically(path, as_json(content))
    journal.close()
    return Removal(content, path, note["salt"], content["digest"], finished)


class _Plan:
    """What a removal is going to do, file by file."""

    def __init__(
        self, folder: Path, users: KnownUsers, ids: list[str], checkpoints: bool, also: list[str | Path]
    ) -> None:
        self.folder, self.users, self.ids = folder, users, ids
        self.roots = searched_roots(folder, also)
        for path in also:
            if not Path(path).exists():
                raise FileNotFoundError(f"There is no {path} to search.")
        self.traces = Traces(ids, users.user_vocab, (*USER_COLUMNS, *_user_column(folder)), words_of_models())
        self.checkpoints = checkpoints
        self.salt = secrets.token_hex(16)
        self.planned: dict[Path, Cleaned] = {}
        self.states: dict[Path, dict[str, Any]] = {}  # of optimizers, without the users
        self.refused: list[str] = []
        self.left: list[str] = []

    def prepare(self, journal: Journal) -> dict[str, Any]:
        """Write to `journal` what is to be changed. Returns what the certificate needs."""
        for root in filter(Path.is_dir, self.roots.values()):
            for inside in {root, *(path.parent for path in root.rglob(f"{STAGING_PREFIX}*"))}:
                remove_left_folders(inside)
        models = self._models_with_the_users()
        for model in models:
            self._plan_model(model)
        for root in self.roots.values():
            for path in files_below(root, [JOURNAL_FOLDER]):
                if path not in self.planned and path.name != ".training.lock":
                    self.planned[path] = self._plan_file(path)
        self._plan_pictures()
        self._tell_what_was_not_opened()
        if self.refused:
            raise ValueError(
                f"These files name a user and cannot be rewritten: {', '.join(sorted(self.refused)[:5])}. Delete them or move "
                "them away, then remove the user again. Nothing has been changed."
            )
        return self._write(journal)

    def _models_with_the_users(self) -> list[Path]:
        """Folders with a `user_model/` that knows one of the users: the model itself, its checkpoints, others inside."""
        found = []
        for root in self.roots.values():
            for path in files_below(root, [JOURNAL_FOLDER]):
                if path.name == CONFIG_FILE and path.parent.name == USER_MODEL_FOLDER:
                    users, _ = load_known_users(path.parent.parent)
                    if any(user_id in users.user_vocab for user_id in self.ids):
                        found.append(path.parent.parent)
        checkpoints = [path for path in found if path != self.folder and path.name.startswith("checkpoint-")]
        if checkpoints and not self.checkpoints:
            raise ValueError(
                f"{len(checkpoints)} checkpoints know the users, such as {checkpoints[0]}. Set `checkpoints` to take the "
                "users out of them too, or delete the checkpoints. Nothing has been changed."
            )
        return found

    def _plan_model(self, model: Path) -> None:
        users, config = load_known_users(model)
        ids = [user_id for user_id in self.ids if user_id in users.user_vocab]
        left = users.removed(ids)
        with tempfile.TemporaryDirectory(prefix="users-") as temporary:
            write_user_files(Path(temporary), left, config)
            written = {path.name: path.read_bytes() for path in Path(temporary).iterdir()}
        for name in sorted(written, key=lambda name: (name == CONFIG_FILE, name)):
            path = model / USER_MODEL_FOLDER / name
            is_same = path.is_file() and path.read_bytes() == written[name]
            self.planned[path] = Cleaned("unchanged" if is_same else "rewritten", "user model", written[name])
        joined = model / USER_MODEL_FOLDER / JOINED_FILE
        if joined.is_file() and JOINED_FILE not in written:
            self.planned[joined] = Cleaned("deleted", "user model")
        sharded = [path for pattern in SHARDED for path in model.glob(pattern)]
        if sharded:
            self.refused.append(f"{model} (optimizer state in shards)")
        optimizer = model / OPTIMIZER_FILE
        if optimizer.is_file():
            state = optimizer_without_rows(optimizer, users.user_model, users.rows_of(ids))
            self.planned[optimizer] = Cleaned("rewritten", "optimizer state")
            self.states[optimizer] = state

    def _plan_file(self, path: Path) -> Cleaned:
        if LEFT_FILE.fullmatch(path.name):
            return Cleaned("deleted", "left by a killed process")
        name = path.relative_to(next(root for root in self.roots.values() if path.is_relative_to(root))).as_posix()
        if path.suffix == ".safetensors" and (exported := self._plan_export(path)) is not None:
            return exported
        named = [part for part in PurePath(name).parts if self.traces.in_text(part)]
        if named:
            is_of_a_model = any(part in KEPT_FILES or STANDARD_NAME.fullmatch(part) for part in named)
            return Cleaned("left" if is_of_a_model else "deleted", "name of the file")
        with _content(path) as data:
            found = cleaned(path.name, data, self.traces)
        if found.action == "refused":
            self.refused.append(str(path))
        return found

    def _plan_export(self, path: Path) -> Cleaned | None:
        """A file of exported users, without those who are removed; `None` for any other file."""
        try:
            content, rows = read_rows(path)
        except ValueError:
            return None
        kept = [number for number, user_id in enumerate(content["users"]) if user_id not in self.ids]
        if len(kept) == len(content["users"]):
            return Cleaned("unchanged", "exported users")
        if kept:
            self.refused.append(f"{path} (exported users)")
            return Cleaned("refused", "exported users")
        return Cleaned("deleted", "exported users")

    def _plan_pictures(self) -> None:
        """Pictures in a folder in which another file names the user may show the id: they are deleted."""
        named = {
            path.parent
            for path, found in self.planned.items()
            if found.action in ("rewritten", "deleted") and found.how not in ("user model", "optimizer state")
        }
        for path in self.planned:
            if path.suffix.lower() in PICTURES and path.parent in named:
                self.planned[path] = Cleaned("deleted", "a picture beside files that name the user")

    def _tell_what_was_not_opened(self) -> None:
        """Links, version histories and formats that nothing here reads: named in the certificate, by their number."""
        links = [path for root in self.roots.values() for path in root.rglob("*") if path.is_symlink()]
        of_users = [path for path in links if USER_MODEL_FOLDER in path.parts or path.name == OPTIMIZER_FILE]
        self.refused += [f"{path} (a link: what it points to would stay)" for path in of_users]
        closed = sum("opened" in found.how for found in self.planned.values())
        histories = sum(path.is_dir() for root in self.roots.values() for path in root.rglob(".git"))
        for number, what in (
            (len(links), "links were not followed."),
            (closed, "files could not be opened, and were searched by their bytes only."),
            (histories, "version histories (`.git`) keep earlier files, which were not searched."),
        ):
            if number:
                self.left.append(f"{number} {what}")

    def _write(self, journal: Journal) -> dict[str, Any]:
        files, new = [], {}
        for name, root in self.roots.items():
            for path, found in self.planned.items():
                if path != root and not path.is_relative_to(root):
                    continue
                label = path_in_certificate(name, root, path)
                if found.action == "deleted":  # names of other files are in the folder as well
                    label = masked(label, self.ids)
                if not path.exists():
                    new[journal.place(path)] = label
                    continue
                changed = found.action in ("rewritten", "deleted")
                files.append(
                    {"path": label, "searched": found.how, "action": found.action}
                    | {"sha256_before": file_hash(path, self.salt if changed else ""), "sha256_after": None}
                    | {"place": journal.place(path)}
                )
                if found.action == "left":
                    self.left.append(f"The text of an id stands in {label}, perhaps as another word. Look there.")
        for path, found in self.planned.items():
            if path in self.states:
                journal.write(path, partial(torch.save, self.states[path]))
            elif found.action == "rewritten" and found.data is not None:
                journal.write(path, found.data)
            elif found.action == "deleted":
                journal.delete(path)
        if not all(map(self.traces.is_long, self.ids)):
            self.left.append(
                f"Ids of fewer than {LONG} characters, or a part of a setting's name, were looked for where users are named "
                "(columns, lists and objects of users); in other text they cannot be told from words."
            )
        pictures = sum(
            path.suffix.lower() in PICTURES and found.action == "unchanged" for path, found in self.planned.items()
        )
        if pictures:
            self.left.append(f"{pictures} pictures were not looked at; no file beside them names the users.")
        emptied = {path.parent for path, found in self.planned.items() if found.action == "deleted"}
        return {
            "users": [user_entry(user_id, self.users.origin(user_id), self.salt) for user_id in self.ids],
            "counts": {
                "num_users_before": len(self.users.user_vocab),
                "num_users_after": len(self.users.user_vocab) - len(self.ids),
            },
            "files": files,
            "new": new,
            "left": self.left,
            "salt": self.salt,
            "emptied": [journal.place(path) for path in sorted(emptied, key=lambda path: -len(path.parts))],
        }


@contextmanager
def _content(path: Path) -> Any:
    """The bytes of a file, read as they are needed."""
    if path.stat().st_size == 0:
        yield b""
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def words_of_models() -> set[str]:
    """Names that stand in the files of any trained model: settings, kinds of user models, files."""
    settings = {field.name for field in fields(PersonalizedDPOConfig)}
    return settings | set(USER_MODELS) | KEPT_FILES | {USER_MODEL_FOLDER, CONFIG_FILE, WEIGHTS_FILE, "validation"}


def _user_column(folder: Path) -> list[str]:
    """The column with user ids in the data that the model was trained on, if the settings of the training say so."""
    path = folder / SETTINGS_FILE
    settings: Mapping[str, Any] = read_json(path).get("settings") or {} if path.is_file() else {}
    name = settings.get("user_id_column")
    return [name] if isinstance(name, str) else []

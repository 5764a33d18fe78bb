"""Files that are either the old ones or the new ones, never half of each."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock, Timeout


SAMPLE_BYTES = 1 << 20  # one block of a weight file that goes into its fingerprint
NUM_SAMPLES = 64  # blocks per file; smaller files are read whole
STAGING_PREFIX = ".saving-"
SECONDS_UNTIL_LOCKED = 60
STAGING_LOCK = ".writing"  # in a staging folder, locked while a process writes there
EVALUATION_ENDING = "-evaluation"  # of the folder beside a model's that evaluation writes to: it holds ids of users
LM_WEIGHT_FILES = ("model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`. On leaving, what was written there is flushed to the disk and replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name beside `path`, flush it to the disk, then rename it to `path`."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(content)


def checkpoints_newest_first(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of transformers, highest N first."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


@contextmanager
def staged_folder(target: Path, last: str) -> Iterator[Path]:
    """
    A folder inside `target` to write in. On leaving it, each file replaces its namesake in `target`, the file named
    `last` after all others; on an error nothing is replaced. What a killed process has left is removed, and nothing of one
    that is still writing.
    """
    target.mkdir(parents=True, exist_ok=True)
    remove_left_folders(target)
    staging = Path(mkdtemp(prefix=STAGING_PREFIX, dir=target))
    lock = FileLock(staging / STAGING_LOCK)
    lock.acquire()
    try:
        yield staging
        files = (path for path in staging.rglob("*") if path.is_file() and path.name != STAGING_LOCK)
        for source in sorted(files, key=lambda path: (path.name == last, str(path))):
            destination = target / source.relative_to(staging)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def remove_left_folders(target: Path) -> None:
    """Remove the folders of [`staged_folder`] that killed processes have left in `target`."""
    for folder in target.glob(f"{STAGING_PREFIX}*"):
        _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a staging folder whose process is gone: a lock ends with the process that holds it."""
    lock = FileLock(folder / STAGING_LOCK, timeout=0)
    try:
        is_new = not (folder / STAGING_LOCK).exists() and time.time() - folder.stat().st_mtime < SECONDS_UNTIL_LOCKED
        if is_new:  # made a moment ago, its lock comes next
            return
        with lock:
            shutil.rmtree(folder, ignore_errors=True)
    except (Timeout, OSError):  # somebody writes there, or has just removed it
        return


def beside(folder: str | Path, ending: str) -> Path:
    """
    A path beside a folder, named after it: what is about a model and must not be uploaded with it. For a repository on the
    hub, `owner/name`, it is in the working directory.

    ```python
    >>> beside("/runs/out/", "-evaluation").as_posix(), beside("owner/name", "-evaluation").as_posix()
    ('/runs/out-evaluation', 'name-evaluation')
    ```
    """
    path = Path(folder)
    if not path.is_dir() and not path.is_absolute() and len(path.parts) == 2 and path.parts[0] != "..":
        return Path(path.name + ending)
    name = path.name if path.name not in ("", "..") else path.resolve().name
    parent = path.parent if path.name not in ("", "..") else path.resolve().parent
    return parent / f"{name}{ending}"


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in `path`.

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: if it is cut off, or not a JSON object, or if it holds
        NaN or infinity, which JSON does not have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
    try:
        values = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}). The file is cut off, or is not JSON.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}.")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name occur twice, and Python keeps the last value in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{len(pairs) - len(values)} names occur twice in one object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def weight_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that hold weights of a language model or an adapter, or say which file holds which."""
    return {path.name for pattern in LM_WEIGHT_FILES for path in folder.glob(pattern)}


def fingerprint(path: Path) -> str:
    """
    SHA-256 of a file of weights.

    A file over 64 MiB counts by its size and 64 blocks of 1 MiB spread over it: any training step moves those too, and a
    checkpoint of billions of parameters is checked in a second.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= SAMPLE_BYTES * NUM_SAMPLES:
            digest.update(file.read())
        else:
            for sample in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def json_fingerprint(values: Mapping[str, Any]) -> str:
    """
    SHA-256 of what a JSON object says, however it is laid out.

    ```python
    >>> json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": [2], "a": 1})
    True
    ```
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def fingerprint_once(path: Path) -> str:
    """[`fingerprint`], computed once for a file that stays as it is: a base model beside each checkpoint of its adapter."""
    status = path.stat()
    return _fingerprint_of_unchanged(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _fingerprint_of_unchanged(path: Path, size: int, modified: int) -> str:
    return fingerprint(path)

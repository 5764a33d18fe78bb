"""
API keys in a file: hashed, each with the users that it may speak for. `python -m trl_personal.serving.keys FILE --name app`
makes one and shows it this once.

A key has 256 random bits, so that a salted SHA-256 says nothing about it. (Slow hashes are for passwords, which are guessed.)
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically


logger = logging.getLogger(__name__)

PREFIX = "tp"
SHORTEST_NAME, LONGEST_NAME = 1, 64


@dataclass(frozen=True)
class Key:
    """
    What the file has of a key.

    Args:
        name (`str`): What people call it; it is part of the key itself, and stands in no log.
        salt (`str`): Hexadecimal.
        digest (`str`): SHA-256 of salt and secret, hexadecimal.
        users (`list[str]`, *optional*): The users whom requests with this key may name; `None` for all, also those to come.
            The generic user needs no right.
        is_admin (`bool`, *optional*, defaults to `False`): Whether it may let users join, update, remove and export them.
    """

    name: str
    salt: str
    digest: str
    users: list[str] | None = None
    is_admin: bool = False

    def may_speak_for(self, user_id: str) -> bool:
        """Whether requests with this key may name the user."""
        return self.users is None or user_id in self.users


ANYBODY = Key("", "", "")  # where there are no keys: every user, and nothing of an administrator


def make_key(name: str, users: Sequence[str] | None = None, is_admin: bool = False) -> tuple[str, Key]:
    """
    A new key, as clients send it, and what the file has of it.

    ```python
    >>> secret, key = make_key("app", ["ann"])
    >>> secret.split("_")[:2], key.may_speak_for("ann"), key.may_speak_for("bo")
    (['tp', 'app'], True, False)
    ```

    Raises:
        `ValueError`: for a name with anything but letters, digits and hyphens, or of more than 64.
    """
    plain = name.replace("-", "")
    if not SHORTEST_NAME <= len(name) <= LONGEST_NAME or not (plain.isascii() and plain.isalnum()):
        raise ValueError(f"The name of a key has 1 to {LONGEST_NAME} letters, digits and hyphens, got {name!r}.")
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    digest = _digest(salt, secret)
    return f"{PREFIX}_{name}_{secret}", Key(name, salt, digest, None if users is None else list(users), is_admin)


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()


class KeyFile:
    """
    The keys in a file, `{"keys": [{"name", "salt", "digest", "users", "is_admin"}, ...]}`. It is read again when it has
    changed, so that keys come and go while a server runs.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is none, or it is not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._status: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}
        if not self.path.is_file():
            raise FileNotFoundError(
                f"There is no {self.path.name} in {self.path.parent}. Make it with `trl-personal key`."
            )
        self._read_if_changed()

    def find(self, token: str) -> Key | None:
        """The key that a client has sent; `None` if it is not one of those in the file."""
        self._read_if_changed()
        prefix, _, rest = token.partition("_")
        name, _, secret = rest.partition("_")
        key = self._keys.get(name)
        if prefix != PREFIX or key is None or not secret:
            return None
        found = _digest(key.salt, secret)
        return key if hmac.compare_digest(found.encode(), key.digest.encode()) else None

    def find_in_header(self, authorization: str) -> Key | None:
        """The key in an `Authorization` header, `Bearer KEY`; `None` if there is none that is in the file."""
        scheme, _, token = authorization.partition(" ")
        return self.find(token.strip()) if scheme.lower() == "bearer" else None

    def _read_if_changed(self) -> None:
        try:
            found = os.stat(self.path)
            status = (found.st_mtime_ns, found.st_size, found.st_ino)
            if status != self._status:
                self._keys = read_keys(self.path)
                self._status = status
        except (OSError, ValueError):
            if self._status is None:
                raise
            logger.error("The file of keys cannot be read any more. The keys that were in it before still hold.")


def read_keys(path: Path) -> dict[str, Key]:
    """
    The keys in a file by their names.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is none, or it is not a file of keys.
    """
    values = read_json(path)
    try:
        keys = [Key(**entry) for entry in values["keys"]]
        for key in keys:
            _check(key)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of keys ({error}). Make one with `trl-personal key`.") from error
    if len({key.name for key in keys}) < len(keys):
        raise ValueError(f"{path} has two keys of one name. Take one of them out.")
    return {key.name: key for key in keys}


def _check(key: Key) -> None:
    texts: list[Any] = [key.name, key.salt, key.digest, *(key.users or [])]
    is_list = key.users is None or isinstance(key.users, list)
    if not is_list or not all(isinstance(text, str) for text in texts) or not isinstance(key.is_admin, bool):
        raise ValueError("a key has a name, salt and digest as text, a list of users or null, and true or false")
    if len(bytes.fromhex(key.salt)) < 16 or len(bytes.fromhex(key.digest)) != 32:
        raise ValueError("a salt or digest is too short")


def add_key(path: Path, name: str, users: Sequence[str] | None, is_admin: bool = False) -> str:
    """
    Make a key and add it to a file, which only its owner can read. Returns the key, which is nowhere else.

    Raises:
        `ValueError`: if the file has a key of that name.
    """
    keys = read_keys(path) if path.exists() else {}
    if name in keys:
        raise ValueError(f"{path} has a key {name!r} already. Take another name, or take that key out of the file.")
    secret, key = make_key(name, users, is_admin)
    entries = [asdict(entry) for entry in [*keys.values(), key]]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch(mode=0o600)
    mode = path.stat().st_mode & 0o777
    write_atomically(path, (json.dumps({"keys": entries}, indent=2, ensure_ascii=False) + "\n").encode())
    path.chmod(mode)
    return secret


def make_key_parser(prog: str) -> ArgumentParser:
    """The options of the command that makes keys."""
    parser = ArgumentParser(
        prog=prog,
        description="Make an API key for `trl-personal serve`, add its hash to a file, and show the key this once.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="file of keys; it is made if there is none")
    parser.add_argument("--name", required=True, help="a name for the key: letters, digits and hyphens")
    users = parser.add_mutually_exclusive_group(required=True)
    users.add_argument("--users", nargs="*", metavar="ID", help="the users that requests with the key may name")
    users.add_argument("--all_users", action="store_true", help="they may name every user, also those to come")
    parser.add_argument(
        "--admin", action="store_true", help="the key may let users join, update, remove and export them"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run_key(arguments: Any) -> None:
    """Make the key that the arguments describe, and write it to the standard output."""
    users = None if arguments.all_users else arguments.users
    sys.stdout.write(add_key(arguments.file, arguments.name, users, arguments.admin) + "\n")


if __name__ == "__main__":
    run_key(make_key_parser("python -m trl_personal.serving.keys").parse_args())

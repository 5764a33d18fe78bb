"""The certificate of a removal: what was searched, what was changed, and what a removal can and cannot do."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .._version import __version__
from ..files import EVALUATION_ENDING, beside, json_fingerprint, read_json
from ..users import as_user_id


FORMAT_VERSION = 1
ABOUT = (
    "What `trl-personal users remove` did to a folder. Users are named by the SHA-256 of a random salt and their id; the salt "
    "is not in this file. Hashes of files that are unchanged or new are their SHA-256; those of files that were changed or "
    "deleted begin with the salt, as the hash of a list of users would let others guess who was in it. `digest` is the "
    "SHA-256 of everything else in this file. There is no signature: whoever can write the file can write another digest, so "
    "keep the digest that was printed elsewhere."
)
CANNOT_UNDO = {
    "trained": "was part of the shared training: the language model, the shared weights of the user model, the generic user "
    "and the rows of others have learned from this user's pairs too, and no removal of a row undoes that. Only training anew "
    "without these pairs does.",
    "joined": "joined after the shared training, and only the removed row was fitted to this user's pairs. Nothing of them is "
    "left in what was searched, unless another user was fitted beside this one later.",
    "copied": "had a copy of another user's row, and is gone with it. What was learned from that other user is where it was.",
}
ALWAYS_LEFT = (
    "Copies elsewhere (uploads, backups, exported files, caches of data sets, free space of the disk) were not searched.",
    "Means over users in evaluations and logs, and numbers of users, were not computed anew.",
    "Rows of other users, the shared weights and the language model were not changed.",
)


def salted_hash(salt: str, content: bytes) -> str:
    """SHA-256 of a salt (hexadecimal) and what follows it."""
    return hashlib.sha256(bytes.fromhex(salt) + content).hexdigest()


def file_hash(path: Path, salt: str = "") -> str:
    """SHA-256 of a file, after a salt (hexadecimal) if there is one."""
    digest = hashlib.sha256(bytes.fromhex(salt))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def user_entry(user_id: str, origin: str, salt: str) -> dict[str, str]:
    """How a certificate names a user, and what the removal means."""
    return {
        "sha256_of_salt_and_id": salted_hash(salt, user_id.encode()),
        "origin": origin,
        "means": f"This user {CANNOT_UNDO[origin]}",
    }


def make_certificate(
    users: Sequence[Mapping[str, str]],
    counts: Mapping[str, int],
    files: Sequence[Mapping[str, Any]],
    left: Sequence[str],
) -> dict[str, Any]:
    """
    The content of a certificate.

    Args:
        users (`list[dict]`): A [`user_entry`] for each removed user.
        counts (`dict[str, int]`): The numbers of users before and after.
        files (`list[dict]`): For each file its `path`, how it was `searched`, the `action` and its hashes before and after.
        left (`list[str]`): What was found or could not be searched, and was left as it is.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "about": ABOUT,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "trl_personal": __version__,
        "users": list(users),
        **counts,
        "left": [*left, *ALWAYS_LEFT],
        "files": list(files),
    }
    return content | {"digest": json_fingerprint(content)}


def searched_roots(folder: Path, also: Iterable[str | Path] = ()) -> dict[str, Path]:
    """The folders and files that belong to a removal, by the first part of their paths in a certificate."""
    roots = {"model": folder, "evaluation": beside(folder, EVALUATION_ENDING)}
    roots |= {f"also_{number}": Path(path) for number, path in enumerate(also, start=1)}
    return {name: path for name, path in roots.items() if path.exists()}


def files_below(root: Path, leave_out: Sequence[str] = ()) -> Iterator[Path]:
    """All files of a folder, or the file itself, without links; folders named in `leave_out` are passed over."""
    if root.is_file():
        yield root
        return
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and not set(leave_out) & set(path.relative_to(root).parts):
            yield path


def path_in_certificate(name: str, root: Path, path: Path) -> str:
    """`model/user_model/users.json`, whatever the folder is called."""
    return name if path == root else f"{name}/{path.relative_to(root).as_posix()}"


def verify_certificate(
    path: str | Path,
    folder: str | Path,
    *,
    also: Iterable[str | Path] = (),
    digest: str | None = None,
    user_id: str | int | None = None,
    salt: str | None = None,
) -> dict[str, Any]:
    """
    Check that a certificate is whole, and that the folder is as it was after the removal. Returns its content.

    Without `digest` this finds damage and careless edits only: there is no key, and whoever writes a certificate anew can
    write its digest too.

    Args:
        path (`str` or `Path`): The certificate.
        folder (`str` or `Path`): The folder of the model.
        also (`list`, *optional*): The other folders and files that were searched, in the same order.
        digest (`str`, *optional*): The digest that the removal returned, kept elsewhere.
        user_id (`str` or `int`, *optional*): A user whom the certificate must be about; needs `salt`.
        salt (`str`, *optional*): The salt that the removal returned.

    Raises:
        `FileNotFoundError`: without a certificate. `ValueError`: if it was changed, if a file is missing, new or another one,
        or if it is not about the user.
    """
    content = read_json(Path(path))
    said = content.get("digest")
    found = json_fingerprint({name: value for name, value in content.items() if name != "digest"})
    if content.get("format_version") != FORMAT_VERSION or not isinstance(content.get("files"), list):
        raise ValueError(f"{path} is no certificate of this version of trl_personal.")
    if said != found:
        raise ValueError(f"{path} was changed after it was written: its digest is {found}, it says {said!r:.80}.")
    if digest is not None and digest != found:
        raise ValueError(f"{path} is not the certificate that was written: its digest is {found}, yours {digest:.80}.")
    if (user_id is None) != (salt is None):
        raise ValueError("Give `user_id` and `salt` together: the certificate names users by a hash of both.")
    if salt is not None:
        name = salted_hash(salt, str(as_user_id(user_id)).encode())
        if name not in {user.get("sha256_of_salt_and_id") for user in content["users"]}:
            raise ValueError(f"{path} is not about this user, or the salt is that of another certificate.")
    _check_files(Path(path), content["files"], searched_roots(Path(folder), also))
    return content


def _check_files(certificate: Path, files: Sequence[Mapping[str, Any]], roots: Mapping[str, Path]) -> None:
    expected = {entry["path"]: entry["sha256_after"] for entry in files if entry["sha256_after"] is not None}
    names = {entry["path"].split("/", 1)[0] for entry in files}
    found = {
        path_in_certificate(name, root, path): path
        for name, root in roots.items()
        if name in names
        for path in files_below(root)
        if path.resolve() != certificate.resolve()
    }
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} is new" for name in sorted(found.keys() - expected)]
    problems += [
        f"{name} is another" for name in sorted(found.keys() & expected) if file_hash(found[name]) != expected[name]
    ]
    if problems:
        raise ValueError(
            f"The folder is not as {certificate} says: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. It was changed since, which may be right."
        )


def as_json(content: Mapping[str, Any]) -> bytes:
    """A certificate as it is written."""
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()

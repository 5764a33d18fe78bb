"""Users' rows in a file of their own, which a model with the same shared parts can take in."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import write_atomically
from ..user_models import UserModel
from ..users import GENERIC_USER_INDEX, as_user_id
from .folder_checks import BASE_FILES_ENTRY, LM_FILES_ENTRY
from .joined import check_facts
from .known_users import KnownUsers


METADATA = "trl_personal_users"  # the one entry in the metadata of the file: several are written in any order
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SharedParts:
    """
    What a row was fitted beside: with other shared parts, the same numbers would be another taste.

    Args:
        kind (`str`): The kind of user model.
        sizes (`dict`): The entries of its config, without the number of users.
        user_model (`str`): SHA-256 of its shared weights and the generic user's rows.
        language_model_files, base_model_files (`dict[str, str]`): Fingerprints of the files of the language model (or
            adapter), and of an adapter's base model, as the user model's config has them.
        bos_token_id (`int`, *optional*): The token after which the soft prompt goes.
    """

    kind: str
    sizes: dict[str, Any]
    user_model: str
    language_model_files: dict[str, str]
    base_model_files: dict[str, str]
    bos_token_id: int | None

    @classmethod
    def of(cls, user_model: UserModel, config: Mapping[str, Any]) -> "SharedParts":
        """Those of a user model, beside the language model whose fingerprints are in `config`, the user model's file."""
        sizes = asdict(user_model.config)
        del sizes["num_users"]
        return cls(
            user_model.kind,
            sizes,
            shared_fingerprint(user_model),
            dict(config.get(LM_FILES_ENTRY) or {}),
            dict(config.get(BASE_FILES_ENTRY) or {}),
            config.get("bos_token_id"),
        )

    def differences(self, other: "SharedParts") -> list[str]:
        """What is not the same in `other`, in words. Files of a base model count if both know them."""
        found = []
        if self.kind != other.kind:
            found.append(f"the kind ({self.kind!r}, here {other.kind!r})")
        for name in sorted(self.sizes.keys() | other.sizes.keys()):
            if self.sizes.get(name) != other.sizes.get(name):
                found.append(f"`{name}` ({self.sizes.get(name)}, here {other.sizes.get(name)})")
        if not found and self.user_model != other.user_model:
            found.append("the user model's shared weights")
        mine, theirs = self.language_model_files, other.language_model_files
        found += [
            f"{name} of the language model"
            for name in sorted(mine.keys() | theirs)
            if mine.get(name) != theirs.get(name)
        ]
        base, other_base = self.base_model_files, other.base_model_files
        found += [
            f"{name} of the base model" for name in sorted(base.keys() & other_base) if base[name] != other_base[name]
        ]
        if self.bos_token_id != other.bos_token_id:
            found.append(f"`bos_token_id` ({self.bos_token_id}, here {other.bos_token_id})")
        return found


@torch.no_grad()
def shared_fingerprint(user_model: UserModel) -> str:
    """SHA-256 of the weights of a user model that are nobody's: all but the rows of users."""
    tables = {f"{name}.weight" for name in user_model.row_tables()}
    digest = hashlib.sha256()
    for name, tensor in sorted(user_model.state_dict().items()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        shared = whole[GENERIC_USER_INDEX] if name in tables else whole
        digest.update(f"{name} {tuple(shared.shape)}".encode())
        digest.update(shared.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_rows(users: KnownUsers, user_ids: Iterable[str | int], shared: SharedParts, path: str | Path) -> None:
    """
    Write the rows of some users to a safetensors file: a tensor `(n, width)`, float32, for each table of the user model, and
    in its metadata the ids, what is known of how the users came in, and the [`SharedParts`].

    Raises:
        `ValueError`: if a user is unknown.
    """
    rows = users.rows_of(ids := list(user_ids))
    content = {
        "format_version": FORMAT_VERSION,
        "users": {str(as_user_id(user_id)): _facts_to_carry(users, str(as_user_id(user_id))) for user_id in ids},
        "shared": asdict(shared),
    }
    metadata = {METADATA: json.dumps(content, ensure_ascii=False)}
    write_atomically(
        Path(path), save({k: v.contiguous() for k, v in users.user_model.get_rows(rows).items()}, metadata)
    )


def import_rows(
    users: KnownUsers, shared: SharedParts, path: str | Path, new_id: str | int | None = None, overwrite: bool = False
) -> tuple[KnownUsers, list[str]]:
    """
    `users` with those of a file that [`export_rows`] wrote, and the ids of these. Who is new comes behind the others.

    Args:
        users ([`KnownUsers`]): The users of the model.
        shared ([`SharedParts`]): Those of the model, which must be those in the file.
        path (`str` or `Path`): The file.
        new_id (`str` or `int`, *optional*): Another id, for a file with one user.
        overwrite (`bool`): Whether users who are known get the rows of the file in place of theirs.

    Raises:
        `FileNotFoundError`: without a file. `ValueError`: if it is damaged or of something else, if the shared parts differ,
        or if a user is known already.
    """
    content, rows = read_rows(path)
    if differences := SharedParts(**content["shared"]).differences(shared):
        raise ValueError(
            f"The rows in {path} were fitted beside other shared parts than this model's, and would be another taste here. "
            f"What differs: {'; '.join(differences)}. Import them where they were exported, or let the users join anew."
        )
    joined: dict[str, Any] = content["users"]
    if new_id is not None:
        if len(joined) != 1:
            raise ValueError(f"`new_id` is for a file with one user; {path} has {len(joined)}.")
        joined = {str(as_user_id(new_id)): next(iter(joined.values()))}
    known = [user_id for user_id in joined if user_id in users.user_vocab]
    if known and not overwrite:
        raise ValueError(
            f"The model has {known[:5]} already. Import with `overwrite` to replace their rows, or give the user in the "
            "file another id with `new_id`."
        )
    place = {user_id: number for number, user_id in enumerate(joined)}
    new = [user_id for user_id in joined if user_id not in users.user_vocab]
    users = users.added({user_id: joined[user_id] for user_id in new}, _of(rows, [place[user_id] for user_id in new]))
    if known:
        user_model = users.user_model if new else users.user_model.resize(users.user_model.config.num_users)
        user_model.set_rows(users.rows_of(known), _of(rows, [place[user_id] for user_id in known]))
        facts = {user_id: check_facts(joined[user_id]) for user_id in known if users.origin(user_id) != "trained"}
        users = KnownUsers(user_model, users.user_vocab, {**users.joined, **facts})
    return users, list(joined)


def read_rows(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    What a file of users says, `{"format_version", "users", "shared"}`, and its rows by the names of tables.

    Raises:
        `FileNotFoundError`: if it is missing. `ValueError`: if it is cut off, of something else, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            names = file.keys() if content else ()  # those of a language model are large
            rows = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). The file is cut off, or is not safetensors.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise ValueError(
            f"{path} holds no users: `trl-personal users export` and `model.export_users` write such files."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this version of trl_personal reads up to {FORMAT_VERSION}."
        )
    try:
        content["users"] = {as_user_id(user_id): check_facts(facts) for user_id, facts in content["users"].items()}
        SharedParts(**content["shared"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: its metadata lack something ({error!r:.200}). Export it again."
        ) from error
    if any(len(tensor) != len(content["users"]) for tensor in rows.values()):
        raise ValueError(f"{path} is damaged: it names {len(content['users'])} users and has other numbers of rows.")
    return content, rows


def _facts_to_carry(users: KnownUsers, user_id: str) -> dict[str, Any]:
    """How the user came in, without another user's id: a copy was part of the training if the one it was copied from was."""
    facts = dict(users.joined.get(user_id, {}))
    source = facts.pop("copied_from", user_id)
    return check_facts(facts | ({"in_training": True} if users.origin(source) == "trained" else {}))


def _of(rows: Mapping[str, Tensor], places: list[int]) -> dict[str, Tensor]:
    return {name: tensor[places] for name, tensor in rows.items()}

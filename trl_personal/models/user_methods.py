"""Methods of a model with users: how users come and go in memory. On disk the folder changes when the model is saved."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .carry import SharedParts, export_rows, import_rows
from .known_users import KnownUsers, known_users, set_known_users
from .saving import saved_language_model


class PersonalizedUsers:
    """
    Added in front of a causal LM's class by [`attach_user_model`]. The language model and the rows of other users stay as
    they are, to the last bit. An optimizer that holds the user model's parameters does not follow: change users outside of
    training.
    """

    def remove_users(self, user_ids: Iterable[str | int]) -> None:
        """
        Take users out: their rows, their ids, and how they came in. Users behind them move up. Files that were written before,
        and what shared parts learned from them in training, stay: `trl-personal users remove` cleans a folder.

        Raises:
            `ValueError`: if a user is unknown, or if another has a copy of the row.
        """
        self._set_users(self._users().removed(user_ids))

    def rename_users(self, new_ids: Mapping[str | int, str | int]) -> None:
        """
        Give users other ids: the new one by the old one.

        Raises:
            `ValueError`: if an old id is unknown, or a new one that of another user.
        """
        self._set_users(self._users().renamed(new_ids))

    def copy_users(self, new_ids: Mapping[str | int, str | int]) -> None:
        """
        Add users with copies of the rows of others: the id of the copy by the id of the user copied.

        Raises:
            `ValueError`: if a user is unknown, or a new id known.
        """
        users = self._users()
        for user_id, new_id in new_ids.items():
            users = users.copied(user_id, new_id)
        self._set_users(users)

    def export_users(self, user_ids: Iterable[str | int], path: str | Path) -> None:
        """
        Write the rows of users to a safetensors file, with fingerprints of the shared parts that they were fitted beside.

        Raises:
            `ValueError`: if a user is unknown, or if the language model is not as it was loaded or saved last, so that there
            are no fingerprints of it.
        """
        users = self._users()
        export_rows(users, user_ids, self._shared_parts(users), path)

    def import_users(self, path: str | Path, new_id: str | int | None = None, overwrite: bool = False) -> list[str]:
        """
        Take in the users of a file that [`export_users`] wrote. Returns their ids.

        Args:
            path (`str` or `Path`): The file.
            new_id (`str` or `int`, *optional*): Another id, for a file with one user.
            overwrite (`bool`, *optional*, defaults to `False`): Whether users who are known get these rows in place of theirs.

        Raises:
            `ValueError`: if the shared parts are others than those in the file, or if a user is known already.
        """
        before = self._users()
        users, imported = import_rows(before, self._shared_parts(before), path, new_id, overwrite)
        self._set_users(users)
        return imported

    def _users(self) -> KnownUsers:
        return known_users(self)  # type: ignore[arg-type]

    def _set_users(self, users: KnownUsers) -> None:
        set_known_users(self, users)  # type: ignore[arg-type]

    def _shared_parts(self, users: KnownUsers) -> SharedParts:
        model: Any = self
        config = saved_language_model(model) | {"bos_token_id": model._soft_prompt_insertion.bos_token_id}
        return SharedParts.of(users.user_model, config)

"""The users of a model as one thing that can be changed: their rows, their ids, and how they came in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..user_models import UserModel
from ..users import GENERIC_USER_INDEX, UserVocab, as_user_id, check_user_ids
from .joined import check_facts
from .saving import get_base_model


@dataclass(frozen=True)
class KnownUsers:
    """
    The users of a model. Nothing is changed in place: each method returns other users, with the same shared parameters.

    Args:
        user_model ([`UserModel`]): Has a row for each user.
        user_vocab ([`UserVocab`]): Says whose row is which.
        joined (`Mapping`): For each user who came after the shared training what is known of that: `num_pairs` (`int`) the row
            was fitted to, `copied_from` (`str`) whose row it was, and `in_training` (`bool`) if the person was part of the
            shared training all the same, as after an export and an import. Users who are not in it were part of it.

    ```python
    >>> from trl_personal import IndividualUserModel, UserModelConfig
    >>> user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4))
    >>> users = KnownUsers(user_model, UserVocab(["ann", "bo"])).copied("ann", "eve").removed(["bo"])
    >>> list(users.user_vocab), users.user_model.config.num_users, users.origin("ann"), users.origin("eve")
    (['ann', 'eve'], 2, 'trained', 'copied')
    ```
    """

    user_model: UserModel
    user_vocab: UserVocab
    joined: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows_of(self, user_ids: Iterable[str | int]) -> list[int]:
        """
        The rows of known users, 1 to `num_users`.

        Raises:
            `TypeError`: if `user_ids` is no list of ids. `ValueError`: if there are none, if one is unknown or occurs twice.
        """
        check_user_ids(user_ids, "user_ids")
        ids = [as_user_id(user_id) for user_id in user_ids]
        if not ids:
            raise ValueError("`user_ids` is empty. Name at least one user.")
        rows = self.user_vocab.encode(ids)
        unknown = [user_id for user_id, row in zip(ids, rows, strict=True) if row == GENERIC_USER_INDEX]
        if unknown:
            raise ValueError(
                f"The model does not know {unknown[:5]}; it has {len(self.user_vocab)} users. `list(model.user_vocab)` and "
                "`trl-personal users list` name them."
            )
        if len(set(rows)) < len(rows):
            raise ValueError(f"Each user may be named once, got {len(rows)} ids of {len(set(rows))} users.")
        return rows

    def origin(self, user_id: str | int) -> str:
        """
        How a user came in: `"trained"` as a part of the shared training, `"joined"` later, or `"copied"` later from another.
        """
        facts = self.joined.get(str(user_id))
        if facts is None or facts.get("in_training"):
            return "trained"
        return "copied" if "copied_from" in facts else "joined"

    def removed(self, user_ids: Iterable[str | int]) -> "KnownUsers":
        """
        Without these users. Those behind them move up; their rows stay the same to the last bit.

        Raises:
            `ValueError`: as [`rows_of`], or if another user has a copy of the row of one of them.
        """
        rows = set(self.rows_of(user_ids))
        gone = {user_id for user_id in self.user_vocab.decode(sorted(rows)) if user_id is not None}
        copies = [name for name, facts in self.joined.items() if name not in gone and facts.get("copied_from") in gone]
        if copies:
            raise ValueError(
                f"{copies[:5]} have copies of the rows that are to be removed. Name them too, and what was copied is gone as "
                "well."
            )
        kept = [row for row in range(1, len(self.user_vocab) + 1) if row not in rows]
        vocab = UserVocab([user_id for user_id in self.user_vocab if user_id not in gone])
        joined = {user_id: facts for user_id, facts in self.joined.items() if user_id not in gone}
        return KnownUsers(self.user_model.keep_rows(kept), vocab, joined)

    def renamed(self, new_ids: Mapping[str | int, str | int]) -> "KnownUsers":
        """
        With other ids for some users, who keep their rows.

        Args:
            new_ids (`Mapping`): The new id by the old one. Two users may swap theirs.

        Raises:
            `ValueError`: if an old id is unknown, or a new one that of another user, or empty.
        """
        self.rows_of(list(new_ids))
        new = {str(as_user_id(old)): _named(name) for old, name in new_ids.items()}
        vocab = UserVocab([new.get(user_id, user_id) for user_id in self.user_vocab])
        joined = {
            new.get(user_id, user_id): {
                name: new.get(value, value) if name == "copied_from" else value for name, value in facts.items()
            }
            for user_id, facts in self.joined.items()
        }
        return KnownUsers(self.user_model, vocab, joined)

    def copied(self, user_id: str | int, new_id: str | int) -> "KnownUsers":
        """
        With one user more, who has the row of `user_id`.

        Raises:
            `ValueError`: if `user_id` is unknown, or `new_id` known.
        """
        rows = self.user_model.get_rows(self.rows_of([user_id]))
        facts = self.joined.get(str(user_id), {})
        source = facts.get("copied_from", str(user_id))
        return self.added({new_id: {"copied_from": source}}, rows)

    def added(
        self,
        joined: Mapping[str | int, Mapping[str, Any]],
        rows: Mapping[str, Tensor] | None = None,
    ) -> "KnownUsers":
        """
        With more users, who come behind the others and count as joined later.

        Args:
            joined (`Mapping`): What is known of each new user, by id: see [`KnownUsers`]; may be empty.
            rows (`Mapping[str, Tensor]`, *optional*): Their rows `(n, width)`, as [`UserModel.get_rows`] returns them.
                Without, they start as new rows do.

        Raises:
            `ValueError`: if one of them is known already, or a row does not fit.
        """
        ids = [_named(user_id) for user_id in joined]
        known = [user_id for user_id in ids if user_id in self.user_vocab]
        if known:
            raise ValueError(f"The model has {known[:5]} already. Choose other ids.")
        user_model = self.user_model.resize(len(self.user_vocab) + len(ids))
        if rows is not None:
            user_model.set_rows(range(len(self.user_vocab) + 1, len(self.user_vocab) + len(ids) + 1), rows)
        vocab = UserVocab([*self.user_vocab, *ids])
        more = {user_id: check_facts(facts) for user_id, facts in zip(ids, joined.values(), strict=True)}
        return KnownUsers(user_model, vocab, {**self.joined, **more})

    @torch.no_grad()
    def offset_norms(self) -> list[float]:
        """For each user the Euclidean norm of e_u - e_0, all numbers of the soft prompt as one vector, in their units."""
        norms: list[float] = []
        device = next(self.user_model.parameters()).device
        generic = self.user_model(torch.tensor([GENERIC_USER_INDEX], device=device))
        for rows in torch.arange(1, len(self.user_vocab) + 1, device=device).split(1024):
            norms += (self.user_model(rows) - generic).float().flatten(1).norm(dim=1).tolist()
        return norms


def _named(user_id: str | int) -> str:
    name = as_user_id(user_id)
    if name is None:
        raise ValueError("A user needs an id; `None` is the generic user.")
    return name


def mark_joined(model: nn.Module, joined: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Note of known users of `model` (a causal LM with users, or a `PeftModel` around one) that they came after the shared
    training. The note is saved with the users and goes with them.

    Args:
        model (`nn.Module`): The model, which is changed in place.
        joined (`Mapping`): What is known of each, by id: see [`KnownUsers`]; may be empty.

    Raises:
        `ValueError`: if a user is unknown, or for facts that cannot be.
    """
    more = {str(user_id): check_facts(facts) for user_id, facts in joined.items()}
    if more:
        known_users(model).rows_of(list(more))
    get_base_model(model).joined_users = {**joined_users(model), **more}


def joined_users(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is known of the users of `model` who came after the shared training, by id; see [`KnownUsers`]."""
    return dict(get_base_model(model).joined_users)


def known_users(model: nn.Module) -> KnownUsers:
    """The users of `model`, a causal LM with users or a `PeftModel` around one."""
    causal_lm = get_base_model(model)
    return KnownUsers(causal_lm.user_model, causal_lm.user_vocab, joined_users(model))


def set_known_users(model: nn.Module, users: KnownUsers) -> None:
    """Put other users in the place of those of `model`: on the same device, and ready to be saved with it."""
    causal_lm = get_base_model(model)
    for module in users.user_model.modules():  # as `attach_user_model` does
        module._is_hf_initialized = True  # type: ignore[assignment]
    causal_lm.user_model = users.user_model
    causal_lm.user_vocab = users.user_vocab
    causal_lm.joined_users = {user_id: dict(facts) for user_id, facts in users.joined.items()}

"""Soft prompts between those of users: how strongly a user is meant, and several users at once."""

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..user_models import UserModel
from ..users import GENERIC_USER_INDEX, UserId, UserVocab
from .soft_prompt import soft_prompts_of


logger = logging.getLogger(__name__)

LOWEST, HIGHEST = -1.0, 2.0  # of a strength, and of a weight in a blend
UserOrBlend: TypeAlias = UserId | Mapping[str | int, float]


def blended_soft_prompts(
    user_model: UserModel,
    user_vocab: UserVocab,
    users: Sequence[UserOrBlend],
    strengths: Sequence[float],
    device: torch.device,
) -> tuple[Tensor, int]:
    """
    The soft prompt of each row, e_0 + s · Σ w_u (e_u - e_0): float32 `(batch, T, token_dim)`, and the number of rows with a
    user who is not in the vocabulary, and who is the generic one there.

    A row of one user at strength 1 is that user's soft prompt to the last bit. Each user's is computed once.

    Args:
        user_model ([`UserModel`]): Has the soft prompts e_u.
        user_vocab ([`UserVocab`]): Has the users' rows.
        users (`Sequence`): For each row an id, `None`, or a blend: weights w_u by user id, which need not sum to one.
        strengths (`Sequence[float]`): s of each row: 0 is the generic user, 1 the user or the blend.
        device (`torch.device`): Where the rows are.

    Raises:
        `TypeError`, `ValueError`: for ids, weights or strengths that cannot be.
    """
    blends = [_checked_blend(user) if isinstance(user, Mapping) else {user: 1.0} for user in users]
    rows = [user_vocab.encode(list(blend)) for blend in blends]
    num_unknown = sum(
        any(index == GENERIC_USER_INDEX and user is not None for index, user in zip(indices, blend, strict=True))
        for indices, blend in zip(rows, blends, strict=True)
    )
    indices = sorted({GENERIC_USER_INDEX, *(index for row in rows for index in row)})
    place = {index: number for number, index in enumerate(indices)}
    own = soft_prompts_of(user_model, torch.tensor(indices, device=device)).to(device)
    alone = own[torch.tensor([place[row[0]] for row in rows], device=device)]
    is_plain = [s == 1 and not isinstance(user, Mapping) for s, user in zip(strengths, users, strict=True)]
    if all(is_plain):  # nearly always: nothing to mix
        return alone, num_unknown
    weights = torch.zeros(len(users), len(indices), device=device)
    for row, (found, blend) in enumerate(zip(rows, blends, strict=True)):
        for index, weight in zip(found, blend.values(), strict=True):
            weights[row, place[index]] += strengths[row] * weight
    prompts = own[0] + torch.einsum("bu,utd->btd", weights, own - own[0])
    return torch.where(torch.tensor(is_plain, device=device)[:, None, None], alone, prompts), num_unknown


def as_strengths(user_strength: Any, batch_size: int) -> list[float]:
    """
    A strength for each row, from a number for all of them or a list; 1 if it is `None`. Outside of 0 to 1 a warning says so.

    ```python
    >>> as_strengths(0.5, 2), as_strengths([0, 1], 2)
    ([0.5, 0.5], [0.0, 1.0])
    ```

    Raises:
        `TypeError`: if one is no number. `ValueError`: if one is not in [-1, 2], or for a list of another length.
    """
    given: Any = 1.0 if user_strength is None else user_strength
    if isinstance(given, (Tensor, np.ndarray, np.generic)):
        given = given.tolist()
    values = list(given) if isinstance(given, (list, tuple)) else [given] * batch_size
    if len(values) != batch_size:
        raise ValueError(
            f"`user_strength` has {len(values)} numbers for a batch of {batch_size} rows. Give one per row, or a single one."
        )
    strengths = [_checked_number(value, "`user_strength`") for value in values]
    outside = sum(not 0 <= strength <= 1 for strength in strengths)
    if outside:
        logger.warning(
            "%d of %d rows have a `user_strength` outside of [0, 1], where no soft prompt was in training: answers may "
            "garble.",
            outside,
            batch_size,
        )
    return strengths


def _checked_blend(blend: Mapping[Any, Any]) -> dict[Any, float]:
    if not blend:
        raise ValueError(
            "A blend in `user_ids` names no user. Give weights by user id, or `None` for the generic user."
        )
    return {user: _checked_number(weight, "A weight in `user_ids`") for user, weight in blend.items()}


def _checked_number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    number = float(value)
    if not (math.isfinite(number) and LOWEST <= number <= HIGHEST):
        raise ValueError(f"{name} must lie in [{LOWEST:g}, {HIGHEST:g}], got {value!r}.")
    return number

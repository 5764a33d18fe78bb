"""
New users join a trained model, and known users are refined: their rows are fitted to pairs, all else stays to the last bit.

The recipe (empirical Bayes): rows lie around the generic row, in the directions and with the spread of the rows of known
users ([`~new_users.prior`]); margins are linear in the row, with one backward pass for a batch of pairs ([`RowMargins`]); what
is left is a small problem for each user ([`~new_users.fit`]), in which noise in the answers is weighed too, and a choice on
expected accuracy ([`~new_users.choice`]).
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..intervals import Interval
from ..models.attach import attach_user_model, detach_user_model
from ..models.loading import load_language_model
from ..models.saving import get_base_model
from ..training.optimizer import measure_embedding_std
from ..training.settings import read_training_settings
from ..training.teaching_rows import rows_that_teach
from ..user_column import check_user_column, iterate_user_ids, warn_of_variants, with_user_names
from ..users import GENERIC_USER_INDEX, UserVocab, as_user_id
from .choice import Choice, LinearMargins, choose
from .fit import Hypothesis, log_likelihood
from .margins import RowMargins, row_margins
from .prior import RowPrior, is_linear, row_prior
from .results import CLEARS, ENOUGH, NOT_ENOUGH, FittedUser, UsersFit


logger = logging.getLogger(__name__)

RELINEARIZATIONS = 2  # of kinds whose soft prompts do not go with the row along a line, and of users with many pairs
MANY_PAIRS = 16  # so many answers pull a row to where the first gradients no longer hold


def add_users(
    model: Any,
    dataset: Dataset | None,
    tokenizer: Any,
    ref_model: Any = None,
    *,
    user_ids: Iterable[str | int] = (),
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    num_relinearizations: int | None = None,
) -> UsersFit:
    """
    Let the users in `dataset` join a model. Each gets the next free row, which is fitted to the user's pairs. All other rows,
    what users share and the language model stay as they are, to the last bit.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A model with a user model attached; it is changed in place.
        dataset (`Dataset`, *optional*): Preference pairs as for training, with the columns of the training. Rows without a
            user are left out.
        tokenizer: The tokenizer or processor of the model.
        ref_model (`PreTrainedModel` or `str`, *optional*): The model that training started from, or its folder. Needed unless
            the model is an adapter, whose base model is the reference.
        user_ids (`Iterable`, *optional*): Users who join too, with pairs or without: without pairs, a user has the generic
            user's soft prompt.
        settings (`Mapping`, *optional*): Settings of the training (`beta`, `max_length`, `user_id_column`, ...), in place of
            those saved with the model.
        batch_size (`int`, *optional*, defaults to `16`): The number of pairs computed at once.
        num_relinearizations (`int`, *optional*): How often margins are linearized anew at the rows found. By default 2 for
            kinds whose soft prompts are not linear in the row, such as `cluster`, and for users with 16 pairs or more, else 0.

    Returns:
        [`UsersFit`].

    Raises:
        `ValueError`: if a user is known already, if there is nobody to join, if a full model comes without `ref_model`, or for
        pairs that training would refuse. Nothing has changed then.
    """
    settings = settings_of(model, settings)
    causal_lm = get_base_model(model)
    vocab: UserVocab = causal_lm.user_vocab
    dataset, users = _pairs_of_users(dataset, settings)
    joining = list(dict.fromkeys([*(user for user in map(as_user_id, user_ids) if user is not None), *users]))
    if not joining:
        raise ValueError("There is nobody to join: the dataset has no user, and `user_ids` is empty.")
    known = sum(user in vocab for user in joining)
    if known:
        raise ValueError(
            f"{known} of the {len(joining)} users are in the model already. Refine them with `update_users` "
            "(`trl-personal users update`), and leave them out here."
        )
    warn_of_variants([*vocab, *joining], "given")
    extended = vocab.extend(joining)
    bigger = causal_lm.user_model.resize(len(extended))
    new = list(range(len(vocab) + 1, len(extended) + 1))
    generic = bigger.get_rows([GENERIC_USER_INDEX])
    bigger.set_rows(new, {name: row.expand(len(new), *row.shape[1:]) for name, row in generic.items()})
    bos, template = causal_lm._soft_prompt_insertion.bos_token_id, causal_lm.user_profile_template
    num_known, joined = len(vocab), dict(causal_lm.joined_users)

    def start_rows(margins: RowMargins) -> Tensor:
        return margins.flat_rows([GENERIC_USER_INDEX]).expand(len(joining), -1)

    fitted, rows = _fit(
        model,
        dataset,
        joining,
        tokenizer,
        ref_model,
        settings,
        batch_size,
        num_relinearizations,
        start_rows,
        num_known,
    )
    if rows is not None:
        bigger.set_rows(new, rows)
    detach_user_model(model)
    facts = {user.user_id: {"num_pairs": user.num_pairs} for user in fitted.users}
    attach_user_model(model, bigger, extended, bos, template, joined | facts)
    logger.info("%d users have joined the %d that the model knew. %s", len(joining), num_known, fitted.summary())
    return fitted


def update_users(
    model: Any,
    dataset: Dataset,
    tokenizer: Any,
    ref_model: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    num_relinearizations: int | None = None,
) -> UsersFit:
    """
    Refine the rows of known users by more pairs: each is fitted around the row that the user has, with the spread of known
    users. Users without pairs, what users share and the language model stay as they are, to the last bit.

    Arguments and result are those of [`add_users`].

    Raises:
        `ValueError`: if a user is unknown, or as [`add_users`].
    """
    settings = settings_of(model, settings)
    causal_lm = get_base_model(model)
    vocab: UserVocab = causal_lm.user_vocab
    dataset, users = _pairs_of_users(dataset, settings)
    if not users:
        raise ValueError("There is nobody to update: the dataset has no row with a user.")
    unknown = sum(user not in vocab for user in users)
    if unknown:
        raise ValueError(
            f"{unknown} of the {len(users)} users are not in the model. Let them join with `add_users` (`trl-personal users "
            "add`), and leave them out here."
        )
    indices = vocab.encode(users)

    def start_rows(margins: RowMargins) -> Tensor:
        return margins.flat_rows(indices)

    fitted, rows = _fit(
        model, dataset, users, tokenizer, ref_model, settings, batch_size, num_relinearizations, start_rows, len(vocab)
    )
    moved = [number for number, user in enumerate(fitted.users) if user.moved]
    if rows is not None and moved:
        causal_lm.user_model.set_rows(
            [indices[number] for number in moved], {name: values[moved] for name, values in rows.items()}
        )
    logger.info("Updated. %s", fitted.summary())
    return fitted


def settings_of(model: Any, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that a model was trained with, those given in place of those saved beside it."""
    saved: dict[str, Any] = {}
    if settings is None or "beta" not in settings:
        causal_lm = get_base_model(model)
        if causal_lm.training_settings is not None:
            saved = causal_lm.training_settings
        elif causal_lm.user_model_folder is not None:
            saved = read_training_settings(causal_lm.user_model_folder)
        if not saved:
            logger.warning(
                "Nothing says with which settings the model was trained (beta, lengths, columns), so TRL's defaults hold. "
                "Give them: `settings={'beta': ..., 'max_length': ...}`."
            )
    return saved | dict(settings or {})


def _pairs_of_users(dataset: Dataset | None, settings: Mapping[str, Any]) -> tuple[Dataset | None, list[str]]:
    """The pairs of a dataset that have a user and can teach, and all its users, in order of first appearance."""
    if dataset is None:
        return None, []
    column = settings.get("user_id_column", "user_id")
    check_user_column(dataset, column, "given")
    dataset = with_user_names(dataset, column)
    owners = list(iterate_user_ids(dataset, column, "given"))
    users = [user for user in dict.fromkeys(owners) if user is not None]
    kept = [number for number, user in enumerate(owners) if user is not None]
    if len(kept) < len(owners):
        logger.warning("%d of %d rows have no user and are left out.", len(owners) - len(kept), len(owners))
    if not kept:
        return None, users
    return rows_that_teach(dataset.select(kept), "given"), users


def _fit(
    model: Any,
    dataset: Dataset | None,
    users: list[str],
    tokenizer: Any,
    ref_model: Any,
    settings: Mapping[str, Any],
    batch_size: int,
    num_relinearizations: int | None,
    start_rows: Any,
    num_known: int,
) -> tuple[UsersFit, dict[str, Tensor] | None]:
    """The fit of the users, and their rows by table (`None` without pairs)."""
    if dataset is None:
        return UsersFit(tuple(_without_pairs(user) for user in users), 0, num_known > 1), None
    _check_reference(model, ref_model)
    if isinstance(ref_model, (str, Path)):
        ref_model = load_language_model(str(ref_model), dtype=get_base_model(model).dtype)
    beta = float(settings.get("beta", 0.1))
    column = settings.get("user_id_column", "user_id")
    owners = list(iterate_user_ids(dataset, column, "given"))
    numbers = {user: number for number, user in enumerate(users)}
    std = measure_embedding_std(model, getattr(tokenizer, "tokenizer", tokenizer))
    with row_margins(model, tokenizer, dataset, settings, ref_model, batch_size) as margins:
        owner = torch.tensor([numbers[str(owners[row])] for row in margins.rows], dtype=torch.long)
        prior = row_prior(margins, num_known, std)
        start = start_rows(margins)
        is_update = bool((start != start[:1]).any())
        pairs_of = torch.bincount(owner, minlength=len(users))
        if num_relinearizations is None:
            least = MANY_PAIRS if is_linear(margins, start[0], prior.basis) else 1
            relinearizations = torch.where(pairs_of >= least, RELINEARIZATIONS, 0)
        else:
            relinearizations = torch.full_like(pairs_of, num_relinearizations)
        codes, choices = _fit_codes(margins, start, prior, owner, beta, relinearizations, not is_update)
        rows = margins.by_table(start + codes.float() @ prior.basis)
        counts = pairs_of.tolist()
        left_out = len(dataset) - len(margins)
    fitted = tuple(
        _as_user(user, counts[number], choices[number], bool(codes[number].any()))
        if number in choices
        else _without_pairs(user)
        for number, user in enumerate(users)
    )
    for number in range(len(users)):
        if not codes[number].any():  # the start row itself, to the last bit
            for name, part in margins.by_table(start[number : number + 1]).items():
                rows[name][number] = part[0]
    return UsersFit(fitted, left_out, prior.is_of_users), rows


def _fit_codes(
    margins: RowMargins,
    start: Tensor,
    prior: RowPrior,
    owner: Tensor,
    beta: float,
    relinearizations: Tensor,
    asks_others: bool,
) -> tuple[Tensor, dict[int, Choice]]:
    """The codes of each user, `(users, rank)`, and the choices behind them; `relinearizations` `(users,)` at most."""
    at_start, slopes = margins.at(start, owner, prior.basis)
    assert slopes is not None
    linear = LinearMargins(at_start, at_start.clone(), slopes.double(), owner, len(start))
    choices = choose(linear, beta, asks_others)
    codes = torch.zeros(len(start), len(prior.basis), dtype=torch.float64)
    for user, choice in choices.items():
        codes[user] = choice.codes
    accepted = torch.where(relinearizations[:, None] > 0, 0, codes)
    tried, at_accepted = dict(choices), at_start.clone()
    for step in range(int(relinearizations.max()) + 1):
        pairs = torch.nonzero((codes != accepted).any(1)[owner]).flatten()
        if not len(pairs):
            break
        goes_on = (step < relinearizations)[owner[pairs]].any()
        found, new_slopes = margins.at(start + codes.float() @ prior.basis, owner, prior.basis, bool(goes_on), pairs)
        for user in owner[pairs].unique().tolist():
            own = owner[pairs] == user
            hypothesis = tried[user].hypothesis
            before = _objective(at_accepted[pairs[own]], accepted[user], hypothesis, beta)
            if _objective(found[own], codes[user], hypothesis, beta) <= before:
                accepted[user], choices[user] = codes[user], tried[user]
                at_accepted[pairs[own]] = found[own]
                if new_slopes is not None:
                    linear.slopes[pairs[own]] = new_slopes[own].double()
                    linear.offset[pairs[own]] = found[own] - new_slopes[own].double() @ codes[user]
        if goes_on:
            moved = (codes != accepted).any(1)
            codes = torch.where(moved[:, None], (codes + accepted) / 2, codes)  # half of a step that made it worse
            # nobody is asked on pairs of others, which are linear at the rows of these
            for user, choice in choose(linear, beta, asks_others=False).items():
                if relinearizations[user] and not moved[user] and accepted[user].any():
                    tried[user] = choice
                    codes[user] = choice.codes
    return accepted, choices


def _objective(margins: Tensor, codes: Tensor, hypothesis: Hypothesis, beta: float) -> Tensor:
    """What a MAP estimate minimizes, with the true margins of a user's pairs."""
    likelihood = log_likelihood(margins.double(), beta, hypothesis.noise).sum()
    return hypothesis.precision / 2 * codes.square().sum() - likelihood


def _check_reference(model: Any, ref_model: Any) -> None:
    if ref_model is None and model is get_base_model(model):
        raise ValueError(
            "The model is a whole language model, and nothing says which model its training started from: margins are "
            "relative to that one. Give it as `ref_model` (`--ref_model`)."
        )


def _without_pairs(user: str) -> FittedUser:
    return FittedUser(user, 0, Interval(0.5, 0.0, 1.0), 0.5, 0.0, False, NOT_ENOUGH)


def _as_user(user: str, num_pairs: int, choice: Choice, moved: bool) -> FittedUser:
    return FittedUser(
        user,
        num_pairs,
        Interval(choice.accuracy, choice.low, choice.high),
        choice.start_accuracy,
        choice.probability_of_gain,
        moved,
        ENOUGH if moved and choice.probability_of_gain >= CLEARS else NOT_ENOUGH,
    )

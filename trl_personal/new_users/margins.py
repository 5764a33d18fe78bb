"""Margins of pairs and their gradients in the rows of users, from the trainer's own code, on a model that stays as it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call

from ..evaluation.scoring import ROW_COLUMN
from ..evaluation.trained_model import PAIRS, scoring_trainer_around
from ..models.attach import attach_user_model, detach_user_model
from ..models.saving import get_base_model, is_personalized
from ..training.precision import kept_weights
from ..user_models import UserModel
from ..users import GENERIC_USER_INDEX


class RowMargins:
    """
    The margins of pairs ([`~training.user_metrics.pair_margins`], in nats) as functions of the rows of their users.

    The trainer around the model prepares the pairs, makes the batches and computes the margins, so that they are those of
    training and evaluation. A batch has pairs of many users, each with a soft prompt of its own, so that one backward pass
    through the sum of the margins gives the gradient of each.

    Args:
        trainer ([`PersonalizedDPOTrainer`]): A scoring trainer, whose eval dataset `PAIRS` has the pairs.
        batch_size (`int`): The number of pairs in a batch.
    """

    def __init__(self, trainer: Any, batch_size: int) -> None:
        self.trainer, self.batch_size = trainer, batch_size
        self.user_model: UserModel = trainer.user_model
        self.tables = self.user_model.row_tables()
        self.pairs: Dataset = trainer.eval_dataset[PAIRS]
        numbers = self.pairs[ROW_COLUMN] if ROW_COLUMN in self.pairs.column_names else range(len(self.pairs))
        self.rows: list[int] = list(numbers)
        self._by_length = self._order()
        self._references: dict[str, Tensor] = {}
        self._small = self.user_model.keep_rows([]).resize(batch_size)  # whose rows are replaced by those to be tried

    @property
    def width(self) -> int:
        """The number of numbers in a user's row, over all tables."""
        return sum(table.weight[0].numel() for table in self.tables.values())

    def __len__(self) -> int:
        """The number of pairs that are left after the trainer's preparation."""
        return len(self.pairs)

    def flat_rows(self, indices: Sequence[int]) -> Tensor:
        """The rows of users, one after the other table, float32 `(n, width)`."""
        found = self.user_model.get_rows(indices)
        return torch.cat([found[name].flatten(1) for name in self.tables], dim=1)

    def by_table(self, flat: Tensor) -> dict[str, Tensor]:
        """What [`UserModel.set_rows`] takes, from rows `(n, width)`."""
        shapes = {name: table.weight.shape[1:] for name, table in self.tables.items()}
        parts = flat.split([shape.numel() for shape in shapes.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def soft_prompts(self, flat: Tensor) -> Tensor:
        """The soft prompts `(n, T, token_dim)` of rows `(n, width)`, differentiable; `n` is at most the batch size."""
        generic = self.user_model.get_rows([GENERIC_USER_INDEX])
        device = next(self._small.parameters()).device
        weights = {
            f"{name}.weight": torch.cat([generic[name].to(device), part.to(device)])
            for name, part in self.by_table(flat).items()
        }
        indices = torch.arange(1, len(flat) + 1, device=device)
        return functional_call(self._small, weights, (indices,))

    def at(
        self,
        rows: Tensor,
        row_of_pair: Tensor,
        basis: Tensor | None = None,
        gradients: bool = True,
        numbers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        The margins of pairs, float64 `(n,)`, and their gradients.

        Args:
            rows (`Tensor` `(users, width)`): The row of each user.
            row_of_pair (`LongTensor` `(n,)`): The number of the row that each pair is scored with.
            basis (`Tensor` `(rank, width)`, *optional*): Directions; gradients are then `(n, rank)`, along these.
            gradients (`bool`, *optional*, defaults to `True`): Whether gradients are wanted.
            numbers (`LongTensor` `(n,)`, *optional*): The pairs that are wanted, all by default.

        Returns:
            Margins, and gradients `(n, rank)` or `(n, width)`; `None` if they are not wanted.
        """
        wanted = torch.arange(len(self)) if numbers is None else numbers
        width = rows.shape[1] if basis is None else len(basis)
        margins = torch.empty(len(wanted), dtype=torch.float64)
        slopes = torch.empty(len(wanted), width) if gradients else None
        places = torch.full((len(self),), -1)
        places[wanted] = torch.arange(len(wanted))
        for batch in self._by_length[places[self._by_length] >= 0].split(self.batch_size):
            leaf = rows[row_of_pair[batch]].clone().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                found = self._margins_of_batch(batch, self.soft_prompts(leaf))
            if slopes is not None:
                (slope,) = torch.autograd.grad(found.sum(), leaf)
                slopes[places[batch]] = (slope if basis is None else slope @ basis.T).float()
            margins[places[batch]] = found.detach().double().cpu()
        return margins, slopes

    def _margins_of_batch(self, numbers: Tensor, soft_prompts: Tensor) -> Tensor:
        trainer = self.trainer
        batch = trainer.data_collator([dict(self.pairs[number]) for number in numbers.tolist()])
        batch = trainer._prepare_inputs(batch)
        with torch.no_grad():
            batch = trainer.prepare_batch(trainer.model, batch)
        keys = trainer.reference_keys
        if all(name in self._references and self._references[name][numbers].isfinite().all() for name in keys):
            batch |= {name: self._references[name][numbers].to(soft_prompts.device) for name in keys}
            before, trainer.precompute_ref_logps = trainer.precompute_ref_logps, True
        else:
            before = trainer.precompute_ref_logps
        try:
            with trainer.reference_in_batch(batch) as scored:
                for name in keys:
                    kept = self._references.setdefault(name, torch.full((len(self),), torch.nan))
                    kept[numbers] = scored[name].detach().float().cpu()
                with trainer.compute_loss_context_manager():
                    return trainer.margins_with(scored, soft_prompts)
        finally:
            trainer.precompute_ref_logps = before

    def _order(self) -> Tensor:
        """The numbers of the pairs, from short to long: the pairs of a batch are of like lengths."""
        columns = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in self.pairs.column_names]
        lengths = np.zeros(len(self.pairs), dtype=np.int64)
        for column in columns:
            lengths += np.fromiter(map(len, self.pairs[column]), dtype=np.int64, count=len(self.pairs))
        return torch.from_numpy(np.argsort(lengths, kind="stable"))


@contextmanager
def row_margins(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    settings: Mapping[str, Any],
    ref_model: Any = None,
    batch_size: int = 16,
) -> Iterator[RowMargins]:
    """
    [`RowMargins`] of the pairs in `dataset` for a model with users, inside. Afterwards the model is as it was: its weights to
    the last bit, its user model the same object, its modules in the same mode and without the trainer's hooks.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A model with a user model attached.
        processing_class: Its tokenizer or processor.
        dataset (`Dataset`): The pairs.
        settings (`Mapping`): The settings of the training.
        ref_model (`PreTrainedModel`, *optional*): The reference; by default the base model of an adapter.
        batch_size (`int`, *optional*, defaults to `16`): The number of pairs in a batch.
    """
    causal_lm = get_base_model(model)
    bos, template = causal_lm._soft_prompt_insertion.bos_token_id, causal_lm.user_profile_template
    trained, joined = vars(causal_lm).get("training_settings"), causal_lm.joined_users
    users = detach_user_model(model)
    try:
        with _left_as_found([part for part in (model, ref_model) if part is not None]):
            attach_user_model(model, users[0].keep_rows(range(1, len(users[1]) + 1)), users[1], bos, template)
            trainer: Any = None
            try:
                trainer = scoring_trainer_around(
                    model,
                    processing_class,
                    dataset,
                    settings,
                    ref_model=ref_model,
                    batch_size=batch_size,
                    disable_tqdm=True,
                )
                trainer.model.requires_grad_(False)
                yield RowMargins(trainer, batch_size)
            finally:
                if is_personalized(model):
                    detach_user_model(model)
    finally:
        attach_user_model(model, *users, bos, template, joined)
        causal_lm.training_settings = trained


@contextmanager
def _left_as_found(models: list[nn.Module]) -> Iterator[None]:
    """Whatever a trainer changes in models inside is undone: weights, modes, dropout, hooks and replaced methods."""
    bases = [(get_base_model(model), type(get_base_model(model))) for model in models]
    modules = [module for model in models for module in model.modules()]
    found = [
        (module, module.training, getattr(module, "p", None), vars(module).get("forward"), _hooks(module))
        for module in modules
    ]
    frozen = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    for model in models:
        model.requires_grad_(False)
        model.eval()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(kept_weights(model))
        try:
            yield
        finally:
            for module, training, p, forward, hooks in found:
                module.training = training
                if isinstance(p, float):  # of dropout
                    module.p = p  # type: ignore[assignment]
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward
                for name, kept in hooks.items():
                    vars(module)[name].clear()
                    vars(module)[name].update(kept)
            for parameter, requires_grad in frozen:
                parameter.requires_grad_(requires_grad)
            for base, cls in bases:
                base.__class__ = cls


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}

"""Stops a run whose weights are no numbers any more, before they are saved over those that were."""

import logging
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..user_models import UserModel
from .processes import said_by_any


logger = logging.getLogger(__name__)


class DivergenceCallback(TrainerCallback):
    """
    Looks at the trained weights before anything is logged, evaluated or saved, at the end of training, and where a loss is not
    finite. (A loss alone that is not finite stops nothing: with float16, such a step is left out.) Several processes look and
    stop together, which is why a loss that is not finite, which only some of them may have, does not make them look.

    Args:
        stops (`bool`): Whether to raise; otherwise the run goes on after a warning.
    """

    def __init__(self, stops: bool) -> None:
        self.stops = stops
        self.first_bad_loss: int | None = None  # the step
        self.last_good_step: int | None = None
        self._looks_bad, self._has_warned = False, False

    def see_loss(self, loss: Tensor, model: nn.Module, step: int) -> None:
        """
        Take note of the loss of a batch in `step`, before its gradients carry what is not finite into all weights.

        Raises:
            `FloatingPointError`: if the loss is not finite, and some weight is not either.
        """
        if torch.isfinite(loss).all():
            return
        self.first_bad_loss = step if self.first_bad_loss is None else self.first_bad_loss
        if PartialState().num_processes == 1:  # of several, only some may see it; they look together
            self._looks_bad = True
            self._look(model, step - 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier call of `train`."""
        self.first_bad_loss, self.last_good_step = None, state.global_step
        self._looks_bad = self._has_warned = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """
        Look at the weights, if it is time.

        Raises:
            `FloatingPointError`: if one of them is not finite.
        """
        ends = state.global_step >= state.max_steps
        if self._looks_bad or ends or control.should_log or control.should_save or control.should_evaluate:
            self._looks_bad = False
            self._look(kwargs["model"], state.global_step)

    def _look(self, model: nn.Module, step: int) -> None:
        """Raise, or warn, if a weight is not finite after `step`."""
        found = said_by_any(describe_nonfinite(model))
        if found is None:
            self.last_good_step = step
            return
        loss = "" if self.first_bad_loss is None else f"; the loss was not finite in step {self.first_bad_loss}"
        text = (
            f"The training has diverged: after step {step}, {found} are not finite. The weights were finite after step "
            f"{self.last_good_step}{loss}. Lower `learning_rate` or `user_learning_rate`, or set `max_grad_norm`; resume from "
            'a checkpoint of before. (`on_divergence="warn"` goes on.)'
        )
        if self.stops:
            raise FloatingPointError(text)
        if not self._has_warned:
            logger.warning(text)
        self._has_warned = True


def describe_nonfinite(model: nn.Module) -> str | None:
    """
    How many trained tensors of the language model and how many rows of users have values that are not finite, in words;
    `None` if all are finite. Sharded tensors are looked at where they are.

    ```python
    >>> model = nn.Linear(2, 3)
    >>> describe_nonfinite(model)
    >>> _ = model.weight.data[1].fill_(torch.nan)
    >>> describe_nonfinite(model)
    '1 of 2 trained tensors (weight the first)'
    ```
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    bad = [name for name, parameter in named if not _is_finite(parameter).all()]
    if not bad:
        return None
    text = f"{len(bad)} of {len(named)} trained tensors ({bad[0]} the first)"
    num_rows = sum(_count_bad_rows(part) for part in model.modules() if isinstance(part, UserModel))
    return f"{text}, with {num_rows} rows of users," if num_rows else text


def _count_bad_rows(user_model: UserModel) -> int:
    try:
        tables = user_model.row_tables()
    except ValueError:  # a kind of one's own whose rows are in no table
        return 0
    rows = [_is_finite(table.weight) for table in tables.values()]
    return sum(int((~finite.all(dim=1)).sum()) for finite in rows if finite.ndim == 2)  # ZeRO-3 leaves flat pieces


def _is_finite(parameter: Tensor) -> Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.detach().isfinite()

"""Evaluation with users: each pair is scored with every prompt, and counts for its user."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from ..user_column import AnyDataset, check_user_column
from ..user_models import UserModel
from ..users import UserVocab
from .config import PersonalizationConfig
from .precision import kept_weights
from .run_users import EvalDatasets, check_ids_of_rows, with_names_of_users
from .teaching_rows import rows_that_teach
from .user_metrics import MarginRecorder, metrics_under, scored_outputs, swapped_user_indices


class ScoredEvaluationMixin(Trainer):
    """
    In front of a trainer of TRL, this checks the users of what is evaluated and records the margins of its pairs, from which
    come the metrics of users. `trainer.margin_recorder` is `None` until an evaluation begins, or the caller's own recorder.
    """

    rows_per_example: ClassVar[int]
    scored_output: ClassVar[str]

    args: Any
    model: Any
    user_model: UserModel | None
    user_vocab: UserVocab | None
    margin_recorder: MarginRecorder | None

    # --- What differs between trainers ----------------------------------------------------------------------------------

    def pair_margins(self, batch: dict[str, Any], output: Tensor) -> Tensor:
        """The margin of each example, `(batch,)`, above zero if it comes out right, from the model's `scored_output`."""
        raise NotImplementedError

    def other_users(self) -> dict[str, Tensor]:
        """Scorers of an evaluation beside the user's own prompt and the generic one, for a [`MarginRecorder`]."""
        num_users = len(self.user_vocab or ())
        if num_users < 2:
            return {}
        return {"swapped": swapped_user_indices(torch.arange(num_users + 1), num_users)}

    def check_columns(self, args: PersonalizationConfig, dataset: AnyDataset, name: str) -> None:
        """Refuse a dataset without the columns that this trainer reads beside TRL's."""
        check_user_column(dataset, args.user_id_column, name)

    def margins_with(self, batch: dict[str, Any], soft_prompts: Tensor) -> Tensor:
        """
        The margins of the pairs of a batch, `(batch,)`, each with a soft prompt of the caller's in place of its user's. They
        have gradients with respect to `soft_prompts` `(batch, T, token_dim)`.

        Args:
            batch (`dict`): A batch of the collator, prepared, with the reference's outputs in it
                ([`~training.mixin.PersonalizedTrainerMixin.reference_in_batch`]).
            soft_prompts (`Tensor` `(batch, T, token_dim)`): The soft prompt of each example.
        """
        trainer: Any = self
        batch = trainer.user_batch(batch)
        rows = {name: value for name, value in batch.items() if name != "user_indices"}
        rows["soft_prompts"] = soft_prompts.repeat(self.rows_per_example, 1, 1)
        with scored_outputs(self.model, self.scored_output) as scored, metrics_under(self, None):
            super().compute_loss(self.model, rows)
        return self.pair_margins(batch, scored[0])

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def _check_dataset(self, args: PersonalizationConfig, dataset: Any, name: str) -> None:
        if isinstance(dataset, (Dataset, IterableDataset)):
            self.check_columns(args, dataset, name)

    def _check_eval_datasets(self, args: PersonalizationConfig, eval_dataset: EvalDatasets | None) -> None:
        for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}).items():
            self._check_dataset(args, dataset, name)
            check_ids_of_rows(args, dataset, name)

    def _record(self, model: nn.Module, batch: dict[str, Any], margins: dict[str, Tensor]) -> None:
        """Evaluation: how pairs come out with each scorer, those of other users among them."""
        if self.margin_recorder is None:
            self.margin_recorder = MarginRecorder(self.other_users())
        if self.user_model is None:
            self.margin_recorder.add(self.accelerator.gather_for_metrics(margins))
            return
        users = batch["user_indices"]
        for name, rows in self.margin_recorder.other_users.items():
            other = {**batch, "user_indices": rows.to(users.device)[users]}
            with metrics_under(self, None), scored_outputs(self.model, self.scored_output) as scored:
                super().compute_loss(model, dict(other))
            margins = {**margins, name: self.pair_margins(other, scored[0])}
        users = users[: len(users) // self.rows_per_example]
        self.margin_recorder.add(*self.accelerator.gather_for_metrics((margins, users)))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in transformers. The recorder of margins keeps the prepared dataset, to know which rows truncation left."""
        if self.margin_recorder is not None:
            datasets: Any = self.eval_dataset
            named = datasets[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
            self.margin_recorder.see(datasets if named is None else named)
        return super().get_eval_dataloader(eval_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; at the end of an evaluation with the accuracy over users."""
        if self.user_model is not None and self.margin_recorder is not None and not self.model.training:
            trainer: Any = self
            recorder, self.margin_recorder = self.margin_recorder, None  # the next evaluation counts its own pairs
            trainer._metrics["eval"].update({name: [value] for name, value in recorder.metrics().items()})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL. A dataset passed here is checked for its users first; weights cast for it come back bit for bit."""
        if self.user_model is not None:
            if self.margin_recorder is not None and len(self.margin_recorder):
                self.margin_recorder = None  # holds the pairs of `predict`, which logs nothing
            if not isinstance(eval_dataset, str):
                self._check_eval_datasets(self.args, eval_dataset)
                eval_dataset = rows_that_teach(with_names_of_users(eval_dataset, self.args.user_id_column))
        with self._weights_as_they_were():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Weights that are cast for it come back bit for bit."""
        with self._weights_as_they_were():
            return super().predict(*args, **kwargs)

    def _weights_as_they_were(self) -> AbstractContextManager[None]:
        """Full evaluation in half precision casts the model in place, outside of training; transformers leaves it so."""
        is_cast = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        return kept_weights(self.model) if is_cast else nullcontext()

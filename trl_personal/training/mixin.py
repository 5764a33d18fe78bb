"""What a trainer of TRL needs to train with users, whichever trainer it is."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.attach import attach_user_model
from ..models.generation_limits import reason_not_to_write
from ..models.saving import get_base_model
from ..user_column import AnyDataset
from ..user_models import UserModel
from ..users import GENERIC_USER_INDEX, UserVocab
from .attention_kernels import sound_attention
from .checkpoints import CheckpointsMixin
from .collator import DataCollatorForPersonalizedPreference
from .config import PersonalizationConfig
from .divergence import DivergenceCallback
from .movement import MovementCallback
from .optimizer import DEFAULT_STEP, add_user_groups, measure_embedding_std, move_to_user_groups, user_groups
from .precision import keep_quantized_weights
from .run_users import (
    EvalDatasets,
    check_settings,
    choose_users,
    freeze_shared,
    make_user_model,
    refuse_prompt_learning,
    say_what_moves,
    take_known_users,
    with_names_of_users,
)
from .scored_evaluation import ScoredEvaluationMixin
from .settings import scoring_settings
from .teaching_rows import TeachingRows, rows_that_teach
from .terms import TERMS, Term
from .user_metrics import metrics_under, scored_outputs


logger = logging.getLogger(__name__)

SCORERS = {"": "own", "generic/": "generic"}  # what a pair is scored with in each term, by the term's prefix


class PersonalizedTrainerMixin(ScoredEvaluationMixin, CheckpointsMixin):
    """
    In front of a trainer of TRL, this makes each example belong to a user. It calls `super()` and changes what goes in or
    comes out; nothing of TRL is copied.

    A trainer is a class `PersonalizedXTrainer(PersonalizedTrainerMixin, XTrainer)` that declares what differs between TRL's
    trainers, in these class attributes and in [`pair_margins`]; the other methods under the same heading may be extended.

    - `config_class`: The settings of users together with those of TRL's trainer.
    - `rows_per_example`: How many rows of a batch belong to one example: two where a batch is `[chosen; rejected]`, else one.
    - `reference_keys`: The names under which a batch holds what `compute_ref_log_probs` returns. Empty for a trainer that has
      no reference.
    - `scored_output`: The output of the model from which [`pair_margins`] computes margins.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): What TRL's trainer takes, or a folder or model that has users.
        args ([`PersonalizationConfig`]): An instance of `config_class`.
        train_dataset, eval_dataset: The datasets of TRL's trainer, with the column `args.user_id_column`.
        user_vocab ([`UserVocab`] or ids, *optional*): The known users.
        user_model ([`UserModel`], *optional*): The caller's own user model.
        **kwargs: The other arguments of TRL's trainer.
    """

    config_class: ClassVar[type[PersonalizationConfig]]
    rows_per_example: ClassVar[int]
    reference_keys: ClassVar[tuple[str, ...]] = ()
    scored_output: ClassVar[str]

    model: PreTrainedModel | PeftModel
    embedding_std: float  # of the language model's token embeddings; with users only
    _name: str

    def __init__(
        self,
        *,
        model: str | PreTrainedModel | PeftModel,
        args: PersonalizationConfig,
        train_dataset: AnyDataset | None,
        eval_dataset: EvalDatasets | None,
        quantization_config: BitsAndBytesConfig | None,
        peft_config: PeftConfig | None,
        has_settings: bool,
        user_vocab: UserVocab | Iterable[str | int] | None,
        user_model: UserModel | None,
        **kwargs: Any,
    ) -> None:
        self.user_model, self.user_vocab = None, None
        self.margin_recorder = None
        personalized = args.user_model_kind != "none"
        if personalized:
            refuse_prompt_learning(model, peft_config)
            model, known, quantization_config = take_known_users(model, args, quantization_config)
            if known is not None and has_settings:
                check_settings(args, known[0], "the user model in `model`")
            self._check_dataset(args, train_dataset, "train")
            train_dataset = with_names_of_users(train_dataset, args.user_id_column)
            rows = TeachingRows("train")
            train_dataset = rows.of(train_dataset)
            user_model, vocab = choose_users(args, train_dataset, user_vocab, user_model, known)
            say_what_moves(args, known)
            if isinstance(train_dataset, IterableDataset):
                rows.tell()
            self._check_eval_datasets(args, eval_dataset)
            eval_dataset = rows_that_teach(with_names_of_users(eval_dataset, args.user_id_column))
            _let_ddp_take_several_passes(args)
        elif user_model is not None or user_vocab is not None:
            raise ValueError('`user_model` and `user_vocab` need a `user_model_kind` other than "none".')
        super().__init__(  # type: ignore[call-arg]  # TRL's trainer comes next, whichever it is
            model=model,  # type: ignore[arg-type]
            args=args,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )
        self.divergence = DivergenceCallback(stops=args.on_divergence == "stop")
        self.add_callback(self.divergence)
        if personalized:
            self._attach(vocab, user_model)

    # --- What differs between trainers ----------------------------------------------------------------------------------

    def prepare_batch(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the loss shall see it, before the reference is computed."""
        return batch

    def user_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of the user's own term."""
        return batch

    def generic_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of the generic user's term."""
        return {**batch, "user_indices": torch.full_like(batch["user_indices"], GENERIC_USER_INDEX)}

    def make_collator(self, user_vocab: UserVocab) -> DataCollatorForPersonalizedPreference:
        """The trainer's collator, which also says whose each row is."""
        return DataCollatorForPersonalizedPreference(
            self.data_collator, user_vocab, self.args.user_id_column, rows_per_example=self.rows_per_example
        )

    # --- Set-up -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer_of_text(self) -> PreTrainedTokenizerBase:
        """The tokenizer, also where `processing_class` is a processor of images and text."""
        processing_class: Any = self.processing_class
        return getattr(processing_class, "tokenizer", processing_class)

    def _attach(self, user_vocab: UserVocab, user_model: UserModel | None) -> None:
        """Attach the user model. After TRL's own set-up, whose reference, precomputation and hash must not see users."""
        keep_quantized_weights(self.model)
        tokenizer = self.tokenizer_of_text
        if user_model is None:
            user_model = make_user_model(self.args, len(user_vocab), self.model, tokenizer, self.args.seed)
        if self.is_deepspeed_enabled:
            user_model.keeps_float32 = False
        if self.args.user_learning_rate == 0:
            user_model.requires_grad_(False)  # gradients that move nothing would count when gradients are clipped
        attach_user_model(self.model, user_model.float(), user_vocab, tokenizer.bos_token_id)
        get_base_model(self.model).training_settings = scoring_settings(self.args)
        self.user_model, self.user_vocab = user_model, user_vocab
        if self.args.freeze == "shared":
            freeze_shared(self.model, user_model)
        self.embedding_std = measure_embedding_std(self.model, tokenizer)
        self.add_callback(MovementCallback(user_model, self.embedding_std))
        base = get_base_model(self.model)
        if base.can_generate() and (reason := reason_not_to_write(base)) is not None:
            logger.warning("%s.", reason[0].upper() + reason[1:])
        if not isinstance(self.data_collator, DataCollatorForPersonalizedPreference):
            self.data_collator = self.make_collator(user_vocab)
        if self.optimizer is not None:
            add_user_groups(self.optimizer, self.lr_scheduler, self._user_groups(user_model))
        rate = self.args.user_learning_rate
        logger.info(
            "%s with %d known users, user model %r, a new one starts from %r, `user_learning_rate` %s.",
            *(self._name, len(user_vocab), user_model.kind, self.args.soft_prompt_init),
            f"{DEFAULT_STEP} in units of the token embeddings" if rate is None else rate,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if self.user_model is not None and self.args.user_id_column not in columns:
            columns.append(self.args.user_id_column)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with the user model in groups of its own: `user_learning_rate`, no weight decay."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.user_model is not None and created:
            move_to_user_groups(optimizer, self._user_groups(self.user_model))
        return optimizer

    def _user_groups(self, user_model: UserModel) -> list[dict[str, Any]]:
        rate = self.args.user_learning_rate
        if rate is None and self.args.learning_rate == 0:
            rate = 0.0  # a run in which nothing shall move
        return user_groups(user_model, rate, self.embedding_std)

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def terms(self, batch: dict[str, Any]) -> list[Term]:
        """The parts of the loss of a batch that holds the reference's outputs: what is computed for it, in this order."""
        alpha = self.args.personalization_alpha
        if self.model.training and self.args.freeze == "shared":
            alpha = 1.0  # the other term has nothing to move
        own = Term("", alpha, self.user_batch(batch))
        if self.model.training and self.args.generic_term == "sampled":
            return [Term("", 1.0, {**batch, "user_indices": self._sampled_users(batch["user_indices"])})]
        if self.model.training and alpha == 1:  # a term without weight; evaluation reports it all the same
            return [own]
        return [own, Term("generic/", 1 - alpha, self.generic_batch(batch))]

    def _sampled_users(self, user_indices: Tensor) -> Tensor:
        """
        `user_indices`, each example's user with probability `personalization_alpha`, else the generic one. Draws are spread
        evenly over the batch, so that the share of users varies by less than one example.
        """
        num_examples = len(user_indices) // self.rows_per_example
        spread = (torch.randperm(num_examples) + torch.rand(1)) / num_examples
        keeps = (spread < self.args.personalization_alpha).repeat(self.rows_per_example).to(user_indices.device)
        return torch.where(keeps, user_indices, GENERIC_USER_INDEX)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers, with a backward pass for each term of the loss: only one has its activations in memory."""
        with sound_attention(self.accelerator.device):
            if self.user_model is None or not self._may_take_several_backward_passes():
                loss = super().training_step(model, inputs, *args, **kwargs)
            else:
                loss = self._step_of_terms(model, inputs, *args, **kwargs)
        self.divergence.see_loss(loss, model, self.state.global_step + 1)
        return loss

    def _step_of_terms(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        loss: Any = 0.0
        with self.reference_in_batch(self.prepare_batch(model, self._prepare_inputs(inputs))) as batch:
            terms = self.terms(batch)
            for term in terms:
                # DDP exchanges gradients once, in the last pass; under FSDP, `no_sync` would keep whole gradients
                waits = term is not terms[-1] and isinstance(model, nn.parallel.DistributedDataParallel)
                with self.accelerator.no_sync(model) if waits else nullcontext():
                    loss = loss + super().training_step(model, {TERMS: [term]}, *args, **kwargs)
        return loss

    def _may_take_several_backward_passes(self) -> bool:
        """Not where the backend allows a single backward pass a step."""
        return (
            not self.is_deepspeed_enabled
            and not self.args.ddp_static_graph
            and self.accelerator.parallelism_config is None
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of TRL's losses on the terms of a batch, each times its weight, after one pass of the reference for all."""
        if TERMS in inputs:
            return self._sum_of_terms(model, inputs[TERMS], return_outputs, num_items_in_batch)[0]
        if self.user_model is None and self.margin_recorder is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.user_model is not None:
            inputs = self.prepare_batch(model, inputs)
        with self.reference_in_batch(inputs) as batch:
            terms = [Term("", 1.0, batch)] if self.user_model is None else self.terms(batch)
            result, margins = self._sum_of_terms(model, terms, return_outputs, num_items_in_batch)
            if not self.model.training:
                self._record(model, terms[0].batch, margins)
        return result

    def _sum_of_terms(
        self, model: nn.Module, terms: list[Term], return_outputs: bool, num_items_in_batch: Tensor | int | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """The loss (with the first term's outputs, if asked for) and, in evaluation, the margins of each term by scorer."""
        loss: Any = 0.0
        outputs, margins = None, {}
        for number, term in enumerate(terms):
            batch = dict(term.batch)  # some of TRL's trainers write into their batch
            returns = return_outputs and number == 0
            with metrics_under(self, term.prefix), scored_outputs(self.model, self.scored_output) as scored:
                result: Any = super().compute_loss(model, batch, returns, num_items_in_batch)
            term_loss, outputs = result if returns else (result, outputs)
            loss = loss + term.weight * term_loss
            if not self.model.training:
                margins[SCORERS[term.prefix]] = self.pair_margins(term.batch, scored[0])
        return (loss, outputs) if return_outputs else loss, margins

    @contextmanager
    def reference_in_batch(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """`inputs` with the reference's log-probabilities, and TRL set to take them from there."""
        if not self.reference_keys:
            yield inputs
            return
        trainer: Any = self
        precomputed = trainer.precompute_ref_logps
        if not precomputed:
            reference = self.model if trainer.ref_model is None else trainer.ref_model
            found = zip(self.reference_keys, trainer.compute_ref_log_probs(reference, inputs), strict=True)
            inputs = {**inputs, **{name: values for name, values in found if values is not None}}
        trainer.precompute_ref_logps = True
        try:
            yield inputs
        finally:
            trainer.precompute_ref_logps = precomputed


def _let_ddp_take_several_passes(args: Any) -> None:
    """Reentrant checkpointing under DDP needs a static graph, or DDP refuses two policy passes before a backward pass."""
    checkpointing = dict(args.gradient_checkpointing_kwargs or {})
    if checkpointing.get("use_reentrant") and args.ddp_static_graph is None:
        args.ddp_static_graph = True

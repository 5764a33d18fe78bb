"""[`~trl.DPOTrainer`] in which each preference belongs to a user."""

import copy
import logging
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    is_caching_enabled,
    load_from_disk,
)
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer, SyncRefModelCallback, maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..files import checkpoints_newest_first, read_json
from ..models.attach import attach_user_model, detach_user_model, is_personalized
from ..models.loading import (
    HUB_PULL_ARGUMENTS,
    AutoPersonalizedModelForCausalLM,
    check_fingerprints,
    find_user_model,
    is_adapter,
    load_user_model,
    reload_renamed_weights,
)
from ..models.saving import USER_MODEL_FOLDER, full_user_state, get_base_model, save_user_model, set_user_state
from ..user_column import AnyDataset, check_user_column, collect_users, iterate_user_ids
from ..user_models import UserModel, get_user_model_class
from ..user_models.initialization import soft_prompt_drawer
from ..user_models.memory import warn_if_large
from ..user_profile import (
    PLAIN_PROMPT,
    USER_CHOSEN_IDS,
    USER_PROMPT_IDS,
    USER_REJECTED_IDS,
    check_profile_column,
    check_user_prompt,
    with_profile,
    without_profile,
)
from ..users import GENERIC_USER_INDEX, UserVocab
from .collator import DataCollatorForPersonalizedPreference
from .config import PersonalizedDPOConfig
from .prefix_sharing import PackingCost, PairPacker, PrefixSharing, reason_not_to_share
from .reference_cache import keep_tokens, reference_fingerprint, rows_fingerprint, tokens_on_disk
from .user_metrics import MarginRecorder, pair_margins, swapped_user_indices


logger = logging.getLogger(__name__)

EvalDatasets: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]


class SyncPlainRefModelCallback(SyncRefModelCallback):
    """[`~trl.SyncRefModelCallback`] that leaves the user model out: the reference policy has none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sync the reference with all parts of the model but its users."""
        model = kwargs.pop("model")
        if self.accelerator is not None:
            model = self.accelerator.unwrap_model(model)
        plain = nn.ModuleList(part for name, part in model.named_children() if name != "user_model")
        super().on_step_end(args, state, control, model=plain, **kwargs)


class PersonalizedDPOTrainer(DPOTrainer):
    """
    [`~trl.DPOTrainer`] in which each preference belongs to a user (P-DPO, arXiv 2402.05133, eq. 6):

        L = a * DPO(x, y+, y-; user) + (1 - a) * DPO(x, y+, y-; generic user),    a = `personalization_alpha`

    A user model puts a soft prompt in front of the text and is trained along with the policy. The reference policy never sees
    a user and runs once per pair. Everything else is TRL's: losses, PEFT, data formats, evaluation, checkpoints.

    Metrics have TRL's names for the user's term, the same under `generic/`, and in evaluation `users/accuracy_mean`,
    `users/accuracy_worst` and, with two known users or more, `users/accuracy_swapped` (each user's pairs scored with another
    user's soft prompt): means over users, never a number per user.

    Args:
        model, ref_model, ..., peft_config: As in [`~trl.DPOTrainer`]. `model` may also be a folder with a `user_model/`, or
            a model with a user model attached: both are trained on, and new users are appended.
        args ([`PersonalizedDPOConfig`] or [`~trl.DPOConfig`], *optional*): With TRL's, our settings have their defaults.
        train_dataset: As in TRL, with one more column, `args.user_id_column`.
        eval_dataset: Likewise; users who are not in `train_dataset` get the generic user's soft prompt.
        user_vocab ([`UserVocab`] or `list[str]`, *optional*): The known users. Default: those of `train_dataset`, in order of
            first appearance.
        user_model ([`UserModel`], *optional*): An instance, pretrained or of your own, instead of a new one.

    ```python
    trainer = PersonalizedDPOTrainer(model="Qwen/Qwen3-0.6B", args=args, train_dataset=dataset, peft_config=LoraConfig())
    trainer.train()
    trainer.save_model("out")
    ```
    """

    _tag_names = ["trl", "dpo", "p-dpo", "trl-personal"]
    _name = "P-DPO"
    _paper = {
        "title": "Personalized Language Modeling from Personalized Human Feedback",
        "id": "2402.05133",
        "citation": textwrap.dedent("""\
            @article{li2024personalized,
                title   = {{Personalized Language Modeling from Personalized Human Feedback}},
                author  = {Xinyu Li and Ruiyang Zhou and Zachary C. Lipton and Liu Leqi},
                year    = 2024,
                journal = {arXiv preprint arXiv:2402.05133},
            }"""),
    }

    args: PersonalizedDPOConfig
    model: PreTrainedModel | PeftModel
    user_model: UserModel | None
    user_vocab: UserVocab | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        user_vocab: UserVocab | Iterable[str | int] | None = None,
        user_model: UserModel | None = None,
    ) -> None:
        has_settings = isinstance(args, PersonalizedDPOConfig)
        args = _personalized_args(args, model)
        self.user_model, self.user_vocab = None, None
        self.margin_recorder: MarginRecorder | None = None  # what `score_pairs` listens with
        self._reference_fingerprint: str | None = None
        self._packer: PairPacker | None = None
        self._packing_is_checked, self._warned_of_packing = False, False
        self._term: str | None = None  # the one term of the loss that is wanted, else both
        personalized = args.user_model_kind != "none"
        if personalized:
            _refuse_prompt_learning(model, peft_config)
            model, known, quantization_config = _with_known_users(model, args, quantization_config)
            if known is not None and has_settings:
                _check_settings(args, known[0], "the user model in `model`")
            user_model, vocab = _choose_users(args, train_dataset, user_vocab, user_model, known)
            _check_eval_users(args, eval_dataset)
            if args.user_profile_column is not None and compute_metrics is not None:
                raise ValueError(
                    "`compute_metrics` gets the tokens of prompts without profiles, which the logits do not match. Leave out "
                    "`compute_metrics`, or `user_profile_column`."
                )
            checkpointing = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
            if checkpointing.get("use_reentrant") and args.ddp_static_graph is None:
                args.ddp_static_graph = True  # DDP refuses two policy passes before a backward pass otherwise
        elif user_model is not None or user_vocab is not None:
            raise ValueError('`user_model` and `user_vocab` need a `user_model_kind` other than "none".')
        elif args.user_profile_column is not None:
            logger.warning("Plain DPO has no term of the user, so `user_profile_column` is ignored.")

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

        if personalized:
            self._check_rows()
            self._attach(vocab, user_model)

    # --- Set-up -------------------------------------------------------------------------------------------------------

    def _attach(self, user_vocab: UserVocab, user_model: UserModel | None) -> None:
        """Attach the user model. After TRL's own set-up, whose reference, precomputation and hash must not see users."""
        if user_model is None:
            user_model = self._new_user_model(len(user_vocab))
        bos_token_id = self._tokenizer.bos_token_id
        template = None if self.args.user_profile_column is None else self.args.user_profile_template
        attach_user_model(self.model, user_model.float().requires_grad_(True), user_vocab, bos_token_id, template)
        self.user_model, self.user_vocab = user_model, user_vocab
        if not isinstance(self.data_collator, DataCollatorForPersonalizedPreference):
            collator = row_collator = self.data_collator
            if isinstance(collator, DataCollatorForPreference):
                row_collator = replace(collator, max_length=None)
            self.data_collator = DataCollatorForPersonalizedPreference(
                collator,
                user_vocab,
                self.args.user_id_column,
                row_collator,
                self.args.max_length,
                self.args.truncation_mode,
            )
        self._share_prefixes()
        self.data_collator.packer = self._packer
        if self.args.sync_ref_model:
            self.pop_callback(SyncRefModelCallback)
            reference: Any = self.ref_model
            self.add_callback(SyncPlainRefModelCallback(reference, self.accelerator))
        if self.optimizer is not None:
            _add_to_optimizer(self.optimizer, self.lr_scheduler, self._user_group(user_model))
        logger.info("P-DPO with %d known users, user model %r.", len(user_vocab), user_model.kind)

    def _share_prefixes(self) -> None:
        """Let the policy and the reference take packed pairs, if `share_prefix` and the model allow it."""
        if self.args.share_prefix == "never" or self._packer is not None:
            return
        causal_lm = get_base_model(self.model)
        reason = reason_not_to_share(causal_lm.config)
        if self.aux_loss_enabled:
            reason = "the auxiliary loss of the experts counts every token once"
        if self._is_vision_dataset:
            reason = "there are images in the data"
        parallelism = self.accelerator.parallelism_config
        if self.args.n_gpu > 1 or (parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)):
            reason = "rows are split between devices"
        if reason is not None:
            if self.args.share_prefix == "always":
                raise ValueError(f'`share_prefix="always"` is not possible: {reason}. Set it to "auto" or "never".')
            if not self._warned_of_packing:
                logger.warning(
                    "Chosen and rejected do not share the tokens of their prompt, which takes longer: %s. "
                    '`share_prefix="never"` turns this message off.',
                    reason,
                )
            self._warned_of_packing = True
            return
        PrefixSharing(causal_lm)
        if self.ref_model is not None:
            PrefixSharing(get_base_model(self.accelerator.unwrap_model(self.ref_model)))
        cost = PackingCost.of_model(causal_lm, self.args.num_virtual_tokens)
        self._packer = PairPacker(
            cost=None if self.args.share_prefix == "always" else cost, selects=self.accelerator.device.type == "cpu"
        )

    def _new_user_model(self, num_users: int) -> UserModel:
        embedding = get_base_model(self.model).get_input_embeddings()
        user_model_class = get_user_model_class(self.args.user_model_kind)
        sizes: dict[str, Any] = {"num_users": num_users, "token_dim": embedding.embedding_dim}
        for option in {field.name for field in fields(user_model_class.config_class)} - sizes.keys():
            if hasattr(self.args, option):
                sizes[option] = getattr(self.args, option)
        text = self.args.soft_prompt_init_text
        draw = soft_prompt_drawer(
            embedding,
            min(embedding.num_embeddings, len(self._tokenizer)),
            self.args.num_virtual_tokens,
            self.args.soft_prompt_init,
            self.args.seed,
            None if text is None else self._tokenizer(text, add_special_tokens=False)["input_ids"],
        )
        config = user_model_class.config_class(**sizes)
        warn_if_large(user_model_class, config, self.args.user_rank)
        with torch.random.fork_rng():  # the order of the data stays as without users
            torch.manual_seed(self.args.seed)
            user_model = user_model_class(config)
        with gathered_parameters(embedding):
            user_model.initialize(draw)
        return user_model

    def _check_rows(self) -> None:
        """Refuse what would fail at the first step: no rows left, or rows that do not fit the model's positions."""
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) == 0:
            raise ValueError(
                f"No row of the train dataset is left: each prompt alone fills `max_length` ({self.args.max_length}). "
                "Raise `max_length`, or shorten the prompts."
            )
        if self._is_vision_dataset and self.args.user_profile_column is not None:
            raise ValueError("`user_profile_column` does not work with images yet. Put the profiles into the prompts.")
        num_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if num_positions is None or self.args.max_length is None or self._is_vision_dataset:
            return
        length = self.args.max_length
        profile_length = 0  # of the longest profile
        if self.args.user_profile_column is not None and isinstance(self.train_dataset, Dataset):
            rows = self.train_dataset.select_columns(["prompt_ids", USER_PROMPT_IDS])
            profile_length = max(len(row[USER_PROMPT_IDS]) - len(row["prompt_ids"]) for row in rows)
        if length > num_positions and isinstance(self.train_dataset, Dataset):
            length = max(  # `max_length` is a default, most likely: look at the rows
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
                for row in self.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
            )
            length = min(length, self.args.max_length)
        extra = self.args.num_virtual_tokens + profile_length
        if length + extra > num_positions:
            profiles = f", and {profile_length} for a profile" if profile_length else ""
            raise ValueError(
                f"The model has {num_positions} positions, but a row can need {length} for text and "
                f"{self.args.num_virtual_tokens} for the soft prompt{profiles}. Set `max_length` to "
                f"{num_positions - extra} or less, or use fewer `num_virtual_tokens`."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if self.user_model is not None and self.args.user_id_column not in columns:
            columns.extend([self.args.user_id_column, USER_PROMPT_IDS])

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> AnyDataset:
        """As in TRL; with `user_profile_column`, each row also gets `user_prompt_ids`, by TRL's own tokenization."""
        prepare, args = super()._prepare_dataset, PersonalizedDPOConfig.from_dpo_config(args)
        column = args.user_profile_column
        if column is None or args.user_model_kind == "none":
            return prepare(dataset, processing_class, args, dataset_name)
        options: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        whole_rows = copy.copy(args)
        whole_rows.max_length = None  # no row is dropped for the length of its profile
        with args.main_process_first():
            dataset = dataset.map(maybe_extract_prompt, **options)
            render = {"column": column, "template": args.user_profile_template, "bos_token": self._tokenizer.bos_token}
            dataset = dataset.map(with_profile, fn_kwargs=render, **options)
        try:
            dataset = prepare(dataset, processing_class, whole_rows, f"{dataset_name} (with profiles)")
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses a system turn, which is where a profile goes ({error}). Use another chat "
                "template, or put the profile into the first message yourself."
            ) from error
        with args.main_process_first():
            dataset = dataset.map(without_profile, **options)
        dataset = prepare(dataset, processing_class, args, dataset_name)
        with args.main_process_first():
            limits = {"column": column, "max_length": args.max_length}
            dataset = dataset.map(check_user_prompt, fn_kwargs=limits, **options)
        return dataset.remove_columns([PLAIN_PROMPT, USER_CHOSEN_IDS, USER_REJECTED_IDS])

    def _user_group(self, user_model: UserModel) -> dict[str, Any]:
        group: dict[str, Any] = {"params": list(user_model.parameters()), "weight_decay": 0.0}
        if self.args.user_learning_rate is not None:
            group["lr"] = self.args.user_learning_rate
        return group

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with the user model in a group of its own: `user_learning_rate`, no weight decay."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.user_model is not None and created:
            group = self._user_group(self.user_model)
            user_parameters = {id(parameter) for parameter in group["params"]}
            for other in optimizer.param_groups:
                other["params"] = [p for p in other["params"] if id(p) not in user_parameters]
            optimizer.add_param_group(group)
        return optimizer

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """As in TRL, under a key of what the reference depends on: its weights and the tokens, but no setting of users."""
        if self.args.user_model_kind == "none" or not isinstance(dataset, Dataset) or not is_caching_enabled():
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._reference_fingerprint is None:
            self._reference_fingerprint = reference_fingerprint(self.ref_model, self.model)
        self._precompute_model_hash = self._reference_fingerprint
        key = rows_fingerprint(dataset, (self.args.max_length, self.args.truncation_mode, self.args.ld_alpha))
        tokens = copy.copy(dataset)
        if not dataset.cache_files:
            folder = tokens_on_disk(key)
            if self.accelerator.is_main_process:
                keep_tokens(dataset, folder)
            self.accelerator.wait_for_everyone()
            tokens = load_from_disk(folder)
        tokens._fingerprint = key
        self._share_prefixes()
        scored = super()._precompute_ref_logps(tokens, name, batch_size)
        log_probs = scored.select_columns(["ref_chosen_logps", "ref_rejected_logps"])
        return concatenate_datasets([dataset, log_probs], axis=1)

    # --- Loss ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers, with a backward pass for each term of the loss: only one has its activations in memory."""
        if self.user_model is None or not self._has_two_backward_passes():
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._with_checked_packing(model, self._prepare_inputs(inputs))
        with self._reference_in_batch(inputs) as inputs:
            # under FSDP, `no_sync` would keep whole gradients: there, both passes reduce theirs
            is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
            with self._only("user"), self.accelerator.no_sync(model) if is_ddp else nullcontext():
                loss = super().training_step(model, inputs, *args, **kwargs)
            with self._only("generic"):
                return loss + super().training_step(model, inputs, *args, **kwargs)

    def _has_two_backward_passes(self) -> bool:
        """Not where there is one term, nor where the backend allows a single backward pass a step."""
        return (
            self.args.personalization_alpha < 1
            and self.args.generic_term == "exact"
            and not self.is_deepspeed_enabled
            and not self.args.ddp_static_graph
            and self.accelerator.parallelism_config is None
        )

    @contextmanager
    def _only(self, term: str) -> Iterator[None]:
        self._term = term
        try:
            yield
        finally:
            self._term = None

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As in TRL. The reference policy does not see users."""
        inputs = _without_users(inputs)
        if self.user_model is None and self._packer is not None:  # precomputing, with TRL's own collator
            packed = self._packer(inputs)
            inputs |= {} if packed is None else {"packed_pairs": packed}
        return super().compute_ref_log_probs(model, self._with_checked_packing(model, inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss for the user and for the generic user, mixed by `personalization_alpha`; one reference pass for both."""
        if self.user_model is None:
            if self.margin_recorder is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with self._reference_in_batch(inputs) as inputs, self._recorded_log_probs() as recorded:
                result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            margins = {"own": self._pair_margins(inputs, recorded[0])}
            self.margin_recorder.add(self.accelerator.gather_for_metrics(margins))
            return result
        inputs = self._with_checked_packing(model, inputs)
        if self.model.training and self.args.generic_term == "sampled":
            with self._reference_in_batch(inputs) as inputs:
                inputs = {**inputs, "user_indices": self._sampled_users(inputs["user_indices"])}
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        alpha = self.args.personalization_alpha
        loss, outputs = 0.0, None
        inputs, user_prompts = _take_user_prompts(inputs)
        with self._reference_in_batch(inputs) as inputs:
            user_inputs = {**_without(inputs, "packed_pairs"), **user_prompts} if user_prompts else inputs
            if self._term != "generic":
                with self._recorded_log_probs() as recorded:
                    result = super().compute_loss(model, user_inputs, return_outputs, num_items_in_batch)
                user_loss, outputs = result if return_outputs else (result, None)
                loss = alpha * user_loss
            # training on the users' term alone needs no second pass
            if self._term != "user" and (alpha < 1 or not self.model.training):
                generic_users = torch.full_like(inputs["user_indices"], GENERIC_USER_INDEX)
                with self._metrics_under("generic/"), self._recorded_log_probs() as recorded_generic:
                    generic_loss = super().compute_loss(model, {**inputs, "user_indices": generic_users})
                loss = loss + (1 - alpha) * generic_loss
            if not self.model.training:
                self._count_users(model, user_inputs, recorded[0], self._pair_margins(inputs, recorded_generic[0]))
        return (loss, outputs) if return_outputs else loss

    def _sampled_users(self, user_indices: Tensor) -> Tensor:
        """
        `(2 * batch,)`, each pair's user with probability `personalization_alpha`, else the generic one. Draws are spread
        evenly over the batch, so that the share of users varies by less than one pair.
        """
        num_pairs = len(user_indices) // 2
        spread = (torch.randperm(num_pairs) + torch.rand(1)) / num_pairs
        keeps = (spread < self.args.personalization_alpha).repeat(2).to(user_indices.device)
        return torch.where(keeps, user_indices, GENERIC_USER_INDEX)

    def _with_checked_packing(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs`, without `packed_pairs` if the first batch came out differently with them."""
        if self._packer is not None and not self._packing_is_checked:
            self._check_packing(model, inputs)
        return inputs if self._packer is not None else _without(inputs, "packed_pairs", "user_packed_pairs")

    def _check_packing(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Score a batch in two rows a pair and packed, and give up packing if that differs. Each process takes two passes."""
        packed = PairPacker()(_without_users(_without(inputs, "packed_pairs")))
        if packed is None and self.accelerator.num_processes == 1:
            return  # wait for a batch that can be packed; several processes must take the same passes
        self._packing_is_checked = True
        call = {name: inputs[name] for name in ("input_ids", "attention_mask", "user_indices") if name in inputs}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with torch.no_grad(), self.accelerator.autocast(), _evaluating(model):
            plain, shared = (
                model(**call, **more, labels=labels, use_cache=False, fused_lm_head=True).log_probs.float()
                for more in ({}, {} if packed is None else {"packed_pairs": packed})
            )
        difference = (plain - shared).abs()
        found = torch.stack([difference.max(), difference.sum() / (labels != -100).sum().clamp(min=1)])
        highest, mean = self.accelerator.gather(found[None]).amax(dim=0).tolist()
        is_exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        is_exact &= not getattr(get_base_model(self.model), "is_quantized", False)
        if not (highest <= 1e-3 if is_exact else mean <= 5e-2):  # NaN fails too
            logger.warning(
                "Packed and separate rows of the first batch differ in log-probability by up to %.2g (mean %.2g): chosen and "
                "rejected do not share their prompt in this run.",
                highest,
                mean,
            )
            self._packer = None
            if isinstance(self.data_collator, DataCollatorForPersonalizedPreference):
                self.data_collator.packer = None

    @contextmanager
    def _reference_in_batch(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """`inputs` with the reference's log-probabilities, and TRL set to take them from there."""
        precomputed = self.precompute_ref_logps
        if not precomputed:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True
        try:
            yield inputs
        finally:
            self.precompute_ref_logps = precomputed

    @contextmanager
    def _metrics_under(self, prefix: str) -> Iterator[None]:
        """Keep what TRL logs inside under `prefix`, or nowhere if that is empty. Tokens are not counted again."""
        metrics, num_tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}
        try:
            yield
        finally:
            logged, self._metrics, self._total_train_tokens = self._metrics, metrics, num_tokens
        for mode, values in logged.items():
            for name, numbers in values.items():
                if prefix and name != "num_tokens":
                    metrics[mode][prefix + name].extend(numbers)

    @contextmanager
    def _recorded_log_probs(self) -> Iterator[list[Tensor]]:
        """The per-token log-probabilities `(2 * batch, seq_len - 1)` of the forward passes inside, for evaluation."""
        recorded: list[Tensor] = []
        if self.model.training:
            yield recorded
            return
        handle = self.model.register_forward_hook(
            lambda module, args, output: recorded.append(output.log_probs) if "log_probs" in output else None
        )
        try:
            yield recorded
        finally:
            handle.remove()

    def _count_users(
        self, model: nn.Module, inputs: dict[str, Any], log_probs: Tensor, generic_margins: Tensor
    ) -> None:
        """Evaluation: how pairs come out with the own soft prompt, the generic one, and that of another user."""
        if self.margin_recorder is None:
            self.margin_recorder = MarginRecorder(self._other_users())
        recorder = self.margin_recorder
        margins = {"own": self._pair_margins(inputs, log_probs), "generic": generic_margins}
        for name, rows in recorder.other_users.items():
            other = {**inputs, "user_indices": rows.to(inputs["user_indices"].device)[inputs["user_indices"]]}
            with self._metrics_under(""), self._recorded_log_probs() as recorded:
                super().compute_loss(model, other)
            margins[name] = self._pair_margins(inputs, recorded[0])
        user_indices = inputs["user_indices"].chunk(2)[0]
        user_indices, margins = self.accelerator.gather_for_metrics((user_indices, margins))
        recorder.add(margins, user_indices)

    def _other_users(self) -> dict[str, Tensor]:
        num_users = len(self.user_vocab or ())
        if num_users < 2:
            return {}
        # a profile stays with its pair, whoever's soft prompt it is scored with: the name says so
        name = "swapped" if self.args.user_profile_column is None else "swapped_soft_prompt"
        return {name: swapped_user_indices(torch.arange(num_users + 1), num_users)}

    def _pair_margins(self, inputs: dict[str, Any], log_probs: Tensor) -> Tensor:
        return pair_margins(
            log_probs,
            inputs["completion_mask"],
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            self.ld_alpha,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in transformers. The recorder gets the prepared dataset, as it needs to know which rows truncation left."""
        if self.margin_recorder is not None:
            prepared: Any = self.eval_dataset
            if eval_dataset is not None:
                prepared = prepared[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
            self.margin_recorder.see(prepared)
        return super().get_eval_dataloader(eval_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; at the end of an evaluation with the accuracy over users."""
        if self.user_model is not None and self.margin_recorder is not None and not self.model.training:
            recorder, self.margin_recorder = self.margin_recorder, None
            self._metrics["eval"].update({name: [value] for name, value in recorder.metrics().items()})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: EvalDatasets | str | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL. A dataset passed here is checked for its users first."""
        if self.user_model is not None:
            if self.margin_recorder is not None and len(self.margin_recorder):
                self.margin_recorder = None  # `predict` counts too, and logs nothing
            if not isinstance(eval_dataset, str):
                _check_eval_users(self.args, eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # --- Saving and loading: overridden as a set; what is written is in `PersonalizedSaving` ----------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True and self.user_model is not None:
            resume_from_checkpoint = _last_whole_checkpoint(Path(str(self.args.output_dir))) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers. Where FSDP2 or ZeRO-3 may write shards only, the user model is gathered and written here."""
        super().save_model(output_dir, _internal_call)
        if self.user_model is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            with gathered_parameters(self.user_model):
                state = full_user_state(self.user_model)
                if self.args.should_save:
                    save_user_model(self.model, Path(output_dir or str(self.args.output_dir)), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.user_model is not None:
            self._load_user_model(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.user_model is not None and not self.is_fsdp_enabled:
            reload_renamed_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.user_model is not None and not self.is_deepspeed_enabled:  # DeepSpeed's own files hold every module
            self._load_user_model(str(self.state.best_model_checkpoint))
            if not self.is_fsdp_enabled:
                reload_renamed_weights(self.model, Path(str(self.state.best_model_checkpoint)))

    def _load_user_model(self, checkpoint: str) -> None:
        folder = find_user_model(checkpoint)
        if folder is None:
            raise ValueError(
                f"{checkpoint} has no `{USER_MODEL_FOLDER}/` folder: it is not a checkpoint of personalized training. Start "
                'without `resume_from_checkpoint`, or train with `user_model_kind="none"`.'
            )
        saved, vocab, config = load_user_model(folder)
        check_fingerprints(folder.parent, config)
        if vocab != self.user_vocab:
            raise ValueError(
                f"{checkpoint} was trained on {len(vocab)} users, this run has {len(self.user_vocab or ())}, or another "
                "order of them. Resume with the same dataset or `user_vocab`; to add users, pass the folder as `model`."
            )
        assert self.user_model is not None
        set_user_state(self.user_model, saved.state_dict())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card, with a section on users."""
        super().create_model_card(*args, **kwargs)
        if self.user_model is not None and self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            card = ModelCard.load(path, ignore_metadata_errors=True)
            card.text = _with_users_section(card.text, self.hub_model_id, self.user_model, self.args)
            card.save(path)


def _without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def _without_users(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith("user_")}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """
    Modules as in `eval()`: nothing is drawn at random, also where dropout is no module (OPT), so that runs go on as without.
    Quantized layers stay as they are: on a CPU, bitsandbytes packs their weights for good.
    """
    modules = [module for module in model.modules() if module.training and not hasattr(module, "quant_state")]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def _take_user_prompts(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch without the rows that have profiles in them, and those rows under the names that TRL gives rows."""
    names = [name for name in inputs if name.startswith("user_") and name != "user_indices"]
    plain = {name: value for name, value in inputs.items() if name not in names}
    return plain, {name.removeprefix("user_"): inputs[name] for name in names}


def gathered_parameters(module: nn.Module) -> AbstractContextManager[Any]:
    """Under DeepSpeed ZeRO-3 each rank holds a part of a parameter: inside, `module` has all of them."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


# --- Which users, which user model ------------------------------------------------------------------------------------


def _personalized_args(args: DPOConfig | None, model: str | nn.Module) -> PersonalizedDPOConfig:
    if args is None:
        name = model if isinstance(model, str) else str(model.config.name_or_path)  # type: ignore[union-attr]
        return PersonalizedDPOConfig(f"{name.split('/')[-1]}-P-DPO")
    return PersonalizedDPOConfig.from_dpo_config(args)


def _refuse_prompt_learning(model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, PeftModel):
        configs.extend(model.peft_config.values())
    for config in configs:
        if config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__name__} (prompt learning) cannot be combined with users: both put virtual tokens in front "
                "of the text. Use LoRA or another adapter, or no `peft_config`."
            )


def _with_known_users(
    model: str | PreTrainedModel | PeftModel,
    args: PersonalizedDPOConfig,
    quantization_config: BitsAndBytesConfig | None,
) -> tuple[Any, tuple[UserModel, UserVocab] | None, BitsAndBytesConfig | None]:
    """
    The model as TRL shall load it, with the user model and vocabulary that it comes with, if any.

    A folder with a full model is left to TRL. An adapter is loaded here, as TRL loads no adapter by its name.
    """
    if not isinstance(model, str):
        return model, detach_user_model(model) if is_personalized(model) else None, quantization_config
    kwargs = {"dtype": torch.float32, **dict(args.model_init_kwargs or {})}  # type: ignore[arg-type]
    hub_kwargs = {name: kwargs[name] for name in HUB_PULL_ARGUMENTS if name in kwargs}
    folder = find_user_model(model, **hub_kwargs)
    if folder is None:
        return model, None, quantization_config
    if not is_adapter(model, **hub_kwargs):
        user_model, user_vocab, config = load_user_model(folder)
        if Path(model).is_dir():  # the weights of a repository are not here yet
            check_fingerprints(folder.parent, config)
        return model, (user_model, user_vocab), quantization_config
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(model, is_trainable=True, **kwargs)
    return loaded, detach_user_model(loaded), None


def _check_settings(args: PersonalizedDPOConfig, user_model: UserModel, source: str, strict: bool = True) -> None:
    """Refuse `args` that contradict a user model; unless `strict`, a setting left at its default does not."""
    defaults = {field.name: field.default for field in fields(args)}
    found = {"user_model_kind": user_model.kind, "num_virtual_tokens": user_model.config.num_virtual_tokens}
    for name, value in found.items():
        setting = getattr(args, name)
        if setting != value and (strict or setting != defaults[name]):
            raise ValueError(
                f"`{name}` is {setting!r} in the arguments, but {value!r} in {source}. Set `{name}={value!r}`, or start from "
                "another user model."
            )


def _choose_users(
    args: PersonalizedDPOConfig,
    train_dataset: AnyDataset | None,
    user_vocab: UserVocab | Iterable[str | int] | None,
    user_model: UserModel | None,
    known: tuple[UserModel, UserVocab] | None,
) -> tuple[UserModel | None, UserVocab]:
    """The user model to train (`None`: a new one) and its vocabulary."""
    if known is not None and user_model is not None:
        raise ValueError(
            "There are two user models: one in `model`, one in `user_model`. Leave `user_model` out to train on the one in "
            "`model`, or pass the plain language model."
        )
    if user_vocab is not None and not isinstance(user_vocab, UserVocab):
        user_vocab = UserVocab(user_vocab)
    vocab = _vocab_of(args, train_dataset, user_vocab)
    if known is not None:
        vocab = known[1].extend(vocab)
        warn_if_large(type(known[0]), replace(known[0].config, num_users=len(vocab)), args.user_rank)
        user_model = known[0].resize(len(vocab))
    elif user_model is not None:
        _check_settings(args, user_model, "`user_model`", strict=False)
        if user_model.config.num_users != len(vocab):
            raise ValueError(
                f"`user_model` has rows for {user_model.config.num_users} users, the vocabulary has {len(vocab)}. Pass the "
                "`user_vocab` it was made for, or a user model of that many users."
            )
    if user_model is not None:
        args.user_model_kind, args.num_virtual_tokens = user_model.kind, user_model.config.num_virtual_tokens
    return user_model, vocab


def _vocab_of(
    args: PersonalizedDPOConfig, train_dataset: AnyDataset | None, user_vocab: UserVocab | None
) -> UserVocab:
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        return user_vocab or UserVocab()  # TRL says what is wrong
    check_user_column(train_dataset, args.user_id_column, "train")
    if args.user_profile_column is not None:
        check_profile_column(train_dataset, args.user_profile_column, "train")
    if user_vocab is None:
        return collect_users(train_dataset, args.user_id_column)
    if isinstance(train_dataset, Dataset):
        user_ids = [u for u in iterate_user_ids(train_dataset, args.user_id_column, "train") if u is not None]
        unknown = sum(user_id not in user_vocab for user_id in user_ids)
        if unknown:
            logger.warning(
                "%d of %d rows of the train dataset have a user who is not in `user_vocab`; they train the generic user.",
                unknown,
                len(train_dataset),
            )
    return user_vocab


def _check_eval_users(args: PersonalizedDPOConfig, eval_dataset: EvalDatasets | None) -> None:
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in datasets.items():
        if not isinstance(dataset, (Dataset, IterableDataset)):
            continue
        check_user_column(dataset, args.user_id_column, name)
        if args.user_profile_column is not None:
            check_profile_column(dataset, args.user_profile_column, name)
        if isinstance(dataset, Dataset):
            for _ in iterate_user_ids(dataset, args.user_id_column, name):
                pass  # a bad id raises


def _add_to_optimizer(optimizer: torch.optim.Optimizer, scheduler: object | None, group: dict[str, Any]) -> None:
    """Add the user model to an optimizer that the caller made, unless it is there."""
    present = {id(parameter) for other in optimizer.param_groups for parameter in other["params"]}
    if all(id(parameter) in present for parameter in group["params"]):
        return
    if scheduler is not None:
        raise ValueError(
            "The optimizer in `optimizers` does not hold the user model's parameters, and a scheduler is bound to it already. "
            "Pass the optimizer alone (the user model is then added to it), or make a `user_model` first and include it."
        )
    optimizer.add_param_group(group)


def _last_whole_checkpoint(output_dir: Path) -> str | None:
    """The last checkpoint with a readable `trainer_state.json`, which is written last; a warning for those passed over."""
    for path in checkpoints_newest_first(output_dir):
        try:
            read_json(path / "trainer_state.json")
        except (FileNotFoundError, ValueError):
            logger.warning("%s was not written to its end and is passed over.", path)
        else:
            return str(path)
    return None


def _with_users_section(
    text: str, hub_model_id: str | None, user_model: UserModel, args: PersonalizedDPOConfig
) -> str:
    section = textwrap.dedent(f"""\
        ## Users

        This model writes differently for different users. `user_model/` beside the weights maps {user_model.config.num_users}
        users to soft prompts of {user_model.config.num_virtual_tokens} vectors (kind `{user_model.kind}`,
        personalization_alpha {args.personalization_alpha}). Unknown users get the generic user's soft prompt. Loaded without
        `trl_personal`, it is a plain language model.

        ```python
        from transformers import AutoTokenizer
        from trl_personal import AutoPersonalizedModelForCausalLM

        name = "{hub_model_id}"
        model = AutoPersonalizedModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        user_id = next(iter(model.user_vocab))
        inputs = tokenizer(["..."], return_tensors="pt")
        print(tokenizer.batch_decode(model.generate(**inputs, user_ids=[user_id], max_new_tokens=64)))
        ```

        """)
    marker = "## Training procedure"
    return text.replace(marker, section + marker, 1) if marker in text else text + "\n" + section

"""[`~trl.DPOTrainer`] in which each preference belongs to a user."""

import copy
import logging
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, is_caching_enabled, load_from_disk
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
from trl import DPOConfig, DPOTrainer, SyncRefModelCallback, maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..models.saving import get_base_model
from ..user_column import AnyDataset
from ..user_models import UserModel
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
from ..users import UserVocab
from .collator import DataCollatorForPersonalizedPreference
from .config import PersonalizedDPOConfig
from .mixin import PersonalizedTrainerMixin
from .packing import SharedPrompts, pack_for_reference
from .precision import keep_quantized_weights
from .reference_cache import keep_tokens, reference_fingerprint, rows_fingerprint, tokens_on_disk
from .run_users import EvalDatasets
from .user_metrics import pair_margins


logger = logging.getLogger(__name__)


class SyncPlainRefModelCallback(SyncRefModelCallback):
    """[`~trl.SyncRefModelCallback`] that leaves the user model out: the reference policy has none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sync the reference with all parts of the model but its users."""
        model = kwargs.pop("model")
        if self.accelerator is not None:
            model = self.accelerator.unwrap_model(model)
        plain = nn.ModuleList(part for name, part in model.named_children() if name != "user_model")
        super().on_step_end(args, state, control, model=plain, **kwargs)


class PersonalizedDPOTrainer(PersonalizedTrainerMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] in which each preference belongs to a user (P-DPO, arXiv 2402.05133, eq. 6):

        L = a * DPO(x, y+, y-; user) + (1 - a) * DPO(x, y+, y-; generic user),    a = `personalization_alpha`

    A user model puts a soft prompt in front of the text and is trained along with the policy. The reference policy never sees
    a user and runs once per pair. Everything else is TRL's: losses, PEFT, data formats, evaluation, checkpoints.

    Metrics have TRL's names for the user's term, the same under `generic/`, and in evaluation `users/accuracy_mean`,
    `users/accuracy_worst` and, with two known users or more, `users/accuracy_swapped` (each user's pairs scored with another
    user's soft prompt): means over users, never a number per user.

    Args:
        model, ref_model, ..., peft_config: The arguments of [`~trl.DPOTrainer`]. `model` may also be a folder with a
            `user_model/`, or a model with a user model attached: both are trained on, and new users are appended.
        args ([`PersonalizedDPOConfig`] or [`~trl.DPOConfig`], *optional*): With TRL's, our settings have their defaults.
        train_dataset (`Dataset` or `IterableDataset`): TRL's preference rows with one more column, `args.user_id_column`.
        eval_dataset (*optional*): One or more datasets with the same columns. Users who are not in `train_dataset` get the
            generic user's soft prompt.
        user_vocab ([`UserVocab`] or `list[str]`, *optional*): The known users. Defaults to those of `train_dataset`, in order
            of first appearance.
        user_model ([`UserModel`], *optional*): An instance, pretrained or of your own, instead of a new one. Parameters that
            you have frozen (`requires_grad_(False)`) stay frozen.

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

    config_class = PersonalizedDPOConfig
    rows_per_example = 2
    reference_keys = ("ref_chosen_logps", "ref_rejected_logps")
    scored_output = "log_probs"

    args: PersonalizedDPOConfig

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
        if args.user_profile_column is not None:
            if args.user_model_kind == "none":
                logger.warning("Vanilla DPO has no term of the user, so `user_profile_column` is ignored.")
            elif compute_metrics is not None:
                raise ValueError(
                    "`compute_metrics` gets the tokens of prompts without profiles, which the logits do not match. Leave out "
                    "`compute_metrics`, or `user_profile_column`."
                )
        self.shared_prompts = SharedPrompts(self)
        self._reference_fingerprint: str | None = None
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
            has_settings=has_settings,
            user_vocab=user_vocab,
            user_model=user_model,
        )

    def _attach(self, user_vocab: UserVocab, user_model: UserModel | None) -> None:
        self._check_rows()
        super()._attach(user_vocab, user_model)
        if self.args.user_profile_column is not None:
            get_base_model(self.model).user_profile_template = self.args.user_profile_template
        self.shared_prompts.start()
        collator: Any = self.data_collator
        collator.packer = self.shared_prompts.packer
        if self.args.sync_ref_model:
            self.pop_callback(SyncRefModelCallback)
            reference: Any = self.ref_model
            self.add_callback(SyncPlainRefModelCallback(reference, self.accelerator))

    def make_collator(self, user_vocab: UserVocab) -> DataCollatorForPersonalizedPreference:
        """TRL's collator with users; prompts with profiles are truncated as their plain rows are."""
        collator = super().make_collator(user_vocab)
        plain: Any = self.data_collator
        collator.row_collator = plain
        if isinstance(plain, DataCollatorForPreference):
            collator.row_collator = replace(plain, max_length=None)
        collator.max_length, collator.truncation_mode = self.args.max_length, self.args.truncation_mode
        return collator

    # --- Margins and profiles -------------------------------------------------------------------------------------------

    def pair_margins(self, batch: dict[str, Any], output: Tensor) -> Tensor:
        """See [`~training.user_metrics.pair_margins`]."""
        chosen, rejected = (batch[name] for name in self.reference_keys)
        return pair_margins(output, batch["completion_mask"], chosen, rejected, self.ld_alpha)

    def other_users(self) -> dict[str, Tensor]:
        """Another user's prompt for each. A profile stays with its pair, only the soft prompt is swapped; the name says so."""
        others = super().other_users()
        if self.args.user_profile_column is None:
            return others
        return {f"{name}_soft_prompt": rows for name, rows in others.items()}

    def user_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """With profiles, the rows in which they are, under the names that TRL gives rows."""
        plain, with_profiles = _split_profiles(batch)
        if not with_profiles:
            return batch
        return {name: value for name, value in plain.items() if name != "packed_pairs"} | with_profiles

    def generic_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The rows without profiles: nothing is known about the generic user."""
        return super().generic_batch(_split_profiles(batch)[0])

    def check_columns(self, args: Any, dataset: AnyDataset, name: str) -> None:
        """Refuse a dataset without users, or without profiles where `user_profile_column` asks for them."""
        super().check_columns(args, dataset, name)
        if args.user_profile_column is not None:
            check_profile_column(dataset, args.user_profile_column, name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if self.user_model is not None and USER_PROMPT_IDS not in columns:
            columns.append(USER_PROMPT_IDS)

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> AnyDataset:
        """As in TRL; with `user_profile_column`, each row also gets `user_prompt_ids`, by TRL's own tokenization."""
        prepare, args = super()._prepare_dataset, PersonalizedDPOConfig.from_trl_config(args)
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
        profile_length = 0  # the most tokens that a profile adds to a row
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

    # --- The reference --------------------------------------------------------------------------------------------------

    def prepare_batch(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, with packed pairs if packing is right for the model: the first batch is scored both ways."""
        return self.shared_prompts.checked(model, batch)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As in TRL. The reference policy does not see users."""
        inputs = {name: value for name, value in inputs.items() if not name.startswith("user_")}
        if self.user_model is None:  # precomputing, with TRL's own collator
            inputs = pack_for_reference(self.shared_prompts.packer, inputs)
        return super().compute_ref_log_probs(model, self.shared_prompts.checked(model, inputs))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """As in TRL, but cached by the reference's weights and the tokens only: runs with other user settings share it."""
        if self.args.user_model_kind != "none":
            keep_quantized_weights(self.model)
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
        self.shared_prompts.start()
        scored = super()._precompute_ref_logps(tokens, name, batch_size)
        log_probs = scored.select_columns(list(self.reference_keys))
        return concatenate_datasets([dataset, log_probs], axis=1)


def _split_profiles(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch without the rows that have profiles in them, and those rows under the names that TRL gives rows."""
    names = [name for name in batch if name.startswith("user_") and name != "user_indices"]
    plain = {name: value for name, value in batch.items() if name not in names}
    return plain, {name.removeprefix("user_"): batch[name] for name in names}


def _personalized_args(args: DPOConfig | None, model: str | nn.Module) -> PersonalizedDPOConfig:
    if args is None:
        name = model if isinstance(model, str) else str(model.config.name_or_path)  # type: ignore[union-attr]
        return PersonalizedDPOConfig(f"{name.split('/')[-1]}-P-DPO")
    return PersonalizedDPOConfig.from_trl_config(args)

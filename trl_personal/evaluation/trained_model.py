"""A trainer around a trained model, to score pairs as its own training would."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor, PrinterCallback

from .. import AutoPersonalizedModelForCausalLM, PersonalizedDPOConfig, PersonalizedDPOTrainer
from ..files import read_json
from ..models.attach import is_personalized
from ..models.loading import find_user_model, is_adapter, load_language_model
from ..models.saving import get_base_model
from ..user_column import iterate_user_ids
from ..user_models import UserModel
from ..users import UserVocab
from .saved_settings import SCORING


def make_scoring_trainer(
    name: str,
    dataset: Dataset,
    settings: Mapping[str, Any],
    *,
    ref_model: str | None = None,
    batch_size: int = 8,
    disable_tqdm: bool = False,
    **model_kwargs: Any,
) -> PersonalizedDPOTrainer:
    """
    The model in a folder that training wrote, in a [`PersonalizedDPOTrainer`] for [`~evaluation.scoring.score_pairs`].

    `trainer.train_dataset` is `dataset`, prepared. The reference is the base model of an adapter, without it, or `ref_model`.

    Args:
        name (`str`): A folder or a repository, with a `user_model/` or without.
        dataset (`Dataset`): Pairs to score.
        settings (`Mapping`): From [`~evaluation.saved_settings.read_training_settings`]; what is missing has TRL's defaults.
        ref_model (`str`, *optional*): The model that training started from; needed for a full model, whose files do not say.
        batch_size (`int`, *optional*, defaults to `8`): Pairs at a time.
        disable_tqdm (`bool`, *optional*): No progress bars.
        **model_kwargs: Of `from_pretrained`, such as `dtype`.

    Raises:
        `ValueError`: if a full model comes without `ref_model`; or as loading and the trainer do.
    """
    if not is_adapter(name) and ref_model is None:
        raise ValueError(
            f"{name} holds a whole language model, and nothing says which model its training started from: margins are "
            "relative to that one. Name it with `--ref_model` (a folder, or a name on the hub)."
        )
    load: Any = AutoPersonalizedModelForCausalLM.from_pretrained if find_user_model(name) else load_language_model
    model = load(name, **model_kwargs)
    user_settings: dict[str, Any] = {"user_model_kind": "none"}
    vocab: UserVocab | None = None
    if is_personalized(model):
        user_model: UserModel = get_base_model(model).user_model
        vocab = get_base_model(model).user_vocab
        user_settings = {
            "user_model_kind": user_model.kind,
            "num_virtual_tokens": user_model.config.num_virtual_tokens,
        }
    args = PersonalizedDPOConfig(
        **{key: value for key, value in settings.items() if key in SCORING}
        | machine_settings(settings)
        | user_settings,
        output_dir=str(Path(gettempdir()) / "trl_personal_eval"),
        per_device_eval_batch_size=batch_size,
        disable_tqdm=disable_tqdm,
        gradient_checkpointing=False,
        report_to="none",
    )
    column = args.user_id_column
    reference: Any = None if ref_model is None else load_language_model(ref_model, **model_kwargs)
    trainer = PersonalizedDPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=dataset if vocab is None else _with_known_users(dataset, column, vocab),
        processing_class=AutoProcessor.from_pretrained(processor_name(name)),
        user_vocab=vocab,
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer.model, PeftModel) and "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # TRL's copy of the adapter: training would go on from there
    trainer.model.eval()
    return trainer


def machine_settings(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Mixed precision as in the training, where there is an accelerator; none of it on a CPU."""
    if torch.accelerator.is_available():
        return {name: bool(settings.get(name, False)) for name in ("bf16", "fp16")}
    return {"use_cpu": True, "bf16": False, "fp16": False}


def processor_name(name: str) -> str:
    """Where a model's tokenizer is: an adapter that was saved without one has its base model's."""
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return name
    return read_json(folder / "adapter_config.json")["base_model_name_or_path"]


def _with_known_users(dataset: Dataset, column: str, vocab: UserVocab) -> Dataset:
    """Strangers become the generic user, whose prompt they get, so that nobody is added to the vocabulary."""
    users = [user if user in vocab else None for user in iterate_user_ids(dataset, column, "evaluation")]
    rest = dataset.remove_columns(column)
    return rest.add_column(column, users, feature=None)

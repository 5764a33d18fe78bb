"""A model that training wrote: its log, and a trainer around it that scores pairs as its own training would."""

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor, PrinterCallback

from ..files import checkpoints_newest_first, read_json
from ..models.loading import AutoPersonalizedModelForCausalLM, find_user_model, is_adapter, load_language_model
from ..models.saving import get_base_model, is_personalized
from ..training.config import PersonalizedDPOConfig
from ..training.dpo import PersonalizedDPOTrainer
from ..training.settings import SCORING
from ..training.teaching_rows import rows_that_teach
from ..user_column import iterate_user_ids
from ..user_models import UserModel
from ..users import UserVocab
from ..writing import processor_name
from .scoring import with_row_numbers


PAIRS = "pairs"  # the name of the held-out pairs among the eval datasets of a scoring trainer
STATE_FILE = "trainer_state.json"


def read_log_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log of the trainer, from `trainer_state.json` in the folder or its last checkpoint; empty if there is none."""
    for place in (Path(folder), *checkpoints_newest_first(Path(folder))):
        if (place / STATE_FILE).is_file():
            return read_json(place / STATE_FILE).get("log_history", [])
    return []


def temporary_arguments(**settings: Any) -> PersonalizedDPOConfig:
    """Arguments of a trainer that saves nothing, with a folder of its own that goes when they go, or the process ends."""
    folder = mkdtemp(prefix="trl_personal-evaluation-")
    args = PersonalizedDPOConfig(output_dir=folder, **settings)
    weakref.finalize(args, shutil.rmtree, folder, ignore_errors=True)
    return args


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
    The model in a folder that training wrote, in a trainer for [`~evaluation.scoring.score_pairs`].

    The trainer prepares `dataset` as its eval dataset `PAIRS`, so that `score_pairs(trainer, PAIRS)` tokenizes nothing again.
    The reference is `ref_model`, or the base model of an adapter with the adapter off.

    Args:
        name (`str`): A folder or a repository, with a `user_model/` or without.
        dataset (`Dataset`): The pairs to score.
        settings (`Mapping`): The settings of the training, from
            [`~training.settings.read_training_settings`]. Others have TRL's defaults.
        ref_model (`str`, *optional*): The model that training started from. A full model needs it, as its files do not say.
        batch_size (`int`, *optional*, defaults to `8`): The number of pairs that are scored at once.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bars.
        **model_kwargs: Keywords of `from_pretrained`, such as `dtype`.

    Raises:
        `ValueError`: if a full model comes without `ref_model`; or whatever loading and the trainer refuse.
    """
    if not is_adapter(name) and ref_model is None:
        raise ValueError(
            f"{name} holds a whole language model, and nothing says which model its training started from: margins are "
            "relative to that one. Name it with `--ref_model` (a folder, or a name on the hub)."
        )
    load: Any = AutoPersonalizedModelForCausalLM.from_pretrained if find_user_model(name) else load_language_model
    reference: Any = None if ref_model is None else load_language_model(ref_model, **model_kwargs)
    return scoring_trainer_around(
        load(name, **model_kwargs),
        AutoProcessor.from_pretrained(processor_name(name)),
        dataset,
        settings,
        ref_model=reference,
        batch_size=batch_size,
        disable_tqdm=disable_tqdm,
    )


def scoring_trainer_around(
    model: Any,
    processing_class: Any,
    dataset: Dataset,
    settings: Mapping[str, Any],
    *,
    ref_model: Any = None,
    batch_size: int = 8,
    disable_tqdm: bool = False,
) -> PersonalizedDPOTrainer:
    """
    [`make_scoring_trainer`] for a model that is in memory already, which is then in the trainer. `ref_model` is one too.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, with users or without.
        processing_class: Its tokenizer or processor.
        dataset (`Dataset`): The pairs to score.
        settings (`Mapping`): The settings of the training.
        ref_model (`PreTrainedModel`, *optional*): The reference; by default the base model of an adapter.
        batch_size (`int`, *optional*, defaults to `8`): The number of pairs that are scored at once.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bars.
    """
    user_settings: dict[str, Any] = {"user_model_kind": "none"}
    vocab: UserVocab | None = None
    if is_personalized(model):
        user_model: UserModel = get_base_model(model).user_model
        vocab = get_base_model(model).user_vocab
        user_settings = {
            "user_model_kind": user_model.kind,
            "num_virtual_tokens": user_model.config.num_virtual_tokens,
        }
    args = temporary_arguments(
        **{key: value for key, value in settings.items() if key in SCORING}
        | machine_settings(settings)
        | user_settings,
        per_device_eval_batch_size=batch_size,
        disable_tqdm=disable_tqdm,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = PersonalizedDPOTrainer(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=_rows_to_check(dataset, args.user_id_column, args.user_profile_column, vocab),
        eval_dataset={PAIRS: with_row_numbers(dataset)},
        processing_class=processing_class,
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


def _rows_to_check(dataset: Dataset, user_column: str, profile_column: str | None, vocab: UserVocab | None) -> Dataset:
    """
    The train dataset of a trainer that does not train: the row with the shortest prompt, so that it is not empty, and the
    longest row, which has to fit the model's positions. A known user stands in for unknown ones, so that nobody is warned of
    a training on the generic user that does not take place.
    """
    dataset = rows_that_teach(dataset, "evaluation")
    columns = [name for name in ("prompt", "chosen", "rejected", profile_column) if name in dataset.column_names]
    lengths = [[len(str(value)) for value in row.values()] for row in dataset.select_columns(columns)]
    rows = dataset.select(
        sorted(
            {
                min(range(len(lengths)), key=lengths.__getitem__),
                max(range(len(lengths)), key=lambda i: sum(lengths[i])),
            }
        )
    )
    if vocab is None:
        return rows
    stand_in = next(iter(vocab), None)
    users = [user if user in vocab else stand_in for user in iterate_user_ids(rows, user_column, "evaluation")]
    return rows.remove_columns(user_column).add_column(user_column, users, feature=None)

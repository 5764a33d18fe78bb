"""A model that training wrote: its settings, its log, and a trainer around it that scores pairs as its own training would."""

import atexit
import logging
import shutil
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import AutoProcessor, PrinterCallback

from ..files import checkpoints_newest_first, read_json
from ..models.attach import is_personalized
from ..models.loading import AutoPersonalizedModelForCausalLM, find_user_model, is_adapter, load_language_model
from ..models.saving import get_base_model
from ..serving.writer import processor_name
from ..training.config import PersonalizedDPOConfig
from ..training.dpo import PersonalizedDPOTrainer
from ..user_column import iterate_user_ids
from ..user_models import UserModel
from ..users import UserVocab
from .scoring import with_row_numbers


logger = logging.getLogger(__name__)

PAIRS = "pairs"  # the name of the held-out pairs among the eval datasets of a scoring trainer
ARGUMENTS_FILE = "training_args.bin"  # pickled by transformers
STATE_FILE = "trainer_state.json"
TRUSTED_PACKAGES = ("accelerate", "transformers", "trl", "trl_personal")
SCORING = (  # settings that change a margin, a metric or a column
    *("beta", "max_length", "truncation_mode", "ld_alpha", "loss_type", "loss_weights", "label_smoothing"),
    *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "pad_token", "pad_to_multiple_of"),
    *("user_id_column", "user_profile_column", "user_profile_template", "bf16", "fp16"),
)
TRAINING = (  # settings of a training that is to be as long and as large
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "num_train_epochs", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "disable_dropout"),
)


def read_training_settings(folder: str | Path) -> dict[str, Any]:
    """
    The settings in `training_args.bin` that matter to score pairs or to train again in the same way; empty without the file.

    It is unpickled with nothing but the data classes and enumerations of the libraries that write it, so a foreign folder
    cannot run code. The number of processes counts as gradient accumulation: one process then sees the same batches.

    Raises:
        `ValueError`: if the file cannot be read, or holds anything else.
    """
    path = Path(folder) / ARGUMENTS_FILE
    if not path.is_file():
        return {}
    try:
        needed = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([_trusted(name) for name in needed]):
            found = vars(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}). Remove it, and give its settings yourself."
        ) from error
    settings = {name: found[name] for name in (*SCORING, *TRAINING) if name in found}
    num_processes = getattr(found.get("distributed_state"), "num_processes", 1)
    if num_processes > 1 and "gradient_accumulation_steps" in settings:
        settings["gradient_accumulation_steps"] *= num_processes
    return settings


def _trusted(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED_PACKAGES:
        raise ValueError(f"it holds a {name}, which no training arguments do")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, type) or not (issubclass(found, (Enum, PartialState)) or is_dataclass(found)):
        raise ValueError(f"it holds {name}, which is neither a data class nor an enumeration")
    return found


def read_log_history(folder: str | Path) -> list[dict[str, Any]]:
    """The log of the trainer, from `trainer_state.json` in the folder or its last checkpoint; empty if there is none."""
    for place in (Path(folder), *checkpoints_newest_first(Path(folder))):
        if (place / STATE_FILE).is_file():
            return read_json(place / STATE_FILE).get("log_history", [])
    return []


def temporary_folder() -> str:
    """A folder of this evaluation's own, for a trainer that saves nothing; it is removed when the process ends."""
    folder = mkdtemp(prefix="trl_personal-evaluation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
        settings (`Mapping`): The settings of the training, from [`read_training_settings`]. Others have TRL's defaults.
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
        output_dir=temporary_folder(),
        per_device_eval_batch_size=batch_size,
        disable_tqdm=disable_tqdm,
        gradient_checkpointing=False,
        report_to="none",
    )
    reference: Any = None if ref_model is None else load_language_model(ref_model, **model_kwargs)
    trainer = PersonalizedDPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=_rows_to_check(dataset, args.user_id_column, args.user_profile_column, vocab),
        eval_dataset={PAIRS: with_row_numbers(dataset)},
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


def _rows_to_check(dataset: Dataset, user_column: str, profile_column: str | None, vocab: UserVocab | None) -> Dataset:
    """
    The train dataset of a trainer that does not train: the row with the shortest prompt, so that it is not empty, and the
    longest row, which has to fit the model's positions. Unknown users become the generic user, whose prompt they get.
    """
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
    users = [user if user in vocab else None for user in iterate_user_ids(rows, user_column, "evaluation")]
    return rows.remove_columns(user_column).add_column(user_column, users, feature=None)

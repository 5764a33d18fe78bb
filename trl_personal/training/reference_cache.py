"""What precomputed reference log-probabilities depend on, and nothing else: so a sweep over users computes them once."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn


TOKEN_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
ROWS_PER_BATCH = 10_000


def rows_fingerprint(dataset: Dataset, settings: Iterable[object]) -> str:
    """SHA-256 over the tokens of each pair of a tokenized dataset, and over `settings` that change how they are scored."""
    digest = hashlib.sha256(repr(tuple(settings)).encode())
    tokens = dataset.select_columns(TOKEN_COLUMNS).with_format("arrow")
    for batch in tokens.iter(ROWS_PER_BATCH):
        for name in TOKEN_COLUMNS:
            column: pa.Array = batch[name].combine_chunks()
            digest.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def reference_fingerprint(ref_model: nn.Module | None, model: nn.Module) -> str:
    """
    SHA-256 over the weights of the reference policy: those of `ref_model`, or of `model` without its user model and without
    the adapter in training. (TRL's frozen copy of a pretrained adapter, "ref", is part of the reference.)
    """
    reference = model if ref_model is None else ref_model
    trained = [name for name in reference.peft_config if name != "ref"] if isinstance(reference, PeftModel) else []
    digest = hashlib.sha256()
    for name, tensor in sorted(reference.state_dict().items()):
        if "user_model." in name or any(f".{adapter}." in f"{name}." for adapter in trained):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokens_on_disk(fingerprint: str) -> Path:
    """
    The folder where the tokens of a dataset that is only in memory are kept, without text and without users: processes that
    share a file of results, and later runs that look for it, need a place. Filled by [`keep_tokens`].
    """
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_personal" / fingerprint


def keep_tokens(dataset: Dataset, folder: Path) -> None:
    """Write the tokens of `dataset` to `folder`, unless they are there."""
    if not (folder / "state.json").is_file():
        dataset.select_columns(TOKEN_COLUMNS).save_to_disk(folder)

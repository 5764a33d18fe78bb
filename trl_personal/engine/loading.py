"""The engine of a model in a folder or repository."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..models.loading import AutoPersonalizedModelForCausalLM, load_language_model
from ..writing import processor_name
from .transformers import TransformersEngine
from .users import ModelUsers


def load_engine(
    name_or_path: str,
    *,
    name: str | None = None,
    plain: bool = False,
    ref_model: str | None = None,
    max_rows: int = 64,
    max_batch_tokens: int = 65536,
    **kwargs: Any,
) -> TransformersEngine:
    """
    Load a model, its users and its tokenizer for [`TransformersEngine`].

    The table of users is mapped, not read: a user's row comes from the disk when it is asked for first.

    Args:
        name_or_path (`str`): The folder that training wrote, or a repository on the hub.
        name (`str`, *optional*): The name that clients call the model by. Defaults to that of the folder.
        plain (`bool`, *optional*, defaults to `False`): Whether to leave the users out: the language model alone, as a
            baseline.
        ref_model (`str`, *optional*): The model that training started from, for users who join or are updated; an adapter does
            not need it.
        max_rows (`int`, *optional*, defaults to `64`): The most answers that are written at once.
        max_batch_tokens (`int`, *optional*, defaults to `65536`): The most tokens that they have together.
        **kwargs: Arguments of [`~models.loading.AutoPersonalizedModelForCausalLM.from_pretrained`].

    Raises:
        As [`~models.loading.AutoPersonalizedModelForCausalLM.from_pretrained`].
    """
    if kwargs.get("device_map") is None and torch.accelerator.is_available():
        kwargs["device_map"] = "auto"
    if plain:
        model: Any = load_language_model(name_or_path, **kwargs)
    else:
        model = AutoPersonalizedModelForCausalLM.from_pretrained(name_or_path, map_users=True, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(processor_name(name_or_path), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    folder_name = Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path
    engine = TransformersEngine(model, tokenizer, name or folder_name, max_rows, max_batch_tokens)
    if not plain:
        folder = Path(name_or_path) if Path(name_or_path).is_dir() else None
        engine.admin = ModelUsers(engine, tokenizer, folder, ref_model)
    return engine

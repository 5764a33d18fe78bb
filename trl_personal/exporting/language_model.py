"""Takes a model with users apart for an export: a plain language model, what its embeddings do, and what it was made from."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .._version import __version__
from ..models.attach import detach_user_model
from ..models.folder_checks import BASE_FILES_ENTRY, LM_FILES_ENTRY
from ..models.loading import find_user_model
from ..models.saving import get_base_model, is_personalized
from ..user_models import UserModel
from ..user_models.base import FILES_ENTRY, read_user_model_config
from ..users import UserVocab


class Parts:
    """
    A model with users, taken apart. The model itself has no users afterwards.

    Args:
        model: A language model with a user model attached, perhaps in a `PeftModel`.
        keep_adapter (`bool`, *optional*, defaults to `False`): Whether an adapter stays by itself instead of being merged.

    Attributes:
        language_model (`PreTrainedModel`): The plain language model, with the adapter merged.
        adapter (`PeftModel`, *optional*): The adapter around it, if it was kept.
        user_model (`UserModel`): The user model, on the CPU.
        user_vocab (`UserVocab`): Its users.
        bos_token_id (`int`, *optional*): The token after which soft prompts go.

    Raises:
        `ValueError`: if there are no users, if the language model is quantized, if the model was trained with profiles, or if
        the adapter cannot be merged.
    """

    def __init__(self, model: nn.Module, keep_adapter: bool = False) -> None:
        if not is_personalized(model):
            raise ValueError(
                f"{type(model).__name__} has no user model attached, so there is nothing to export. Load it with "
                "`AutoPersonalizedModelForCausalLM.from_pretrained`."
            )
        causal_lm = get_base_model(model)
        refuse_quantized(causal_lm)
        if causal_lm.user_profile_template is not None:
            raise ValueError(
                "The model was trained with profiles of users in their prompts, which an exported model does not have. Serve "
                "it with `trl-personal serve`."
            )
        if isinstance(model, PeftModel) and not keep_adapter and not hasattr(model.base_model, "merge_and_unload"):
            raise ValueError(
                f"An adapter of the type {model.active_peft_config.peft_type} cannot be merged into the language model. "
                "Export a model with LoRA, or with all weights trained."
            )
        if keep_adapter and not isinstance(model, PeftModel):
            raise ValueError("There is no adapter to keep: all weights were trained. Leave out `keep_adapter`.")
        if keep_adapter:
            check_engine_adapter(model)
        self.bos_token_id: int | None = causal_lm._soft_prompt_insertion.bos_token_id
        user_model, user_vocab = detach_user_model(model)
        self.user_model: UserModel = user_model.cpu().eval()
        self.user_vocab: UserVocab = user_vocab
        self.adapter = model if keep_adapter else None
        merged: Any = model.merge_and_unload() if isinstance(model, PeftModel) and not keep_adapter else causal_lm
        self.language_model: PreTrainedModel = merged.eval()


def refuse_quantized(causal_lm: Any) -> None:
    """
    Make sure that the weights are numbers that others can load and merge into.

    Raises:
        `ValueError`: if the language model is quantized.
    """
    if getattr(causal_lm.config, "quantization_config", None) is not None:
        raise ValueError(
            "The language model is quantized: neither can an adapter be merged into it exactly, nor can it get new rows. Load "
            "it in bfloat16 or float32. (After training with --load_in_4bit, the base model itself is not quantized.)"
        )


def check_engine_adapter(model: Any) -> None:
    """
    Make sure that an adapter is one that vLLM computes.

    Raises:
        `ValueError`: if it is not LoRA on linear layers and nothing else.
    """
    config = model.active_peft_config
    reason = None
    if config.peft_type != "LORA":
        reason = f"it is of the type {getattr(config.peft_type, 'value', config.peft_type)}"
    elif config.use_dora:
        reason = "it is DoRA"
    elif config.bias != "none":
        reason = f"it trains biases (bias={config.bias!r})"
    elif config.modules_to_save or not isinstance(get_base_model(model).get_input_embeddings(), nn.Embedding):
        reason = "it holds more than low-rank factors of linear layers: embeddings, or modules of its own"
    elif config.rank_pattern or config.alpha_pattern:
        reason = "it has ranks or scales of their own for some layers"
    if reason is not None:
        raise ValueError(
            f"vLLM does not compute this adapter beside its base: {reason}. Leave out `keep_adapter` to merge it."
        )


def embedding_scale(language_model: PreTrainedModel) -> float:
    """
    The factor by which a lookup of the input embeddings multiplies a row: 1 in most models, the square root of the width in
    Gemma's.

    Raises:
        `ValueError`: if a lookup does something else than multiply.

    ```python
    >>> from transformers import GemmaConfig, GemmaForCausalLM
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    >>> embedding_scale(GemmaForCausalLM(GemmaConfig(vocab_size=20, num_key_value_heads=1, **sizes)))
    4.0
    ```
    """
    embedding: Any = language_model.get_input_embeddings()
    weight = embedding.weight.detach()
    largest = weight.abs().amax(dim=1).topk(min(8, weight.shape[0])).indices  # rows that are not zero
    with torch.no_grad():
        looked_up, rows = embedding(largest[None])[0].double(), weight[largest].double()
    scale = float((looked_up * rows).sum() / (rows * rows).sum())
    if looked_up.shape != rows.shape or not torch.allclose(looked_up, scale * rows, rtol=0.01, atol=1e-6):
        raise ValueError(
            f"The input embeddings of {type(language_model).__name__} ({type(embedding).__name__}) do more than multiply a "
            "row, so a soft prompt cannot be written as one."
        )
    return 1.0 if scale == 1 or torch.equal(looked_up, rows) else scale


def made_from(name: str) -> dict[str, Any]:
    """
    What the files of a trained model in a folder or repository are, by their fingerprints: those of the user model, of the
    language model or adapter, and of the adapter's base.
    """
    folder: Path | None = find_user_model(name)
    config = {} if folder is None else read_user_model_config(folder)
    entries = (FILES_ENTRY, LM_FILES_ENTRY, BASE_FILES_ENTRY)
    return {"model": name, **{entry: config[entry] for entry in entries if config.get(entry)}}


def versions() -> dict[str, str]:
    """The packages that write an export."""
    return {"trl_personal": __version__, **{name: version(name) for name in ("transformers", "peft", "torch")}}

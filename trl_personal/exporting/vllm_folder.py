"""The export for vLLM: a stock transformers folder, the table of soft prompts beside it, and what puts them together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..files import staged_folder
from ..serving.manifest import ADAPTER_FOLDER, EXPORT_FILE, USERS_FOLDER, Layout, Manifest, fingerprints
from .language_model import Parts, versions
from .writing import check_output_dir, write_table, write_token_embeddings


def export_for_vllm(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    keep_adapter: bool = False,
    made_from: Mapping[str, Any] | None = None,
) -> Manifest:
    """
    Write what `python -m trl_personal.serving EXPORT --engine vllm` serves. The model has no users afterwards.

    ```text
    EXPORT/  config.json, model.safetensors, tokenizer.json, ...    the language model, with the adapter merged
             users/soft_prompts.safetensors                         (num_users + 1, num_virtual_tokens, token_dim)
             users/users.json                                       whose row is which
             export.json                                            layout and fingerprints
             adapter/, users/token_embeddings.safetensors           with `keep_adapter`, which leaves it out of the model
    ```

    Args:
        model: A language model with users, from [`AutoPersonalizedModelForCausalLM`] or a trainer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        output_dir (`str` or `Path`): A new folder, or an empty one.
        keep_adapter (`bool`, *optional*, defaults to `False`): Write the adapter beside its base instead of merging it. vLLM
            then computes it in each step, and takes whole prompts as embeddings.
        made_from (`Mapping`, *optional*): What `export.json` is to say of where the model is from.

    Returns:
        `Manifest`: What `export.json` says.

    Raises:
        `ValueError`: if the model has no users or is quantized, if its adapter cannot be merged, or if the folder has files.
    """
    target = check_output_dir(output_dir)
    parts = Parts(model, keep_adapter)
    language_model, user_model = parts.language_model, parts.user_model
    adapter_rank = None
    with staged_folder(target, last=EXPORT_FILE) as staging:
        (staging / USERS_FOLDER).mkdir()
        if parts.adapter is not None:
            adapter: Any = parts.adapter
            adapter_rank = adapter.peft_config[adapter.active_adapter].r
            adapter.save_pretrained(str(staging / ADAPTER_FOLDER))
            language_model = adapter.unload()
            write_token_embeddings(staging, language_model)
        language_model.save_pretrained(staging)
        tokenizer.save_pretrained(str(staging))
        embedding: Any = language_model.get_input_embeddings()
        write_table(staging, user_model, embedding.weight.dtype)
        parts.user_vocab.save_pretrained(staging / USERS_FOLDER)
        manifest = Manifest(
            format="vllm",
            layout=Layout(user_model.config.num_virtual_tokens, parts.bos_token_id),
            num_users=user_model.config.num_users,
            token_dim=user_model.config.token_dim,
            adapter_rank=adapter_rank,
            made_from=dict(made_from or {}),
            files=fingerprints(staging),
            versions=versions(),
        )
        manifest.save(staging)
    return manifest

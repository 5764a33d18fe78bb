"""Where an export goes, and the table of soft prompts in it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..models.soft_prompt import soft_prompts_of
from ..serving.manifest import EMBEDDINGS_FILE, EMBEDDINGS_NAME, TABLE_FILE, TABLE_NAME
from ..user_models import UserModel


def check_output_dir(output_dir: str | Path) -> Path:
    """
    Make sure that nothing is in the way, before anything is computed.

    Raises:
        `ValueError`: if the folder has files, or is none.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is not a folder. Name a new one for the export.")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(
            f"{target} is not empty, and an export mixed with other files could load as something else. Name a new folder."
        )
    return target


def write_table(folder: Path, user_model: UserModel, dtype: torch.dtype, batch_size: int = 1024) -> None:
    """
    Write the soft prompts of all users as one tensor, `(num_users + 1, num_virtual_tokens, token_dim)`; row 0 is the generic
    user's.

    Args:
        folder (`Path`): Where the file goes.
        user_model (`UserModel`): Makes the soft prompts.
        dtype (`torch.dtype`): That of the language model's embeddings, to which a soft prompt is cast where it is used.
        batch_size (`int`, *optional*, defaults to `1024`): The number of users whose prompts are made at a time.
    """
    config = user_model.config
    table = torch.empty(config.num_users + 1, config.num_virtual_tokens, config.token_dim, dtype=dtype)
    for rows in torch.arange(config.num_users + 1).split(batch_size):
        table[rows[0] : rows[-1] + 1] = soft_prompts_of(user_model, rows).detach().to("cpu", dtype)
    save_file({TABLE_NAME: table}, folder / TABLE_FILE)


@torch.no_grad()
def write_token_embeddings(folder: Path, language_model: PreTrainedModel) -> None:
    """Write what a lookup of each token gives, `(vocab_size, token_dim)`."""
    embedding: Any = language_model.get_input_embeddings()
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    looked_up: Tensor = embedding(ids[None])[0]
    save_file({EMBEDDINGS_NAME: looked_up.cpu().contiguous()}, folder / EMBEDDINGS_FILE)

"""Initial soft prompts in the embedding space of a language model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


SOFT_PROMPT_INITS = ("sample_vocab", "random", "text")
NUM_SAMPLED = 1024  # tokens whose embeddings tell mean and standard deviation


def soft_prompt_drawer(
    embedding: nn.Module,
    vocab_size: int,
    num_virtual_tokens: int,
    soft_prompt_init: str = "sample_vocab",
    seed: int = 0,
    text_ids: Sequence[int] | None = None,
) -> Callable[[int], Tensor]:
    """
    A function that draws `n` initial prompts, float32 `(n, num_virtual_tokens, token_dim)` on the CPU.

    - `"sample_vocab"`: embeddings of random tokens, drawn with replacement, so any number of prompts can be drawn.
    - `"random"`: normal, with the mean and standard deviation of 1,024 random tokens' embeddings.
    - `"text"`: embeddings of `text_ids`, repeated or cut to the length; every prompt is the same.

    `embedding` maps `(n,)` ids to `(n, token_dim)` and is called as the language model calls it, so a model that scales
    its lookup (Gemma) starts from scaled rows. Draws depend on `seed` only, not on the global generator.

    Raises:
        `ValueError`: for another `soft_prompt_init`, or `"text"` without `text_ids`.
    """
    if soft_prompt_init not in SOFT_PROMPT_INITS:
        raise ValueError(f"`soft_prompt_init` must be one of {SOFT_PROMPT_INITS}, got {soft_prompt_init!r}.")
    if soft_prompt_init == "text" and not text_ids:
        raise ValueError('`soft_prompt_init="text"` needs a text of at least one token in `soft_prompt_init_text`.')
    generator = torch.Generator().manual_seed(seed)

    def sample(size: int) -> Tensor:
        return _embed(embedding, torch.randint(vocab_size, (size,), generator=generator))

    def draw(n: int) -> Tensor:
        if soft_prompt_init == "text":
            repeats = -(-num_virtual_tokens // len(text_ids or ()))
            ids = torch.tensor(list(text_ids or ()) * repeats)[:num_virtual_tokens]
            return _embed(embedding, ids).expand(n, -1, -1).clone()
        if soft_prompt_init == "random":
            rows = sample(NUM_SAMPLED)
            noise = torch.randn(n, num_virtual_tokens, rows.shape[-1], generator=generator)
            return rows.mean() + rows.std() * noise
        return sample(n * num_virtual_tokens).view(n, num_virtual_tokens, -1)

    return draw


def embedding_std(embedding: nn.Module, vocab_size: int) -> float:
    """
    The standard deviation of the values in the embeddings of 1,024 tokens, drawn with replacement. `embedding` is called as in
    [`soft_prompt_drawer`]. 0.0 on a rank that waits for the weights of rank 0.

    ```python
    >>> embedding_std(nn.Embedding.from_pretrained(torch.tensor([[0.5, -0.5]])), vocab_size=1)
    0.5001221299171448
    ```
    """
    ids = torch.randint(vocab_size, (NUM_SAMPLED,), generator=torch.Generator().manual_seed(0))
    return _embed(embedding, ids).std().item()


@torch.no_grad()
def _embed(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Float32 embeddings on the CPU; zeros on a rank that waits for the weights of rank 0 (FSDP's efficient loading)."""
    rows: Tensor = embedding(ids.to(next(embedding.parameters()).device)).float()
    return torch.zeros(rows.shape) if rows.is_meta else rows.cpu()

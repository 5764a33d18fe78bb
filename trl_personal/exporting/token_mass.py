"""How likely an engine that ignores the generation config is to sample a token of a user's soft prompt."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..serving.manifest import Layout


PROMPTS = (
    "What is a good hobby for a rainy day?",
    "Write a short note to a friend about the weekend.",
    "Why is the sky blue?",
    "The plan for tomorrow is",
)
MAX_PROMPT_TOKENS = 16
NUM_NEW_TOKENS = 24
NUM_USERS = 4  # for whom the prompts are answered


class TokenMass(NamedTuple):
    """
    The probability that the next token is one of a user, over the tokens of sampled answers.

    Args:
        mean (`float`): On average.
        largest (`float`): Where it was largest.
        num_tokens (`int`): The number of tokens that were looked at.
    """

    mean: float
    largest: float
    num_tokens: int


@torch.no_grad()
def measure_token_mass(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    added: range,
    first: int,
    num_users: int,
) -> TokenMass:
    """
    Sample answers of a few users to a few prompts, without the tokens that were added, and sum up these tokens'
    probabilities at each place.

    Args:
        language_model (`PreTrainedModel`): The language model with the tokens of users.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        layout (`Layout`): Where a user's tokens go.
        added (`range`): The ids that were added.
        first (`int`): The first id of the first user.
        num_users (`int`): The users who have tokens, the generic one included.
    """
    users = torch.arange(0, num_users, max(1, num_users // NUM_USERS))[:NUM_USERS]
    users_ids = first + users[:, None] * layout.num_virtual_tokens + torch.arange(layout.num_virtual_tokens)
    device = language_model.device
    generate: Any = language_model.generate
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"][:MAX_PROMPT_TOKENS]
            position = layout.position(ids)
            text = torch.tensor(ids).expand(len(users), -1)
            rows = torch.cat([text[:, :position], users_ids, text[:, position:]], dim=1).to(device)
            room = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
            num_new = NUM_NEW_TOKENS if room is None else min(NUM_NEW_TOKENS, room - rows.shape[1])
            if num_new < 1:
                continue
            sequences = generate(
                rows,
                attention_mask=torch.ones_like(rows),
                do_sample=True,
                min_new_tokens=num_new,
                max_new_tokens=num_new,
                suppress_tokens=list(added),
            )
            logits = language_model(sequences).logits[:, rows.shape[1] - 1 : -1].float()
            found.append(logits.softmax(dim=-1)[..., added.start : added.stop].sum(dim=-1).flatten())
    mass = torch.cat(found) if found else torch.zeros(1)
    return TokenMass(float(mass.mean()), float(mass.max()), sum(map(len, found)))

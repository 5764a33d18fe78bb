"""The export as tokens: each user's soft prompt as T words of a stock transformers folder's vocabulary."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..files import staged_folder, write_atomically
from ..models.saving import get_base_model, is_personalized
from ..models.soft_prompt import soft_prompts_of
from ..serving.manifest import EXPORT_FILE, Layout, Manifest, fingerprints
from ..users import as_user_id, check_user_ids
from .chat_template import with_users
from .language_model import Parts, embedding_scale, versions
from .token_mass import PROMPTS, TokenMass, measure_token_mass
from .writing import check_output_dir


USER_TOKENS_FILE = "user_tokens.json"
MAX_USER_TOKENS = 20_000  # beyond it a tokenizer takes seconds to load, and the list in the generation config is long
LOWEST_LOGIT = -1e4  # of a bias; small enough for any softmax, and a float16
TOLERANCE = 1e-5  # relative, of a soft prompt that is read back from its rows in float32


class TokensExport(NamedTuple):
    """
    What [`export_as_tokens`] wrote.

    Args:
        manifest (`Manifest`): What `export.json` says.
        first_token_id (`int`): The lowest id of a user's token; those of the generic user come first.
        logits (`str`): How low the logits of the users' tokens are, as [`write_output_rows`] says.
        mass (`TokenMass`): Their probability where an engine ignores the generation config.
        layout_holds (`bool`): Whether the tokenizer reads plain text behind a user's tokens as it does without them.
    """

    manifest: Manifest
    first_token_id: int
    logits: str
    mass: TokenMass
    layout_holds: bool


def export_as_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    user_ids: Sequence[str | int] | None = None,
    untie: bool = False,
    made_from: Mapping[str, Any] | None = None,
) -> TokensExport:
    """
    Write a stock transformers folder in which each user's soft prompt, and the generic user's, is T tokens. The model has no
    users afterwards, and more tokens.

    The logits of the language model's own tokens stay what they are. Those of the users' tokens are never to be sampled:
    `suppress_tokens` in the generation config keeps transformers from it, and for engines that ignore that the output rows
    are made such that their logits are low. With a bias at the output they are, and their probability is 0. Without, each is
    the mean of all output rows: its logit is the mean of all logits, and its probability below that of a token drawn blindly.
    Where input and output embeddings are one matrix (`tie_word_embeddings`), the row is the soft prompt and the logit what it
    may be, unless `untie`.

    Args:
        model: A language model with users, from [`AutoPersonalizedModelForCausalLM`] or a trainer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, which gets the tokens.
        output_dir (`str` or `Path`): A new folder, or an empty one.
        user_ids (`list[str | int]`, *optional*): The users to export. Defaults to all.
        untie (`bool`, *optional*, defaults to `False`): Give the output embeddings a matrix of their own.
        made_from (`Mapping`, *optional*): What `export.json` is to say of where the model is from.

    Raises:
        `ValueError`: for users who are not in the model, or too many; if the model was trained with profiles, is quantized or
        has no users; if its embeddings do more than multiply a row; or if the folder has files.
    """
    target = check_output_dir(output_dir)
    check_users(model, user_ids)
    parts = Parts(model)
    language_model, num_virtual_tokens = parts.language_model, parts.user_model.config.num_virtual_tokens
    users = [str(as_user_id(user)) for user in (parts.user_vocab if user_ids is None else dict.fromkeys(user_ids))]
    scale = embedding_scale(language_model)
    with torch.no_grad():
        soft_prompts = soft_prompts_of(parts.user_model, torch.tensor(parts.user_vocab.encode([None, *users])))
    if untie:
        untie_embeddings(language_model)
    names = token_names(users, tokenizer)
    tokens = [token for name in names for token in tokens_of(name, num_virtual_tokens)]
    num_own, first = add_tokens(language_model, tokenizer, tokens)
    write_input_rows(language_model, soft_prompts.flatten(0, 1), first, scale)
    logits = write_output_rows(language_model, num_own)
    suppress(language_model, range(num_own, first + len(tokens)))
    layout = Layout(num_virtual_tokens, parts.bos_token_id)
    layout_holds = is_read_alike(tokenizer, tokens[:num_virtual_tokens], layout)
    add_users_to_template(tokenizer, dict(zip(users, names[1:], strict=True)), names[0], layout)
    mass = measure_token_mass(
        language_model, tokenizer, layout, range(num_own, first + len(tokens)), first, len(names)
    )
    with staged_folder(target, last=EXPORT_FILE) as staging:
        language_model.save_pretrained(staging)
        tokenizer.save_pretrained(str(staging))
        by_user = {user: f"<|{name}|0|>" for user, name in zip(users, names[1:], strict=True)}
        content = {"generic_user": f"<|{names[0]}|0|>", "num_virtual_tokens": num_virtual_tokens, "users": by_user}
        write_atomically(
            staging / USER_TOKENS_FILE, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
        )
        manifest = Manifest(
            format="tokens",
            layout=layout,
            num_users=len(users),
            token_dim=parts.user_model.config.token_dim,
            made_from=dict(made_from or {}),
            files=fingerprints(staging),
            versions=versions(),
        )
        manifest.save(staging)
    return TokensExport(manifest, first, logits, mass, layout_holds)


def check_users(model: nn.Module, user_ids: Sequence[str | int] | None) -> None:
    """
    Make sure that the users are few and known, before anything is changed.

    Raises:
        `ValueError`: if not. `TypeError`: if `user_ids` is no list.
    """
    if not is_personalized(model):
        return  # told by [`Parts`]
    vocab, config = get_base_model(model).user_vocab, get_base_model(model).user_model.config
    if user_ids is not None:
        check_user_ids(user_ids, "user_ids")
        unknown = [user for user in user_ids if user not in vocab]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(user_ids)} users are not in the model, such as {unknown[0]!r}: they would get the "
                "generic user's tokens, which unknown users get anyway. Leave them out."
            )
    num_users = 1 + len(vocab if user_ids is None else set(map(as_user_id, user_ids)))
    if num_users * config.num_virtual_tokens > MAX_USER_TOKENS:
        raise ValueError(
            f"{num_users - 1:,} users and the generic one, with {config.num_virtual_tokens} virtual tokens each, are "
            f"{num_users * config.num_virtual_tokens:,} tokens, more than {MAX_USER_TOKENS:,}. Name fewer users, or export "
            "for vLLM, which takes any number."
        )


def token_names(users: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    What the names of a user's tokens have in common, the generic user's first. Ids are escaped as in a URL, so that two users
    never have one name; and the names are none that the tokenizer has already.
    """
    known = tokenizer.get_vocab()
    for number in itertools.count(1):
        word = "user" if number == 1 else f"user{number}"
        if not any(token.startswith((f"<|{word}=", f"<|generic_{word}|")) for token in known):
            return [f"generic_{word}", *(f"{word}={quote(user, safe='')}" for user in users)]
    raise AssertionError  # `count` has no end


def tokens_of(name: str, num_virtual_tokens: int) -> list[str]:
    """
    The tokens of one user.

    ```python
    >>> tokens_of("user=ann", num_virtual_tokens=2)
    ['<|user=ann|0|>', '<|user=ann|1|>']
    ```
    """
    return [f"<|{name}|{number}|>" for number in range(num_virtual_tokens)]


def add_tokens(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> tuple[int, int]:
    """
    Give tokenizer and language model the tokens, behind all ids that either of them has.

    Returns:
        `tuple[int, int]`: The number of rows that the language model had, and the id of the first of `tokens`.
    """
    embedding: Any = language_model.get_input_embeddings()
    num_own = embedding.weight.shape[0]
    next_id = max(tokenizer.get_vocab().values()) + 1
    first = max(num_own, next_id)
    # a tokenizer numbers its tokens one after the other, and many models have more rows than tokens
    fillers = [f"<|filler_of_{tokens[0][2:-2]}|{number}|>" for number in range(first - next_id)]
    added = [AddedToken(token, special=True, normalized=False) for token in (*fillers, *tokens)]
    tokenizer.add_tokens(added, special_tokens=True)
    found: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    if found != list(range(first, first + len(tokens))):
        raise ValueError(
            f"{type(tokenizer).__name__} numbers new tokens otherwise than one after the other ({found[:3]}...; expected "
            f"{first}...), so users cannot be tokens of it. Export for vLLM."
        )
    language_model.resize_token_embeddings(first + len(tokens), mean_resizing=False)
    return num_own, first


@torch.no_grad()
def write_input_rows(language_model: PreTrainedModel, soft_prompts: Tensor, first: int, scale: float) -> None:
    """
    Write soft prompts `(n, token_dim)` as the rows from `first` on of the input embeddings, so that a lookup gives them.

    Raises:
        `ValueError`: if a lookup gives something else.
    """
    embedding: Any = language_model.get_input_embeddings()
    weight = embedding.weight
    weight[first:] = (soft_prompts / scale).to(weight)
    looked_up = embedding(torch.arange(first, weight.shape[0], device=weight.device)[None])[0].float().cpu()
    expected = soft_prompts.float().cpu()
    rtol = max(TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    if not torch.allclose(looked_up, expected, rtol=rtol, atol=rtol * float(expected.abs().max())):
        raise ValueError(
            f"A lookup in the embeddings of {type(language_model).__name__} does not give what was written there. Export "
            "for vLLM."
        )


def is_tied(language_model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one matrix."""
    return language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight


@torch.no_grad()
def write_output_rows(language_model: PreTrainedModel, num_own: int) -> str:
    """
    Make the logits of all tokens from `num_own` on low, as far as the output embeddings allow.

    Returns:
        `str`: `"bias"` if they are as low as can be, `"mean"` if each is the mean of the model's own logits, `"tied"` if they
        are the products with the soft prompts.
    """
    head: Any = language_model.get_output_embeddings()
    tied = is_tied(language_model)
    if getattr(head, "bias", None) is not None:
        head.bias[num_own:] = LOWEST_LOGIT
    if not tied:
        head.weight[num_own:] = head.weight[:num_own].float().mean(dim=0).to(head.weight)
    return "bias" if getattr(head, "bias", None) is not None else "tied" if tied else "mean"


def untie_embeddings(language_model: PreTrainedModel) -> None:
    """Give the output embeddings a matrix of their own, with the same numbers."""
    head: Any = language_model.get_output_embeddings()
    if not is_tied(language_model):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config: Any = language_model.config
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def suppress(language_model: PreTrainedModel, ids: range) -> None:
    """Add `ids` to those that the generation config keeps from being sampled."""
    config: Any = language_model.generation_config
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *ids})


def is_read_alike(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], layout: Layout) -> bool:
    """
    Whether plain text behind the tokens of a user is read as without them, and they stand where training puts the soft
    prompt. Tokenizers that write a space in front of a text, and of the text only, read it otherwise.
    """
    user: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    for text in PROMPTS:
        plain = tokenizer(text)["input_ids"]
        position = layout.position(plain)
        if tokenizer("".join(tokens) + text)["input_ids"] != [*plain[:position], *user, *plain[position:]]:
            return False
    return True


def add_users_to_template(
    tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str], generic_name: str, layout: Layout
) -> None:
    """Make each chat template of the tokenizer, if it has any, one that takes `user=`."""
    bos_token: Any = None if layout.bos_token_id is None else tokenizer.convert_ids_to_tokens(layout.bos_token_id)
    arguments = (names, generic_name, layout.num_virtual_tokens, bos_token)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: with_users(text, *arguments) for name, text in templates.items()}
    elif templates is not None:
        tokenizer.chat_template = with_users(templates, *arguments)

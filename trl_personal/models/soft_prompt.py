"""
Puts a soft prompt into a batch, and takes its traces out of what comes back.

A row is `[BOS] e_1 ... e_T x_1 ... x_n` if it starts with the BOS token, else `e_1 ... e_T x_1 ... x_n`; padding on either
side stays where it is. Everything is index arithmetic on `positions`, the number of columns in front of the soft prompt.
"""

import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..user_models import UserModel
from .calls import in_call, keep, take


def insertion_positions(input_ids: Tensor, attention_mask: Tensor | None, bos_token_id: int | None) -> Tensor:
    """
    Where each row's soft prompt goes, as a LongTensor `(batch,)`: the column of the first real token, plus one if that token
    is BOS. `input_ids` and `attention_mask` (nonzero for real tokens, `None` if all are) are `(batch, seq_len)`.

    ```python
    >>> ids = torch.tensor([[9, 9, 1, 5], [1, 5, 6, 9], [5, 6, 7, 8]])  # BOS is 1, padding 9
    >>> insertion_positions(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]), bos_token_id=1)
    tensor([3, 1, 0])
    ```
    """
    if attention_mask is None:
        first = input_ids.new_zeros(input_ids.shape[0])
    else:
        first = attention_mask.ne(0).int().argmax(dim=1)
    if bos_token_id is None:
        return first
    return first + input_ids.gather(1, first[:, None]).squeeze(1).eq(bos_token_id).long()


def source_columns(positions: Tensor, seq_len: int, num_virtual_tokens: int) -> tuple[Tensor, Tensor]:
    """
    For each column of a row with its soft prompt in: the column of the token there, `(batch, seq_len + T)`, and the number
    of the virtual token there, or -1. (At virtual columns the first of the two is some valid column.)

    ```python
    >>> source_columns(torch.tensor([1, 0]), seq_len=2, num_virtual_tokens=2)[1]
    tensor([[-1,  0,  1, -1],
            [ 0,  1, -1, -1]])
    ```
    """
    column = torch.arange(seq_len + num_virtual_tokens, device=positions.device)
    offset = column - positions[:, None]  # 0 ... T-1 at the virtual tokens
    virtual = torch.where((offset >= 0) & (offset < num_virtual_tokens), offset, -1)
    token = torch.where(offset < 0, column, column - num_virtual_tokens).clamp(0, seq_len - 1)
    return token, virtual


def insert_soft_prompt(soft_prompt: Tensor, inputs_embeds: Tensor, token: Tensor, virtual: Tensor) -> Tensor:
    """
    Embeddings with the soft prompts in, `(batch, seq_len + T, token_dim)`.

    `soft_prompt` is `(batch, T, token_dim)` and is cast to the dtype of `inputs_embeds` `(batch, seq_len, token_dim)`;
    `token` and `virtual` come from [`source_columns`].
    """
    rows = torch.arange(token.shape[0], device=token.device)[:, None]
    prompts = soft_prompt.to(inputs_embeds)[rows, virtual.clamp(min=0)]
    return torch.where(virtual[..., None] >= 0, prompts, inputs_embeds[rows, token])


def insert_values(values: Tensor, token: Tensor, virtual: Tensor, fill: Tensor | int) -> Tensor:
    """`(batch, seq_len)` values, such as a mask, with `fill` (broadcast to the columns) at the virtual tokens."""
    return torch.where(virtual < 0, values.gather(1, token), fill).to(values.dtype)


def insert_position_ids(position_ids: Tensor, positions: Tensor, token: Tensor, virtual: Tensor) -> Tensor:
    """
    Position ids `(..., batch, seq_len + T)` that count on through the soft prompt, from `(..., batch, seq_len)`, where one
    batch row may stand for all.

    ```python
    >>> positions = torch.tensor([1])
    >>> insert_position_ids(torch.tensor([[0, 1]]), positions, *source_columns(positions, 2, num_virtual_tokens=3))
    tensor([[0, 1, 2, 3, 4]])
    ```
    """
    batch_size, seq_len = token.shape[0], position_ids.shape[-1]
    num_virtual_tokens = virtual.shape[1] - seq_len
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch_size, seq_len)
    at_start = positions.clamp(max=seq_len - 1)[:, None].expand(*position_ids.shape[:-1], 1)
    start = position_ids.gather(-1, at_start) + (positions[:, None] == seq_len).long()
    moved = position_ids.gather(-1, token.expand(*position_ids.shape[:-1], -1))
    moved = moved + num_virtual_tokens * (token >= positions[:, None])
    return torch.where(virtual >= 0, start + virtual, moved)


def predicting_columns(positions: Tensor, seq_len: int, num_virtual_tokens: int) -> Tensor:
    """
    The column whose output stands for token `t` of the caller, `(batch, seq_len)`: the one right before token `t + 1`. So the
    token in front of the soft prompt is represented by the **last virtual token**, which predicts what follows.

    ```python
    >>> predicting_columns(torch.tensor([1, 0]), seq_len=3, num_virtual_tokens=2)
    tensor([[2, 3, 4],
            [2, 3, 4]])
    ```
    """
    column = torch.arange(seq_len, device=positions.device)
    return torch.where(column + 1 < positions[:, None], column, column + num_virtual_tokens)


def realign_outputs(outputs: MutableMapping[str, Any], positions: Tensor, num_virtual_tokens: int) -> Any:
    """
    The outputs of a decoder without their virtual columns, in place: hidden states at [`predicting_columns`], router
    logits at the real tokens, attentions from the former to the latter. A cache keeps its virtual tokens.
    """
    seq_len = outputs["last_hidden_state"].shape[1] - num_virtual_tokens
    columns = predicting_columns(positions, seq_len, num_virtual_tokens)
    column = torch.arange(seq_len, device=positions.device)
    real = torch.where(column < positions[:, None], column, column + num_virtual_tokens)
    outputs["last_hidden_state"] = _gather(outputs["last_hidden_state"], columns)
    if outputs.get("hidden_states") is not None:
        outputs["hidden_states"] = tuple(_gather(layer, columns) for layer in outputs["hidden_states"])
    if outputs.get("router_logits") is not None:
        length = seq_len + num_virtual_tokens
        outputs["router_logits"] = tuple(
            _gather(layer.view(-1, length, layer.shape[-1]), real).reshape(*layer.shape[:-2], -1, layer.shape[-1])
            for layer in outputs["router_logits"]
        )
    if outputs.get("attentions") is not None:
        outputs["attentions"] = tuple(
            layer.take_along_dim(columns[:, None, :, None], 2).take_along_dim(real[:, None, None, :], 3)
            for layer in outputs["attentions"]
        )
    return outputs


def _gather(values: Tensor, columns: Tensor) -> Tensor:
    """Takes from `values` `(batch, length, dim)` the `columns` `(batch, seq_len)` of each row."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], columns.to(values.device)]


def find_decoder(causal_lm: Any) -> nn.Module | None:
    """
    The module below the LM head that makes hidden states of embeddings, `None` if there is none. `get_decoder()` returns it in
    most families; in a few it returns the LM head (which is called `decoder` in ModernBERT) or the model itself (Llama 4).
    """
    for module in (causal_lm.get_decoder(), causal_lm.base_model, getattr(causal_lm, "model", None)):
        if module is not causal_lm and module is not None:
            if "inputs_embeds" in inspect.signature(module.forward).parameters:
                return module
    return None


class SoftPromptInsertion:
    """
    Conditions a causal LM on users: with `user_indices` (LongTensor `(batch,)`) in the call, each row gets its user's soft
    prompt, and the outputs stay aligned with the caller's `input_ids`. `soft_prompts` `(batch, T, token_dim)` in their place
    are put in as they are, whatever they were made from. With neither, the model is the plain model.

    It is a pair of hooks on the decoder (the model below the LM head), which every causal LM calls as a module, whether
    wrapped by PEFT or not, with logits or through TRL's fused head. The LM head, labels and losses above never see a virtual
    token. Another pair takes `user_indices` out of the causal LM's call, as some models do not pass on what they do not know,
    and makes sure that the decoder got them. What one hook leaves for the next is the call's own (see [`OwnCalls`]), so that
    threads, calls inside calls and failed calls do not meet. The user model itself is a submodule of the causal LM, so that
    DDP, FSDP and ZeRO find it.

    Args:
        causal_lm (`PreTrainedModel`): The model with the LM head, without PEFT around it. Its class has [`OwnCalls`] when
            it is called.
        bos_token_id (`int`, *optional*): The soft prompt goes after it in rows that start with it.
    """

    def __init__(self, causal_lm: Any, bos_token_id: int | None) -> None:
        self.causal_lm = causal_lm
        self.bos_token_id = bos_token_id
        decoder: Any = find_decoder(causal_lm)
        self._handles = [
            causal_lm.register_forward_pre_hook(self._take_users, with_kwargs=True),
            causal_lm.register_forward_hook(self._check_users),
            decoder.register_forward_pre_hook(
                self._insert, with_kwargs=True, prepend=True
            ),  # before masks are made of it
            decoder.register_forward_hook(self._realign, prepend=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def condition(
        self,
        soft_prompts: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """
        `inputs_embeds` and `attention_mask` for the decoder, with `positions`, `token` and `virtual` (see the functions).
        `inputs_embeds` are those of `input_ids`, into which a model may have put images.

        Raises:
            `ValueError`: if the soft prompts do not fit the rows, or the mask is not `(batch, seq_len)`. `TypeError`: if
            the soft prompts are not floating-point numbers.
        """
        if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
            raise ValueError(
                f"With users, the decoder needs an `attention_mask` of the shape of `input_ids`, {tuple(input_ids.shape)}. "
                f"{type(self.causal_lm).__name__} was given, or has prepared, another one: not supported."
            )
        _check_soft_prompts(soft_prompts, input_ids.shape[0], inputs_embeds.shape[-1])
        positions = insertion_positions(input_ids, attention_mask, self.bos_token_id)
        token, virtual = source_columns(positions, input_ids.shape[1], soft_prompts.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        conditioned = {
            "inputs_embeds": insert_soft_prompt(soft_prompts, inputs_embeds, token, virtual),
            "attention_mask": insert_values(mask, token, virtual, 1),
        }
        return conditioned, positions, token, virtual

    def _take_users(self, causal_lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        user_indices = kwargs.pop("user_indices", None)
        soft_prompts = kwargs.pop("soft_prompts", None)
        if user_indices is not None and soft_prompts is not None:
            raise ValueError(
                "A call takes `user_indices` or `soft_prompts`, not both: the former stand for "
                "`soft_prompts=model.user_model(user_indices)`. Leave one of them out."
            )
        if user_indices is not None or soft_prompts is not None:
            # the model that is called, which is a copy of ours where `DataParallel` made one for another device
            keep(self, "users", (causal_lm, user_indices, soft_prompts, args[0] if args else kwargs.get("input_ids")))
        return args, kwargs

    def _check_users(self, causal_lm: nn.Module, args: tuple, output: Any) -> None:
        if take(self, "users") is not None:
            raise RuntimeError(
                f"{type(causal_lm).__name__} does not call its decoder as a module, so the soft prompts were not put in. If "
                "the decoder was replaced after the user model was attached, attach it again (`detach_user_model`, "
                "`attach_user_model`); else please report the model."
            )

    def _insert(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        users = take(self, "users")
        if users is None:
            if in_call():  # a call of the decoder inside a conditioned one, by somebody's hook, is plain
                keep(self, "inserted", None)
            return args, kwargs
        causal_lm, user_indices, soft_prompts, input_ids = users
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes `None` for most
        embeds_at_call = "inputs_embeds" in kwargs and "input_ids" in kwargs
        kwargs.pop("input_ids", None)
        if len(args) > 1 or input_ids is None or embeds_at_call:
            raise ValueError("A call with users needs `input_ids`, and everything else by keyword.")
        caches = [value for value in kwargs.values() if hasattr(value, "get_seq_length")]
        if any(cache.get_seq_length() > 0 for cache in caches):
            raise ValueError("A call with users cannot continue from a cache; use `generate(..., user_ids=...)`.")
        if soft_prompts is None:
            _check_user_indices(user_indices, input_ids.shape[0], causal_lm.user_model.config.num_users)
            soft_prompts = soft_prompts_of(causal_lm.user_model, user_indices)
        embeds = kwargs.pop("inputs_embeds", None)
        if embeds is None:
            embeds = causal_lm.get_input_embeddings()(input_ids)
        input_ids = input_ids.to(embeds.device)  # a model that is offloaded moves what it is given
        conditioned, positions, token, virtual = self.condition(
            soft_prompts, input_ids, kwargs.pop("attention_mask", None), embeds
        )
        for name, values in kwargs.items():
            if not isinstance(values, Tensor) or values.shape[-1:] != input_ids.shape[-1:]:
                continue
            if name == "position_ids":
                kwargs[name] = insert_position_ids(values, positions, token, virtual)
            elif values.shape == input_ids.shape:  # token types, where images are, ...
                kwargs[name] = insert_values(values, token, virtual, 0)
        keep(self, "inserted", (positions, soft_prompts.shape[1]))
        return (), {**kwargs, **conditioned}

    def _realign(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        inserted = take(self, "inserted")
        if inserted is None or output is None:  # there is no output if the decoder failed
            return None
        positions, num_virtual_tokens = inserted
        return realign_outputs(output, positions, num_virtual_tokens)


def soft_prompts_of(user_model: UserModel, user_indices: Tensor) -> Tensor:
    """
    The soft prompts of the users in these rows `(batch, T, token_dim)`, also where `user_indices` are on another device than
    the users: those of a language model that is offloaded stay where they were.
    """
    for parameter in user_model.parameters():
        if not parameter.is_meta:  # users that are offloaded themselves move what they are given
            user_indices = user_indices.to(parameter.device)
        break
    return user_model(user_indices)


def _check_user_indices(user_indices: Tensor, batch_size: int, num_users: int) -> None:
    if not isinstance(user_indices, Tensor) or user_indices.is_floating_point() or user_indices.dtype == torch.bool:
        found = user_indices.dtype if isinstance(user_indices, Tensor) else type(user_indices).__name__
        raise TypeError(
            f"`user_indices` must be a tensor of integers, the rows of users, got {found}. "
            "`model.user_vocab.encode(user_ids)` returns the rows of ids."
        )
    if user_indices.shape != (batch_size,):
        raise ValueError(
            f"`user_indices` must hold one user per row, shape ({batch_size},), got {tuple(user_indices.shape)}."
        )
    # on an accelerator, reading the numbers would make every call wait for it
    if user_indices.device.type == "cpu" and batch_size and not torch.compiler.is_compiling():
        lowest, highest = (int(row) for row in user_indices.aminmax())
        if lowest < 0 or highest > num_users:
            raise ValueError(
                f"`user_indices` has rows from {lowest} to {highest}, but there are {num_users} users: rows are 0 (the "
                f"generic user) to {num_users}."
            )


def _check_soft_prompts(soft_prompts: Tensor, batch_size: int, token_dim: int) -> None:
    advice = "`model.user_model(user_indices)` returns what fits."
    if not isinstance(soft_prompts, Tensor) or not soft_prompts.is_floating_point():
        found = soft_prompts.dtype if isinstance(soft_prompts, Tensor) else type(soft_prompts).__name__
        raise TypeError(f"`soft_prompts` must be a tensor of floating-point numbers, got {found}. {advice}")
    shape = tuple(soft_prompts.shape)
    if len(shape) != 3 or shape[0] != batch_size or shape[1] < 1 or shape[2] != token_dim:
        raise ValueError(
            f"`soft_prompts` must hold one prompt per row, shape (batch, virtual tokens, width of the embeddings) = "
            f"({batch_size}, 1 or more, {token_dim}), got {shape}. {advice}"
        )

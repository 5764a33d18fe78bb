"""
Chosen and rejected share their prompt: both are scored in one row, `[prompt | chosen | rejected]`, at half the tokens.

A packed row has T + P + C + R - 1 columns where two rows have 2 (T + P) + C + R. The branches do not see each other, and
their positions restart, so every token is computed as in a row of its own. Two details make it exact: the last common
element opens **both** branches (it predicts another token in each), and the last token of a branch, which predicts nothing,
is left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig

from ..models.calls import OwnCalls, in_call, keep, take
from ..models.mixins import add_mixin


PADDING, PREFIX, CHOSEN, REJECTED = 0, 1, 2, 3  # the branch of a column; nonzero where an attention mask is
BATCH_KEYS = {
    "input_ids",
    "attention_mask",
    "completion_mask",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "user_indices",
}
MODEL_TYPES = {  # attention and everything else go by the mask and the positions given; checked by a test for each
    *(
        "gptj",
        "gpt2",
        "gpt_neox",
        "opt",
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
    ),
    *("gemma3_text", "phi", "phi3", "falcon", "olmo2", "granite", "cohere2", "smollm3", "gpt_oss"),
}
ATTENTION = {"eager", "sdpa"}  # implementations that take a mask of pairs of columns
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass
class PackedPairs:
    """
    Where things are in the rows that the decoder gets. A batch has `B` pairs, so `2B` rows of `L` columns. The decoder gets
    `N` rows: `B` packed ones of `W` columns, or the `2B` as they are. `S` columns of a row are scored.

    Args:
        scored_columns (`LongTensor` `(N, S)`): The columns of each row that predict a token of a completion.
        labels (`LongTensor` `(N, S)`): The token that such a column predicts, as an index into `input_ids.flatten()`; -1
            where a row has fewer scored columns than `S`.
        scores (`LongTensor` `(2B, L - 1)`): For each column of the caller, where the score of the token it predicts is, as an
            index into the flattened `(N, S)` scores; -1 where nothing is scored.
        tokens (`LongTensor` `(B, W)`, *optional*): The token in each packed column, as an index into `input_ids.flatten()`.
            This and the three that follow are `None` if the rows are not packed.
        branches (`LongTensor` `(B, W)`, *optional*): What each packed column belongs to: `PADDING`, `PREFIX`, `CHOSEN` or
            `REJECTED`.
        position_ids (`LongTensor` `(B, W)`, *optional*): The position that each packed column's token has in its own row.
        rejected (`BoolTensor` `(B, R)`, *optional*): True where a column belongs to the rejected branch; column 0 is the first
            rejected token, and `R` the length of the longest rejected branch.
    """

    scored_columns: Tensor
    labels: Tensor
    scores: Tensor
    tokens: Tensor | None = None
    branches: Tensor | None = None
    position_ids: Tensor | None = None
    rejected: Tensor | None = None

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name, for a batch: what is in a batch is moved to the model's device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def pack_pairs(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> PackedPairs | None:
    """
    How the pairs of a batch are packed, or `None` if they cannot be: a pair has no two first tokens in common, or padding is
    not on the right.

    Args:
        input_ids (`LongTensor` `(2B, L)`): The token ids of the chosen rows, then those of the rejected rows.
        attention_mask (`LongTensor` `(2B, L)`): Nonzero where there is a token, 0 where there is padding.
        completion_mask (`LongTensor` `(2B, L)`): Nonzero at the tokens of completions, which are scored.

    ```python
    >>> ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]])
    >>> completion = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]])
    >>> packed = pack_pairs(ids, ids.ne(0).long(), completion)
    >>> ids.flatten()[packed.tokens], packed.branches, packed.position_ids
    (tensor([[1, 2, 3, 4, 3]]), tensor([[1, 1, 2, 2, 3]]), tensor([[0, 1, 2, 3, 2]]))
    >>> packed.scored_columns, ids.flatten()[packed.labels]
    (tensor([[2, 3, 4]]), tensor([[4, 5, 6]]))
    >>> packed.scores
    tensor([[-1, -1,  0,  1],
            [-1, -1,  2, -1]])
    ```
    """
    num_rows, seq_len = input_ids.shape
    num_pairs, column = num_rows // 2, torch.arange(seq_len, device=input_ids.device)
    mask = attention_mask.ne(0)
    lengths = mask.sum(dim=1)
    if num_rows % 2 or not torch.equal(mask, column < lengths[:, None]):
        return None
    chosen, rejected = lengths.chunk(2)
    same = input_ids[:num_pairs].eq(input_ids[num_pairs:]) & completion_mask[:num_pairs].eq(
        completion_mask[num_pairs:]
    )
    same &= column < torch.minimum(chosen, rejected)[:, None]
    # A cumulative product is 1 up to the first difference, so its sum is the number of common tokens. The last of them is
    # not in the prefix but in both branches: it predicts the next chosen token in one, the next rejected token in the other.
    prefix = same.long().cumprod(dim=1).sum(dim=1) - 1  # its last element opens both branches
    if prefix.numel() == 0 or prefix.min() < 1:  # the soft prompt, after BOS, must be in the prefix
        return None
    # The last token of a sequence predicts nothing, so each branch is one token shorter than its sequence.
    in_chosen, in_rejected = chosen - 1 - prefix, rejected - 1 - prefix
    end = prefix + in_chosen + in_rejected
    width = int(end.max())
    column = torch.arange(width, device=input_ids.device).expand(num_pairs, width)
    branches = torch.full_like(column, REJECTED)
    branches[column < (prefix + in_chosen)[:, None]] = CHOSEN
    branches[column < prefix[:, None]] = PREFIX
    branches[column >= end[:, None]] = PADDING
    rejected = torch.arange(max(int(in_rejected.max()), 1), device=input_ids.device) < in_rejected[:, None]
    is_rejected, is_token = branches == REJECTED, branches != PADDING
    # A rejected token stands behind the chosen branch, but its position goes on from the prefix. Position = column in the
    # sequence's own row, which is also where its token is found.
    position_ids = torch.where(is_token, column - is_rejected * in_chosen[:, None], 0)
    row = torch.arange(num_pairs, device=input_ids.device)[:, None] + num_pairs * is_rejected
    tokens = torch.where(is_token, row * seq_len + position_ids, 0)

    # What a column predicts is the token after its own, in the caller's row: `tokens + 1`, not the next packed column, which
    # at the end of the prefix and of the chosen branch belongs to something else.
    following = torch.where(is_token, tokens + 1, 0)
    is_scored = is_token & completion_mask.flatten()[following].ne(0)
    # Back again: column t of the caller's chosen row is packed column t; in the rejected row, columns from the end of the
    # prefix on have moved behind the chosen branch.
    caller = torch.arange(seq_len - 1, device=input_ids.device)
    shift = torch.cat([torch.zeros_like(in_chosen), in_chosen])
    packed_column = caller + torch.where(caller >= prefix.repeat(2)[:, None], shift[:, None], 0)
    pair = torch.arange(num_pairs, device=input_ids.device).repeat(2)[:, None]
    scored_columns, labels, rank = _scored(is_scored, following)
    index = pair * scored_columns.shape[1] + rank[pair, packed_column.clamp(max=width - 1)]
    scores = torch.where(completion_mask[:, 1:].ne(0) & mask[:, 1:], index, -1)
    return PackedPairs(scored_columns, labels, scores, tokens, branches, position_ids, rejected)


def select_scored(completion_mask: Tensor) -> PackedPairs:
    """
    For rows that stay as they are, `(2B, L)`: only their scored columns reach the LM head.

    ```python
    >>> select_scored(torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])).scored_columns
    tensor([[1, 2],
            [1, 0]])
    ```
    """
    num_rows, seq_len = completion_mask.shape
    is_scored = completion_mask[:, 1:].ne(0)
    following = torch.arange(num_rows * seq_len, device=completion_mask.device).view(num_rows, seq_len)[:, 1:]
    scored_columns, labels, rank = _scored(is_scored, following)
    row = torch.arange(num_rows, device=completion_mask.device)[:, None]
    return PackedPairs(scored_columns, labels, torch.where(is_scored, row * scored_columns.shape[1] + rank, -1))


def _scored(is_scored: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `scored_columns`, `labels`, and the rank of each column among the scored columns of its row."""
    num_scored = max(int(is_scored.sum(dim=1).max()), 1)
    scored_columns = is_scored.long().argsort(dim=1, descending=True, stable=True)[:, :num_scored]
    labels = torch.where(is_scored, following, -1).gather(1, scored_columns)
    return scored_columns, labels, is_scored.cumsum(dim=1) - 1


def packed_attention_mask(branches: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """
    Which columns see which, bool `(batch, 1, W, W)`: a column sees earlier ones of the prefix and of its own branch, at most
    `window` positions back. Padding sees itself, as the softmax over nothing would be NaN.

    ```python
    >>> packed_attention_mask(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 1]]))[0, 0].long()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]])
    ```
    """
    width = branches.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=branches.device).tril()
    query, key = branches[:, :, None], branches[:, None, :]
    allowed = causal & ((key == PREFIX) | (query == key)) & (key != PADDING)
    if window is not None:
        allowed = allowed & (position_ids[:, :, None] - position_ids[:, None, :] < window)
    return (allowed | torch.eye(width, dtype=torch.bool, device=branches.device))[:, None]


class PackedAttentionMask(Tensor):
    """
    [`packed_attention_mask`] with which `scaled_dot_product_attention` computes less, in the manner of those of
    `torch.nn.attention.bias`: prompt and chosen are a causal block of C columns, and the rejected queries see the K columns of
    prompt and rejected, as a causal block too if they are many. These are about (C^2 + K^2) / 2 scores for each head, not W^2,
    and a causal block needs no mask. The W^2 values `(B, 1, W, W)` are computed for any other function that reads them.

    Args:
        branches (`LongTensor` `(B, W)`): What each column belongs to: `PADDING`, `PREFIX`, `CHOSEN` or `REJECTED`.
        position_ids (`LongTensor` `(B, W)`): The position of each column's token in its own row. They restart in the rejected
            branch.
        num_rejected (`int`): R, the number of columns in the longest rejected branch, or more.
        row_length (`int`): K, the number of columns that the longest sequence would need in a row of its own, or more. C is
            the smaller of K and W.
        window (`int`, *optional*): In layers with sliding-window attention, how many positions a column sees, itself included.
            `None` in layers without.

    ```python
    >>> branches, position_ids = torch.tensor([[1, 1, 2, 3, 3]]), torch.tensor([[0, 1, 2, 2, 3]])
    >>> plain = packed_attention_mask(branches, position_ids)
    >>> mask = PackedAttentionMask.make(branches, position_ids, num_rejected=2, row_length=4)
    >>> x = torch.randn(1, 2, 5, 8)
    >>> torch.testing.assert_close(
    ...     F.scaled_dot_product_attention(x, x, x, mask), F.scaled_dot_product_attention(x, x, x, plain)
    ... )

    ```
    """

    dense: Callable[[], Tensor]
    num_chosen: int
    queries: Tensor
    keys: Tensor
    order: Tensor
    chosen_mask: Tensor | None
    rejected_mask: Tensor | None

    @classmethod
    def make(
        cls, branches: Tensor, position_ids: Tensor, num_rejected: int, row_length: int, window: int | None = None
    ) -> "PackedAttentionMask":
        """The mask of rows with these branches. All sizes are known beforehand, so nothing waits for the device."""
        (num_rows, width), device = branches.shape, branches.device
        self = torch.zeros((), dtype=torch.bool, device=device).expand(num_rows, 1, width, width).as_subclass(cls)
        self.dense = partial(packed_attention_mask, branches, position_ids, window)
        self.num_chosen = min(row_length, width)
        prefix = branches.eq(PREFIX).sum(dim=1, keepdim=True)
        start = prefix + branches.eq(CHOSEN).sum(dim=1, keepdim=True)  # of rejected
        column = torch.arange(row_length, device=device)
        # What the rejected branch sees is prefix and rejected without chosen between them: the sequence in a row of its own.
        keys = torch.where(column < prefix, column, start + column - prefix).clamp(max=width - 1)
        has_all_queries = 2 * num_rejected > row_length  # half of a square is less than R rows of it
        # Ranks count columns of that row. Queries start at rank `first`: at 0 if all of the row is computed (a square block is
        # causal and needs no mask), else where the rejected branch starts.
        first = torch.zeros_like(prefix) if has_all_queries else prefix
        rank = first + torch.arange(row_length if has_all_queries else num_rejected, device=device)
        queries = keys if has_all_queries else (start + rank - prefix).clamp(max=width - 1)
        self.keys, self.queries = _flat_index(keys, width), _flat_index(queries, width)
        self.chosen_mask = _band(column[: self.num_chosen], self.num_chosen, window)
        if has_all_queries:
            self.rejected_mask = _band(column, row_length, window)
        else:
            visible = column <= rank[:, :, None]
            visible = visible if window is None else visible & (rank[:, :, None] - column < window)
            self.rejected_mask = visible[:, None]
        # Results of the chosen block come first, those of the rejected block behind them, `prefix - first` of which (the
        # prefix, computed a second time) are not needed. `order` says where the result of each column is.
        column = torch.arange(width, device=device)
        order = torch.where(column < start, column, self.num_chosen + column - start + prefix - first)
        num_computed = self.num_chosen + queries.shape[1]
        self.order = _flat_index(order.clamp(max=num_computed - 1), num_computed)
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func.__name__ not in {"__get__", "size", "dim", "is_floating_point"}:  # those read no values
            args, kwargs = tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: PackedAttentionMask, *args: Any, **kwargs: Any
) -> Tensor:
    """Computes `scaled_dot_product_attention` with a [`PackedAttentionMask`]: `(B, heads, W, width of a head)`."""
    dropout_p = args[0] if args else kwargs.pop("dropout_p", 0.0)
    kwargs.pop("is_causal", None)  # not with a mask

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal=mask is None, **kwargs)

    first = slice(attn_mask.num_chosen)
    chosen = attend(query[:, :, first], key[:, :, first], value[:, :, first], attn_mask.chosen_mask)
    rejected = attend(
        _take(query, attn_mask.queries),
        _take(key, attn_mask.keys),
        _take(value, attn_mask.keys),
        attn_mask.rejected_mask,
    )
    return _take(torch.cat([chosen, rejected], dim=2), attn_mask.order)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Takes from `values` `(B, heads, W, width)` the columns of a [`_flat_index`] `(B, N)`: `(B, heads, N, width)`."""
    taken = values.transpose(1, 2).flatten(0, 1).index_select(0, index.flatten())
    return taken.unflatten(0, index.shape).transpose(1, 2)


def _flat_index(columns: Tensor, width: int) -> Tensor:
    """Turns column numbers `(B, N)` into positions in the flattened batch `(B * width,)`."""
    return columns + width * torch.arange(columns.shape[0], device=columns.device)[:, None]


def _band(column: Tensor, length: int, window: int | None) -> Tensor | None:
    """The sliding-window mask of a causal block, bool `(1, 1, length, length)`; `None` if the window covers the block."""
    if window is None or window >= length:
        return None
    distance = column[:, None] - column
    return ((distance >= 0) & (distance < window))[None, None]


def reason_not_to_share(config: PreTrainedConfig) -> str | None:
    """Why prefixes are not shared in this model, or `None` if it is among those known to compute the same."""
    config = config.get_text_config()
    implementation = config._attn_implementation
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type!r} is not among the model types that are known to compute the same in packed rows"
    if implementation not in ATTENTION:
        return f"attention {implementation!r} takes no mask of pairs of columns (use one of {sorted(ATTENTION)})"
    if getattr(config, "alibi", False):
        return "its ALiBi positions are those of columns"
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        return f"it has layers of other types than attention ({sorted(unknown)})"
    return None


class PrefixSharing:
    """
    Lets a causal LM with TRL's fused head take packed pairs. `model(..., packed_pairs=PackedPairs(...).to_dict())` takes the
    same `input_ids`, `labels` and so on as without, and computes the same outputs of shape `(2B, L - 1)`. Users, or
    `soft_prompts`, are given for all 2B rows; both rows of a pair must have the same, and the chosen row's is taken.

    It is two pairs of hooks. Those on the causal LM pack what goes in and unpack what comes out; those on its decoder turn the
    branches into attention masks, after a soft prompt was put in, and leave only the hidden states that are scored.

    Args:
        causal_lm (`PreTrainedModel`): The language model with TRL's fused head, without PEFT around it.
        has_blocks (`bool`): Whether sdpa gets a [`PackedAttentionMask`]. A compiled model gets the plain mask.
    """

    def __init__(self, causal_lm: Any, has_blocks: bool = True) -> None:
        self.config = causal_lm.config.get_text_config()
        self.has_blocks = has_blocks
        if not isinstance(causal_lm, OwnCalls):  # the reference policy; a model with users has it already
            add_mixin(causal_lm, OwnCalls)
        decoder = causal_lm.get_decoder()
        causal_lm.register_forward_pre_hook(self._pack, with_kwargs=True, prepend=True)  # before users are taken
        causal_lm.register_forward_hook(self._unpack)
        decoder.register_forward_pre_hook(self._mask, with_kwargs=True)  # after the soft prompt was put in
        decoder.register_forward_hook(self._select, always_call=True)  # after it was taken out

    def _pack(self, causal_lm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = kwargs.pop("packed_pairs", None)
        if given is None or not kwargs.get("fused_lm_head"):  # TRL asks for logits too, where they are wanted
            return args, kwargs
        packed = PackedPairs(**given)
        keep(self, "pairs to unpack", packed)
        keep(self, "pairs for the decoder", packed)
        labels = kwargs.pop("labels").flatten()[packed.labels.clamp(min=0)]
        kwargs["shift_labels"] = labels.masked_fill(packed.labels < 0, -100)
        if packed.tokens is None:
            return args, kwargs
        kwargs["input_ids"] = kwargs["input_ids"].flatten()[packed.tokens]
        kwargs["attention_mask"] = packed.branches
        kwargs["position_ids"] = packed.position_ids
        for name in ("user_indices", "soft_prompts"):  # both rows of a pair have the same
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].chunk(2)[0]
        return args, kwargs

    def _mask(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        packed = take(self, "pairs for the decoder")
        if in_call():  # also `None`: a call of the decoder inside this one, by somebody's hook, is not of packed rows
            keep(self, "pairs in the decoder", packed)
        if packed is None or packed.branches is None or packed.rejected is None:
            return None
        branches, position_ids = kwargs["attention_mask"], kwargs["position_ids"]
        dtype = next(value.dtype for value in decoder.parameters() if value.is_floating_point())
        num_virtual_tokens = branches.shape[1] - packed.branches.shape[1]
        row_length = num_virtual_tokens + packed.scores.shape[1]  # the last token of a row is in no packed one
        # a single column has nothing to leave out, and transformers puts grouped heads into its place
        in_blocks = self.has_blocks and self.config._attn_implementation == "sdpa" and branches.shape[1] > 1
        in_blocks &= not torch.compiler.is_compiling()
        masks: dict[str, Tensor] = {}
        for kind in self._kinds():
            window = self.config.sliding_window if kind == "sliding_attention" else None
            if in_blocks:
                num_rejected = packed.rejected.shape[1]
                masks[kind] = PackedAttentionMask.make(branches, position_ids, num_rejected, row_length, window)
                continue
            masks[kind] = packed_attention_mask(branches, position_ids, window)
            if self.config._attn_implementation == "eager":  # adds it to the scores
                hidden = torch.zeros(masks[kind].shape, dtype=dtype, device=branches.device)
                masks[kind] = hidden.masked_fill(~masks[kind], torch.finfo(dtype).min)
        attention_mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return args, {**kwargs, "attention_mask": attention_mask}

    def _kinds(self) -> set[str]:
        """The kinds of attention in the model."""
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types:
            return set(layer_types)
        return {"full_attention" if getattr(self.config, "sliding_window", None) is None else "sliding_attention"}

    def _select(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        packed = take(self, "pairs in the decoder")
        if packed is None or output is None:  # there is no output if the decoder failed
            return None
        hidden, columns = output["last_hidden_state"], packed.scored_columns
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        output["last_hidden_state"] = hidden[rows, columns.to(hidden.device)]
        return output

    def _unpack(self, causal_lm: nn.Module, args: tuple, output: Any) -> Any:
        packed = take(self, "pairs to unpack")
        if packed is None:
            return None
        for name, values in output.items():
            if isinstance(values, Tensor) and values.shape == packed.labels.shape:
                scores = packed.scores.to(values.device)
                output[name] = values.flatten()[scores.clamp(min=0)].masked_fill(scores < 0, 0)
        return output


@dataclass(frozen=True)
class PackingCost:
    """
    When packed rows are cheaper: a count of floating-point operations.

    Args:
        num_parameters (`int`): The number of weights in the decoder's matrices. Each costs two operations a token.
        attention_width (`int`): The number of layers times the width of the queries. Each unit costs four operations for a
            query and a key.
        num_virtual_tokens (`int`): The length of the soft prompt, which is in front of every row.
        has_blocks (`bool`): Whether attention goes by [`PackedAttentionMask`], and leaves out what is not seen.
        attention_penalty (`float`): How much longer an operation of attention takes than one of a matrix product.
        margin (`float`): Pairs are packed if they then cost less than this share of what two rows cost.
    """

    num_parameters: int
    attention_width: int
    num_virtual_tokens: int = 0
    has_blocks: bool = False
    attention_penalty: float = 3.0
    margin: float = 0.97

    def operations(self, num_columns: float, num_scores: float) -> float:
        """Operations for this many columns, and this many scores of a query and a key."""
        return 2 * self.num_parameters * num_columns + 4 * self.attention_penalty * self.attention_width * num_scores

    def separate(self, seq_len: int) -> float:
        """Operations of a pair in two rows of `seq_len` columns of text."""
        length = seq_len + self.num_virtual_tokens
        return self.operations(2 * length, length**2 if self.has_blocks else 2 * length**2)

    def packed(self, seq_len: int, width: int, num_rejected: int) -> float:
        """Operations of a pair in one row of `width` columns of text, at most `num_rejected` of the rejected branch."""
        length, width = seq_len - 1 + self.num_virtual_tokens, width + self.num_virtual_tokens
        num_scores = min(length, width) ** 2 / 2 + min(length**2 / 2, num_rejected * length)
        return self.operations(width, num_scores if self.has_blocks else width**2)

    def is_lower_packed(self, seq_len: int, packed: PackedPairs) -> bool:
        """Whether the pairs cost less packed than in two rows of `seq_len` columns."""
        assert packed.tokens is not None
        assert packed.rejected is not None
        one_row = self.packed(seq_len, packed.tokens.shape[1], packed.rejected.shape[1])
        return one_row < self.margin * self.separate(seq_len)

    @classmethod
    def of_model(cls, causal_lm: Any, num_virtual_tokens: int = 0, has_blocks: bool = True) -> "PackingCost":
        """The costs of a language model, from its config and the shapes of its parameters; blocks are for sdpa alone."""
        config = causal_lm.config.get_text_config()
        embedding = causal_lm.get_input_embeddings()
        outside = {id(p) for p in embedding.parameters()}
        num_parameters = sum(p.numel() for p in causal_lm.get_decoder().parameters() if id(p) not in outside)
        attention_width = config.num_hidden_layers * config.hidden_size
        has_blocks = has_blocks and config._attn_implementation == "sdpa"
        return cls(num_parameters, attention_width, num_virtual_tokens, has_blocks)


@dataclass(frozen=True)
class PairPacker:
    """
    Packs the pairs of a batch where that pays.

    Args:
        cost ([`PackingCost`], *optional*): Says when packing pays. Without it, pairs are always packed.
        selects (`bool`): Whether pairs that are not packed come with [`select_scored`]: on a CPU, TRL's head scores all
            columns, on a GPU only those with a label.
    """

    cost: PackingCost | None = None
    selects: bool = False

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """[`PackedPairs`] of a collated batch as a dictionary, or `None`: the pairs stay in two rows each."""
        if set(batch) - BATCH_KEYS:  # images, token types, ...
            return None
        packed = pack_pairs(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        pays = self.cost is None or (
            packed is not None and self.cost.is_lower_packed(batch["input_ids"].shape[1], packed)
        )
        if packed is not None and pays:
            return packed.to_dict()
        return select_scored(batch["completion_mask"]).to_dict() if self.selects else None

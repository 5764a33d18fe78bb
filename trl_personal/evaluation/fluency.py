"""How likely answers are under a model: fluency, under the reference policy that is told in words what the user wishes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..arrays import FloatArray, IntArray
from ..models.generation import PersonalizedGeneration
from ..models.mixins import add_mixin, remove_mixin
from ..models.saving import get_base_model, is_personalized
from ..user_profile import Prompt
from ..users import UserId
from ..writing import Request, encode_prompts, with_user_profiles, write_answers


MAX_LOGITS = 5e7  # of a batch: 0.2 GB in float32, and as much for each copy
TRL_COPY = "ref"  # TRL's name for its frozen copy of an adapter that training started from


class AnswerLogProbs(NamedTuple):
    """
    Log probabilities of answers.

    Args:
        nats (`NDArray`): Sum of the log probabilities of each answer's tokens, in nats, float `(n,)`.
        num_tokens (`NDArray`): The number of tokens that were scored, `(n,)`: without an end-of-sequence token, and cut where
            the model's positions end.
    """

    nats: FloatArray
    num_tokens: IntArray

    @property
    def nats_per_token(self) -> FloatArray:
        """The negative log probability of a token, mean over each answer: `(n,)`, NaN for an answer without tokens."""
        return np.divide(-self.nats, self.num_tokens, out=np.full(len(self.nats), np.nan), where=self.num_tokens > 0)


def answer_log_probs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    answers: Sequence[str],
    batch_size: int = 8,
    use_template: bool = False,
) -> AnswerLogProbs:
    """
    Score the answer to each request with `model`.

    Prompt and answer are tokenized apart, as generation writes them, and the answer follows the prompt (with `use_template`,
    the chat template's beginning of the answer).

    Args:
        model: A language model; with a user model attached, each request is scored for its user.
        tokenizer: The model's tokenizer.
        requests (`Sequence[Request]`): The `n` prompts, with user and profile, as for [`~writing.write_answers`].
        answers (`Sequence[str]`): The answer to each of them.
        batch_size (`int`, *optional*, defaults to `8`): The number of answers that are scored at once.
        use_template (`bool`, *optional*, defaults to `False`): Whether the chat template is applied.

    Returns:
        [`AnswerLogProbs`].

    ```python
    scores = answer_log_probs(model, tokenizer, [Request("alice", "Why is the sky blue?")], [" It scatters light."])
    scores.nats_per_token
    ```
    """
    nats, num_tokens = np.zeros(len(answers)), np.zeros(len(answers), dtype=np.intp)
    for rows, logits, targets, mask in answer_logits(model, tokenizer, requests, answers, batch_size, use_template):
        log_probs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        nats[rows] = (log_probs * mask).sum(dim=1).double().cpu().numpy()
        num_tokens[rows] = mask.sum(dim=1).cpu().numpy()
    return AnswerLogProbs(nats, num_tokens)


@torch.no_grad()
def answer_logits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    answers: Sequence[str],
    batch_size: int = 8,
    use_template: bool = False,
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """
    The logits of the tokens of answers, in batches of similar length; arguments are those of [`answer_log_probs`].

    Yields:
        The numbers of the rows; their logits, float `(batch, length, vocab_size)`, where position t predicts token t of the
        answer; these tokens, `(batch, length)`; and a mask of the same shape that is 0 at padding.
    """
    model.eval()
    prompts = with_user_profiles(model, tokenizer, requests, use_template)
    texts = {id(prompt): encode_prompts(tokenizer, [prompt], use_template)["input_ids"][0] for prompt in prompts}
    starts = [texts[id(prompt)] for prompt in prompts]
    room = _positions(model)
    tokens = [
        torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"], dtype=torch.long)[
            : max(0, room - len(s))
        ]
        for answer, s in zip(answers, starts, strict=True)
    ]
    order = sorted((i for i, found in enumerate(tokens) if len(found)), key=lambda i: len(starts[i]) + len(tokens[i]))
    for rows in _batches(order, [len(s) + len(t) for s, t in zip(starts, tokens, strict=True)], batch_size, model):
        ids = pad_sequence([torch.cat([starts[i], tokens[i]]) for i in rows], batch_first=True).to(model.device)
        mask = pad_sequence(
            [torch.ones(len(starts[i]) + len(tokens[i]), dtype=torch.long) for i in rows], batch_first=True
        ).to(model.device)
        of_users = {}
        if is_personalized(model):
            users = get_base_model(model).user_vocab.encode([requests[i].user_id for i in rows])
            of_users = {"user_indices": torch.tensor(users, device=model.device)}
        logits = model(input_ids=ids, attention_mask=mask, **of_users).logits
        length = max(len(tokens[i]) for i in rows)
        first = torch.tensor([len(starts[i]) for i in rows], device=logits.device)
        columns = first[:, None] + torch.arange(length, device=logits.device)
        is_token = columns < mask.sum(dim=1)[:, None].to(logits.device)
        is_token &= columns > 0  # nothing predicts the first token of a row
        columns = columns.clamp(max=ids.shape[1] - 1)
        batch = torch.arange(len(rows), device=logits.device)[:, None]
        targets = ids.to(logits.device).gather(1, columns)
        yield rows, logits[batch, (columns - 1).clamp(min=0)].float(), targets, is_token.long()


def _batches(order: list[int], lengths: list[int], batch_size: int, model: Any) -> Iterator[list[int]]:
    """The rows of each batch: `batch_size` of them, or fewer where their logits would take too much memory."""
    vocab_size = getattr(get_base_model(model).config.get_text_config(), "vocab_size", 1)
    while order:
        size = batch_size
        while size > 1 and size * lengths[order[:size][-1]] * vocab_size > MAX_LOGITS:
            size -= 1
        yield order[:size]
        order = order[size:]


def _positions(model: Any) -> int:
    """How many tokens of text a row of the model may have."""
    causal_lm = get_base_model(model)
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None) or 10**9
    return positions - (causal_lm.user_model.config.num_virtual_tokens if is_personalized(model) else 0)


# --- The reference policy -----------------------------------------------------------------------------------------------


@contextmanager
def reference_policy(trainer: Trainer) -> Iterator[PreTrainedModel]:
    """
    The reference policy of a trainer as a plain language model, to call and to generate with: its `ref_model`, or its model
    with the adapter off (or TRL's copy of the adapter on, if training went on from one). Inside the context that model has no
    users; afterwards it is as it was.

    Raises:
        `ValueError`: if all weights were trained and the trainer has kept no reference.

    ```python
    with reference_policy(trainer) as reference:
        answers = answers_by_user(reference, tokenizer, prompts, [None])[None]
    ```
    """
    of_trainer: Any = trainer
    reference = of_trainer.ref_model
    if reference is not None:
        yield of_trainer.accelerator.unwrap_model(reference)
        return
    model = of_trainer.accelerator.unwrap_model(of_trainer.model)
    if not isinstance(model, PeftModel):
        raise ValueError(
            "The trainer has changed all weights of its model and kept no reference policy, so fluency cannot be measured. "
            "Give it a `ref_model`."
        )
    with _without_users(model), _adapter(model):
        yield model  # type: ignore[misc]


@contextmanager
def _without_users(model: PeftModel) -> Iterator[None]:
    """Let `generate` of the model be that of its class; a call without users is the plain model anyway."""
    if not is_personalized(model):
        yield
        return
    causal_lm = get_base_model(model)
    remove_mixin(causal_lm, PersonalizedGeneration)
    try:
        yield
    finally:
        add_mixin(causal_lm, PersonalizedGeneration)


@contextmanager
def _adapter(model: PeftModel) -> Iterator[None]:
    if TRL_COPY not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    trained = model.active_adapter
    model.set_adapter(TRL_COPY, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(trained)


# --- Fluency ------------------------------------------------------------------------------------------------------------


def with_wish(prompt: Prompt, wish: str | None) -> Prompt:
    """
    A prompt with what the user wishes in front of the question, in words: in front of the text, or of what the user says last
    in a conversation. `None` leaves it as it is.

    ```python
    >>> with_wish("Why is the sky blue?", "Answer in one short sentence.")
    'Answer in one short sentence. Why is the sky blue?'
    >>> with_wish([{"role": "user", "content": "Why?"}], "Be brief.")
    [{'role': 'user', 'content': 'Be brief. Why?'}]
    ```
    """
    if wish is None or not wish.strip():
        return prompt
    if isinstance(prompt, str):
        return f"{wish.strip()} {prompt}"
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user" or i == 0)
    return [
        {**message, "content": f"{wish.strip()} {message['content']}"} if i == last else message
        for i, message in enumerate(prompt)
    ]


def nats_per_token(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    wish: str | None = None,
    batch_size: int = 8,
) -> FloatArray:
    """
    Fluency of answers: nats per token under a model, such as the reference policy, that is given each question with the user's
    wish in words ([`with_wish`]). Low is fluent; the model's own answers to the same are what to compare with.

    Args:
        model: The model that scores; give it without users, as [`reference_policy`] does.
        tokenizer: Its tokenizer. Conversations are rendered with its chat template, text is taken as it is.
        prompts (`Sequence`): The `n` prompts, texts or conversations.
        answers (`Sequence[str]`): The answer to each.
        wish (`str`, *optional*): What the user wishes, in words, such as `"Answer in one short sentence."`.
        batch_size (`int`, *optional*, defaults to `8`): The number of answers that are scored at once.

    Returns:
        Float `(n,)`, the mean over each answer's tokens; NaN for an answer without tokens.

    ```python
    with reference_policy(trainer) as reference:
        nats_per_token(reference, tokenizer, prompts, answers["ann"], wish="Answer in one short sentence.").mean()
    ```
    """
    requests = [Request(None, with_wish(prompt, wish)) for prompt in prompts]
    use_template = not all(isinstance(prompt, str) for prompt in prompts)
    return answer_log_probs(model, tokenizer, requests, answers, batch_size, use_template).nats_per_token


def base_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    wishes: Mapping[UserId, str | None] | None = None,
    batch_size: int = 8,
    **generate_kwargs: Any,
) -> dict[UserId, list[str]]:
    """
    The base model's own answers: to the plain prompts, under `None`, and for each user of `wishes` to the prompts with the
    user's wish. Each distinct wish is answered once.

    Args:
        model: The model that writes; give it without users, as [`reference_policy`] does.
        tokenizer: Its tokenizer.
        prompts (`Sequence`): Texts or conversations.
        wishes (`Mapping`, *optional*): For users what they wish, in words.
        batch_size (`int`, *optional*, defaults to `8`): The number of answers that are written at once.
        **generate_kwargs: Keywords of `model.generate`.

    ```python
    with reference_policy(trainer) as reference:
        base = base_answers(reference, tokenizer, prompts, {"ann": "Be brief."}, max_new_tokens=96)
    base[None], base["ann"]
    ```
    """
    use_template = not all(isinstance(prompt, str) for prompt in prompts)
    of_users = {None: None, **(wishes or {})}
    distinct = list(dict.fromkeys((wish or "").strip() for wish in of_users.values()))
    requests = [Request(None, with_wish(prompt, wish)) for wish in distinct for prompt in prompts]
    batches = write_answers(model, tokenizer, requests, batch_size, use_template, **generate_kwargs)
    written = [text for batch in batches for text in batch]
    places = {wish: i * len(prompts) for i, wish in enumerate(distinct)}
    return {
        user: written[places[(wish or "").strip()] : places[(wish or "").strip()] + len(prompts)]
        for user, wish in of_users.items()
    }

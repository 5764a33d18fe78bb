"""The one loop that writes answers: for each user and prompt an answer, in batches that mix users."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .files import read_json
from .models.blending import UserOrBlend
from .models.saving import get_base_model, is_personalized
from .user_profile import Prompt, render_user_profile, require_template


class Request(NamedTuple):
    """
    What to write an answer to.

    Args:
        user_id (`str` or `dict`, *optional*): The user, or weights of several; `None` is the generic one.
        prompt (`str` or `list[dict]`): Text, or a conversation.
        user_profile (`str`, *optional*): Text about the user, which is put into the prompt as in training.
    """

    user_id: UserOrBlend
    prompt: Prompt
    user_profile: str | None = None


def write_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    batch_size: int = 8,
    use_template: bool = False,
    **generate_kwargs: Any,
) -> Iterator[list[str]]:
    """
    Generate an answer to each request, in left-padded batches that mix users and prompts.

    Args:
        model: A language model with a user model attached; a plain one writes for the generic user.
        tokenizer: The model's tokenizer. It pads on the left here, whatever its own side.
        requests (`Sequence[Request]`): What to answer, in this order.
        batch_size (`int`, *optional*, defaults to `8`): The number of answers that are generated at once.
        use_template (`bool`, *optional*, defaults to `False`): Whether the chat template is applied. Plain text then becomes
            the first message of a conversation.
        **generate_kwargs: Keywords of `model.generate`, such as `max_new_tokens`, or a `user_strength` for all.

    Yields:
        `list[str]`: The answers of one batch, as soon as it is written, without special tokens.

    Raises:
        `ValueError`: for a profile, if the model was trained without profiles; or for a conversation without `use_template`.
    """
    model.eval()
    prompts = with_user_profiles(model, tokenizer, requests, use_template)
    for start in range(0, len(requests), batch_size):
        inputs = encode_prompts(tokenizer, prompts[start : start + batch_size], use_template)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        users = [request.user_id for request in requests[start : start + batch_size]]
        of_users = {"user_ids": users} if is_personalized(model) else {}
        outputs = model.generate(**inputs, **of_users, **generate_kwargs)
        yield tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def with_user_profiles(
    model: Any, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], use_template: bool = False
) -> list[Prompt]:
    """
    The prompts of `requests`, each with the profile of its user, if there is one, as the model was trained to read it.

    Raises:
        `ValueError`: if there are profiles and the model was trained without.
    """
    prompts = [as_messages(request.prompt) if use_template else request.prompt for request in requests]
    if all(request.user_profile is None for request in requests):
        return prompts
    template = require_template(get_base_model(model).user_profile_template)
    return [
        render_user_profile(prompt, request.user_profile, template, tokenizer.bos_token)
        for prompt, request in zip(prompts, requests, strict=True)
    ]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], use_template: bool) -> Any:
    """
    A batch of prompts, padded on the left. With `use_template`, plain text becomes the first message of a conversation.

    Raises:
        `ValueError`: if a prompt is a conversation and there is no chat template.
    """
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if not use_template:
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                "A prompt is a list of messages, which needs a chat template, but the tokenizer has none, or "
                "--no_chat_template is set. Give the prompts as text."
            )
        return tokenizer(list(prompts), **options)
    texts = [
        tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return tokenizer(texts, **options, add_special_tokens=False)  # the template writes them


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """
    A prompt as a conversation.

    ```python
    >>> as_messages("Why?")
    [{'role': 'user', 'content': 'Why?'}]
    ```
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def text_of_last(messages: Prompt) -> str:
    """
    The text itself, or what the last message of a conversation says.

    ```python
    >>> text_of_last([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}])
    'Because.'
    ```
    """
    return messages if isinstance(messages, str) else str(messages[-1]["content"])


def processor_name(name: str) -> str:
    """Where a model's tokenizer is: an adapter that was saved without one has its base model's."""
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return name
    return read_json(folder / "adapter_config.json")["base_model_name_or_path"]

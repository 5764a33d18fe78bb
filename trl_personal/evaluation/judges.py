"""Judges of answers: a function of one's own, a reward model, or a model behind an OpenAI-compatible endpoint."""

import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .answers import TIE, Judge


REWARD, OPENAI = "reward", "openai"  # what a judge's name begins with, unless it is a function
FORMS = (
    f"a function `package.module:name`, a reward model `{REWARD}:FOLDER`, or a model of an endpoint, `{OPENAI}:NAME`"
)
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
REQUESTS_AT_ONCE = 8
MAX_UNREADABLE = 0.5  # share of replies that say neither A, B nor TIE
INSTRUCTION = (
    "Below are a request and two answers to it. Which answer serves the person who wrote the request better? Follow what the "
    "request says about how to answer, and do not care which answer stands first. Reply with one word: A, B, or TIE.\n\n"
    "Request:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nWhich is better, A, B or TIE?"
)
REPLY = re.compile(r"\b(A|B|[Tt][Ii][Ee])\b")


def make_judge(name: str, base_url: str | None = None) -> Judge:
    """
    The judge that a name stands for.

    Args:
        name (`str`): `package.module:name`, a function `judge(prompts, pairs) -> list[int]` (see
            [`~evaluation.answers.win_rates`]); `reward:FOLDER` (or a hub name), a sequence classification model of one
            score; or `openai:MODEL`, a model behind an OpenAI-compatible endpoint.
        base_url (`str`, *optional*): Where the endpoint is, such as `http://localhost:8000/v1`. Defaults to the environment
            variable `OPENAI_BASE_URL`, then to OpenAI. The key is in `OPENAI_API_KEY`.

    Raises:
        `ValueError`: for a name of no such form, a module without the function, a reward model with several scores, or an
            endpoint of OpenAI's without a key. `ImportError`: if the module, or the package `openai`, cannot be imported.
    """
    kind, _, rest = name.partition(":")
    if kind == REWARD and rest:
        return reward_judge(rest)
    if kind == OPENAI and rest:
        return endpoint_judge(rest, base_url)
    if FUNCTION.fullmatch(name):
        return _function(kind, rest)
    raise ValueError(f"There is no judge {name!r}. Give {FORMS}.")


def _function(module_name: str, name: str) -> Judge:
    sys.path.insert(0, os.getcwd())  # as `python -m` has it: the function is most often in a file here
    try:
        module = import_module(module_name)
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"Module {module_name} has no function `{name}`, which is to be the judge.")
    return function


def reward_judge(name: str) -> Judge:
    """
    A judge that takes the answer with the higher reward.

    Prompt and answer are a conversation for the chat template, or one text, with an empty line between them, where the
    tokenizer has none.

    Args:
        name (`str`): The folder of a sequence classification model with one output, or its name on the hub.

    Raises:
        `ValueError`: if the model has more outputs than one.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    if model.config.num_labels != 1:
        raise ValueError(
            f"{name} has {model.config.num_labels} outputs, so which of them is the reward is not known. Give a reward model "
            "with one (`num_labels=1`), or write a function around this one."
        )
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    known: dict[tuple[str, str], float] = {}

    def judge(prompts: list[str], pairs: list[list[str]]) -> list[int]:
        wanted = {
            (prompt, answer) for prompt, pair in zip(prompts, pairs, strict=True) for answer in pair
        } - known.keys()
        known.update({text: _reward(model, tokenizer, text) for text in sorted(wanted)})
        rewards = [[known[prompt, answer] for answer in pair] for prompt, pair in zip(prompts, pairs, strict=True)]
        return [TIE if first == second else int(second > first) for first, second in rewards]

    return judge


@torch.no_grad()
def _reward(model: Any, tokenizer: Any, text: tuple[str, str]) -> float:
    """Of one prompt and answer. A row at a time, as padding is read as text by models whose config does not name it."""
    if tokenizer.chat_template is None:
        inputs = tokenizer("\n\n".join(text), truncation=True, return_tensors="pt")
    else:
        turns = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), text, strict=True)]
        inputs = tokenizer.apply_chat_template(turns, truncation=True, return_tensors="pt", return_dict=True)
    return float(model(**inputs.to(model.device)).logits[0, 0])


def endpoint_judge(model: str, base_url: str | None = None) -> Judge:
    """
    A judge that asks a model behind an OpenAI-compatible endpoint, several requests at once. Replies that say neither A, B nor
    TIE are ties.

    Args:
        model (`str`): The model's name there.
        base_url (`str`, *optional*): As for [`make_judge`].

    Raises:
        `ImportError`: without the package `openai`. `ValueError`: without a key for OpenAI's own endpoint; and when it judges,
            if more than half of the replies cannot be read.
    """
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ImportError(
            'A judge behind an endpoint needs the package `openai`: `pip install "trl-personal[judge]"`, or '
            "`pip install openai`."
        ) from error
    url, key = base_url or os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    if not url and not key:
        raise ValueError(
            "There is no key for OpenAI's endpoint in the environment variable `OPENAI_API_KEY`. Set it, or name another "
            "endpoint with `--judge_base_url`, such as http://localhost:8000/v1."
        )
    client: Any = OpenAI(base_url=url, api_key=key or "none")  # a server of one's own asks for no key, the client does

    def ask(prompt: str, pair: Sequence[str]) -> int | None:
        text = INSTRUCTION.format(prompt=prompt, first=pair[0], second=pair[1])
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0
        )
        return read_reply(reply.choices[0].message.content)

    def judge(prompts: list[str], pairs: list[list[str]]) -> list[int]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            verdicts = list(pool.map(ask, prompts, pairs))
        unreadable = sum(verdict is None for verdict in verdicts)
        if unreadable > MAX_UNREADABLE * len(verdicts):
            raise ValueError(
                f"{unreadable} of {len(verdicts)} replies of {model} say neither A, B nor TIE, so it cannot judge. Try "
                "another model."
            )
        return [TIE if verdict is None else verdict for verdict in verdicts]

    return judge


def read_reply(text: str | None) -> int | None:
    """
    0 for A, 1 for B, -1 for a tie, `None` if a reply says none of them or several. A word by itself on the last line counts
    before others.

    ```python
    >>> read_reply("B"), read_reply("Answer A is a bit better."), read_reply("tie"), read_reply("A or B"), read_reply(None)
    (1, 0, -1, None, None)
    >>> read_reply("Both A and B are short.\\nA")
    0
    ```
    """
    lines = (text or "").strip().splitlines()
    for part in (lines[-1], "\n".join(lines)) if lines else ():
        found = {word.upper() for word in REPLY.findall(part)}
        if len(found) == 1:
            return {"A": 0, "B": 1, "TIE": TIE}[found.pop()]
    return None

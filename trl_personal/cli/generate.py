"""`trl-personal generate`: an answer to every prompt for every user."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from .. import AutoPersonalizedModelForCausalLM, UserVocab
from ..models.blending import UserOrBlend
from ..terminal import json_line, print_whole, printable
from ..writing import Request, processor_name, text_of_last, write_answers
from .model_folder import check_model_name
from .quantization import quantization_config
from .requests import Prompt, read_prompts, read_user_profiles, read_users


@dataclass
class Answer:
    """
    One line of output. `user_id` is `None` for the generic user, and weights for a blend; `known` says whether the model has
    a row for the user, or for all users of a blend.
    """

    user_id: UserOrBlend
    known: bool
    prompt: Prompt
    text: str


def run_generate(arguments: Namespace) -> None:
    """Read prompts and users, load the model, write the answers as they come (jsonl) or at the end (table)."""
    prompts = read_prompts(arguments.prompt, arguments.prompts_file)
    user_ids = read_users(arguments.users, arguments.users_file)
    profiles = read_user_profiles(arguments.user_profiles)
    check_model_name(arguments.model)
    with _open_output(arguments.output) as output:
        model, tokenizer = load(arguments)
        warn_of_unknown_users(user_ids, model.user_vocab)
        set_seed(arguments.seed)
        answers = generate(model, tokenizer, prompts, user_ids, profiles, arguments)
        if arguments.format == "jsonl":
            for answer in answers:
                output.write(json_line(asdict(answer)) + "\n")
                output.flush()
        else:
            print_whole(as_table(list(answers)), file=output)


def is_known(user_id: UserOrBlend, user_vocab: UserVocab) -> bool:
    """Whether the model has a row for a user, or for all users of a blend."""
    if isinstance(user_id, Mapping):
        return all(user in user_vocab for user in user_id)
    return user_id in user_vocab


def warn_of_unknown_users(user_ids: Sequence[UserOrBlend], user_vocab: UserVocab) -> None:
    """Say once on stderr who gets the generic user's answers without being it."""
    unknown = [user_id for user_id in user_ids if user_id is not None and not is_known(user_id, user_vocab)]
    if unknown:
        sys.stderr.write(
            f"{len(unknown)} of {len(user_ids)} users are unknown to the model and get the generic user's answers.\n"
        )


def load(arguments: Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, on an accelerator if there is one, and its tokenizer, which pads on the left."""
    device_map = arguments.device_map or ("auto" if torch.accelerator.is_available() else None)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=arguments.dtype,
        device_map=device_map,
        quantization_config=quantization_config(arguments),
    )
    tokenizer = AutoTokenizer.from_pretrained(processor_name(arguments.model), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    user_ids: Sequence[UserOrBlend],
    user_profiles: Mapping[str, str | None],
    arguments: Namespace,
) -> Iterator[Answer]:
    """The answers, prompt by prompt and user by user, as soon as their batch is written."""
    asked = [(user_id, prompt) for prompt in prompts for user_id in user_ids]
    # who is unknown was said once; the model would say it in every batch, so it is asked for the generic user
    requests = [
        Request(_known_part(user_id, model.user_vocab), prompt, user_profiles.get(str(user_id or "")))
        for user_id, prompt in asked
    ]
    batches = write_answers(
        model,
        tokenizer,
        requests,
        arguments.batch_size,
        use_template=tokenizer.chat_template is not None and not arguments.no_chat_template,
        pad_token_id=tokenizer.pad_token_id,
        **generation_options(arguments),
        **({} if arguments.user_strength is None else {"user_strength": arguments.user_strength}),
    )
    num_batches = -(-len(requests) // arguments.batch_size)
    with _progress(num_batches, arguments) as progress:
        written = (text for batch in progress.track(batches, num_batches, description="Generating") for text in batch)
        for (user_id, prompt), text in zip(asked, written, strict=True):
            yield Answer(user_id, is_known(user_id, model.user_vocab), prompt, text)


def _known_part(user_id: UserOrBlend, user_vocab: UserVocab) -> UserOrBlend:
    if isinstance(user_id, Mapping):
        return {user: weight for user, weight in user_id.items() if user in user_vocab} or None
    return user_id if user_id in user_vocab else None


def _progress(num_batches: int, arguments: Namespace) -> Progress:
    """A bar on stderr, unless there is one batch, nobody looks, or the lines that come out show the progress."""
    console = Console(stderr=True)
    lines_show = arguments.format == "jsonl" and arguments.output is None and sys.stdout.isatty()
    hidden = num_batches == 1 or not console.is_terminal or lines_show
    return Progress(console=console, disable=hidden, redirect_stdout=False, redirect_stderr=False)


def generation_options(arguments: Namespace) -> dict[str, Any]:
    """
    The options of `model.generate` that were set on the command line.

    ```python
    >>> options = Namespace(max_new_tokens=9, do_sample=False, temperature=0.0, top_p=None, repetition_penalty=None)
    >>> generation_options(options)
    {'max_new_tokens': 9, 'do_sample': False}
    ```
    """
    names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.temperature == 0:
        return {name: value for name, value in options.items() if name not in ("temperature", "top_p")} | {
            "do_sample": False
        }
    if arguments.do_sample or "temperature" in options or "top_p" in options:
        options["do_sample"] = True
    return options


def as_table(answers: Sequence[Answer]) -> Table:
    """Columns user, prompt and answer, with a line between prompts."""
    table = Table("user", "prompt", "answer")
    for index, answer in enumerate(answers):
        last = index + 1 == len(answers) or answers[index + 1].prompt is not answer.prompt
        table.add_row(
            _user_cell(answer),
            Text(printable(text_of_last(answer.prompt), keep="\n\t")),
            Text(printable(answer.text.strip(), keep="\n\t")),
            end_section=last,
        )
    return table


def _user_cell(answer: Answer) -> Text:
    if answer.user_id is None:
        return Text("(generic)", style="dim")
    name = json_line(answer.user_id) if isinstance(answer.user_id, Mapping) else printable(str(answer.user_id))
    return Text(name) if answer.known else Text(f"{name} (unknown)", style="yellow")


@contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file

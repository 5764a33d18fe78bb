"""`trl-personal users add` and `update`: rows of users are fitted to pairs, beside a language model that stays as it is."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import AutoProcessor
from trl import DatasetMixtureConfig, ScriptArguments

from .. import AutoPersonalizedModelForCausalLM
from ..files import write_atomically
from ..new_users.folder import write_users
from ..new_users.join import add_users, update_users
from ..new_users.results import UsersFit, fits_table
from ..terminal import json_line, print_whole
from ..training.run_folder import only_run_in
from ..training.settings import read_training_settings
from ..writing import processor_name
from .arguments import ColumnArguments
from .model_folder import check_model_name
from .preferences import in_memory, load_preferences, select_split
from .quantization import loading_options


TRAIN = "train"


def run_users_add(arguments: Namespace) -> None:
    """Let users join the model in a folder, and say what to expect of each."""
    _run(arguments, is_update=False)


def run_users_update(arguments: Namespace) -> None:
    """Refine known users in a folder, and say what to expect of each."""
    _run(arguments, is_update=True)


def _run(arguments: Namespace, is_update: bool) -> None:
    if arguments.ref_model is not None:
        check_model_name(arguments.ref_model, is_base=True)
    given = {name: getattr(arguments, name) for name in ("beta", "max_length", "user_id_column")}
    settings = read_training_settings(arguments.model) | {k: v for k, v in given.items() if v is not None}
    dataset = _load(arguments, settings)
    with (
        only_run_in(Path(arguments.model)),  # a training would write its own users over these
        redirect_stdout(sys.stderr),  # progress does not go where the result goes
    ):
        if not sys.stderr.isatty():
            disable_progress_bars()
        model = AutoPersonalizedModelForCausalLM.from_pretrained(arguments.model, **loading_options(arguments))
        tokenizer = AutoProcessor.from_pretrained(processor_name(arguments.model))
        common: dict[str, Any] = {"settings": settings, "batch_size": arguments.batch_size}
        if is_update:
            assert dataset is not None  # the parser asks for one
            fitted = update_users(model, dataset, tokenizer, arguments.ref_model, **common)
        else:
            fitted = add_users(model, dataset, tokenizer, arguments.ref_model, user_ids=arguments.user_ids, **common)
        write_users(model, arguments.model)
    _write(fitted, arguments, "present prompt" if is_update else "generic prompt")


def _load(arguments: Namespace, settings: dict[str, Any]) -> Dataset | None:
    if arguments.dataset_name is None:
        return None
    splits = load_preferences(
        ScriptArguments(dataset_name=arguments.dataset_name, dataset_config=arguments.dataset_config),
        DatasetMixtureConfig(),
        ColumnArguments.of(arguments),
        user_id_column=settings.get("user_id_column", "user_id"),
        user_profile_column=settings.get("user_profile_column"),
    )
    name = arguments.dataset_split or (next(iter(splits)) if len(splits) == 1 else TRAIN)
    return in_memory(select_split(splits, name, TRAIN))


def _write(fitted: UsersFit, arguments: Namespace, start_name: str) -> None:
    text = json_line(fitted.to_dict(), indent=2) + "\n"
    if arguments.output is not None:
        write_atomically(Path(arguments.output), text.encode())
    if arguments.format == "json":
        sys.stdout.write(text)
        return
    print_whole(fits_table(fitted.users, start_name))
    if fitted.num_left_out:
        sys.stderr.write(f"{fitted.num_left_out} pairs are left out: a prompt alone fills `max_length`.\n")
    sys.stderr.write(f"{fitted.summary()} {arguments.model}/user_model is written.\n")

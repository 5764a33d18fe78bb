"""`trl-personal eval`: whether users gain from their own soft prompts."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from trl import DatasetMixtureConfig, ScriptArguments

from ..data.generic import Splits
from ..evaluation import (
    ModelEvaluation,
    answers_table,
    evaluate_model,
    judge_table,
    make_judge,
    personalization_table,
    probes_table,
)
from ..evaluation.answers import Judge
from ..files import EVALUATION_ENDING, beside
from ..terminal import json_line, print_whole
from ..training.settings import read_training_settings
from .arguments import ColumnArguments
from .model_folder import check_model_name
from .preferences import in_memory, load_preferences, select_split
from .quantization import loading_options


TEST = "test"


def run_eval(arguments: Namespace) -> None:
    """Write the verdict and the table to the standard output, and all numbers and pictures to a folder."""
    for name in (arguments.model, arguments.vanilla):
        if name is not None:
            check_model_name(name)
    judge = _judge(arguments)
    splits = _load(arguments, arguments.dataset_name, arguments.dataset_config)
    with redirect_stdout(sys.stderr), _bars() as hidden:  # progress does not go where the result goes
        evaluation = evaluate_model(
            arguments.model,
            _test_split(splits, arguments.dataset_test_split),
            train_dataset=_train_split(splits, arguments),
            ref_model=arguments.ref_model,
            vanilla=arguments.vanilla,
            baselines=[name.strip() for name in arguments.baselines.split(",") if name.strip()],
            max_steps=arguments.max_steps,
            opposite_column=arguments.opposite_column,
            settings={
                name: value
                for name in ("beta", "max_length", "user_id_column")
                if (value := getattr(arguments, name)) is not None
            },
            num_generate=arguments.generate,
            generate_kwargs={"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample},
            wish_column=arguments.wish_column,
            judge=judge,
            judge_name=arguments.judge,
            probes=arguments.probes,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            disable_tqdm=hidden,
            **loading_options(arguments),
        )
        folder = Path(arguments.output_dir or beside(arguments.model, EVALUATION_ENDING))
        files = evaluation.save(folder)
    if evaluation.num_dropped:
        sys.stderr.write(f"{evaluation.num_dropped} pairs are left out: a prompt alone fills `max_length`.\n")
    if evaluation.movement is not None and (warning := evaluation.movement.warning()) is not None:
        sys.stderr.write(f"{warning}\n")
    sys.stderr.write(f"{', '.join(files)} are in {folder}.\n")
    _write(evaluation, arguments)


def _judge(arguments: Namespace) -> Judge | None:
    """The judge that was asked for, made before anything long starts."""
    if arguments.judge is None:
        return None
    if not arguments.generate:
        raise ValueError("A judge compares answers, so there must be some: add `--generate N`.")
    return make_judge(arguments.judge, arguments.judge_base_url)


@contextmanager
def _bars() -> Iterator[bool]:
    """Show progress bars only on a terminal; the value given is whether they are hidden."""
    hidden, shown_before = not sys.stderr.isatty(), is_progress_bar_enabled()
    if hidden:
        disable_progress_bars()
    try:
        yield hidden
    finally:
        if shown_before:
            enable_progress_bars()


def _load(arguments: Namespace, name: str, config: str | None) -> Splits:
    settings = read_training_settings(arguments.model)
    return load_preferences(
        ScriptArguments(dataset_name=name, dataset_config=config),
        DatasetMixtureConfig(),
        ColumnArguments.of(arguments),
        user_id_column=arguments.user_id_column or settings.get("user_id_column", "user_id"),
        user_profile_column=settings.get("user_profile_column"),
        extra_columns=[arguments.opposite_column, arguments.wish_column],
    )


def _test_split(splits: Splits, name: str | None) -> Dataset:
    """The split that was named; by default `test`, or the only split there is."""
    if name is None and TEST not in splits and len(splits) == 1:
        name = next(iter(splits))
    return in_memory(select_split(splits, name or TEST, TEST))


def _train_split(splits: Splits, arguments: Namespace) -> Dataset | None:
    """The pairs that the model was trained on, if baselines need them. They must not be the pairs to be scored."""
    if not arguments.baselines:
        return None
    if arguments.train_dataset is not None:
        found = _load(arguments, arguments.train_dataset, None)
        return in_memory(select_split(found, arguments.dataset_train_split, "train"))
    name = arguments.dataset_train_split
    return in_memory(splits[name]) if name in splits and len(splits) > 1 else None


def _write(evaluation: ModelEvaluation, arguments: Namespace) -> None:
    if arguments.format == "json":
        found = evaluation.to_dict()
        if not arguments.list_users:
            del found["users"], found["samples"]
            for part in ("answers", "judge", "probes"):
                if found[part] is not None:
                    del found[part]["users"]
        sys.stdout.write(json_line(found, indent=2) + "\n")
        return
    tables = [personalization_table(evaluation.report, arguments.list_users)]
    if evaluation.answers_report is not None:
        tables.append(answers_table(evaluation.answers_report, arguments.list_users))
    if evaluation.judge_report is not None:
        tables.append(judge_table(evaluation.judge_report, arguments.list_users))
    if evaluation.probes_report is not None:
        tables.append(probes_table(evaluation.probes_report, arguments.list_users))
    print_whole(*tables)
    if evaluation.answers_report is not None:
        sys.stdout.write(f"{evaluation.overall_verdict}\n")

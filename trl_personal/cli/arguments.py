"""The options of `trl-personal` and its commands. Only the standard library, so that `--help` is fast."""

import math
from argparse import REMAINDER, SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .._version import __version__
from .wrong_flags import unknown_arguments


PROG = "trl-personal"
DTYPES = ("auto", "bfloat16", "float16", "float32")

MAIN_EPILOG = """\
commands:
  audit     say what preferences allow before training: users, leakage, room for personalization
  dpo       train on the preferences of users: `trl dpo` with a user_id column
  eval      say which users gain from their own soft prompt: accuracy, baselines, and a verdict
  export    write a trained model for vLLM, or as one that any engine loads
  generate  write answers of a trained model, for every prompt and every user
  info      say what a trained model is: kind, users, sizes, versions
  key       make an API key for `serve`, with the users it may speak for
  serve     answer over HTTP, as OpenAI's API does, for every user
  users     list, rename, copy, export, import and remove the users of a trained model

`trl-personal COMMAND --help` explains a command.

exit codes: 0 fine, 1 an error at run time (one line on stderr), 2 wrong usage
"""


class CommandParser(ArgumentParser):
    """A parser that answers a wrong flag with the nearest right one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_arguments(unknown, self._option_string_actions))
        return parsed


@dataclass
class ColumnArguments:
    """Which column of the data holds what, for all commands that read preferences: the loaders' arguments."""

    prompt_column: str = field(
        default="prompt", metadata={"help": "Column with the prompt; without one, both answers may begin with it."}
    )
    chosen_column: str = field(default="chosen", metadata={"help": "Column with the preferred answer."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column with the other answer."})
    response_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns with the answers, or one column with a list of them, for choices, ratings and rankings. With one "
            "answer a row, those of a user to a prompt are put together."
        },
    )
    choice_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that says which of --response_columns is best: its number from 0, or its column's name."
        },
    )
    choice_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "What other values of --choice_column mean, such as A=0 B=1 draw=tie.",
            "metavar": "VALUE=N",
        },
    )
    rating_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns (or one with a list) with the rating of each answer; higher is better."},
    )
    ranking_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns (or one with a list) with the rank of each answer; 1 is best."}
    )
    ties: str = field(
        default="skip",
        metadata={
            "help": "What to make of two equally good answers: leave them out, or one pair each way.",
            "choices": ["skip", "both"],
        },
    )

    @classmethod
    def of(cls, arguments: Any) -> "ColumnArguments":
        """Those among the arguments of a command."""
        return cls(**{setting.name: getattr(arguments, setting.name) for setting in fields(cls)})


def _add_column_options(parser: ArgumentParser, default_user_column: str) -> None:
    group = parser.add_argument_group("columns of the data")
    group.add_argument(
        "--user_id_column",
        metavar="NAME",
        help=f"column with the user of each row; default: {default_user_column}",
    )
    for setting in fields(ColumnArguments):
        options = {"metavar": "NAME", **setting.metadata}
        if "choices" in options:
            del options["metavar"]
        if "list" in str(setting.type):
            options["nargs"] = "+"
        text = options.pop("help")
        default = "" if setting.default is None else f"; default: {setting.default}"
        group.add_argument(
            f"--{setting.name}",
            default=setting.default,
            help=f"{text[0].lower()}{text[1:].rstrip('.')}{default}",
            **options,
        )


def make_main_parser() -> ArgumentParser:
    """The options in front of the command; what follows it is left to the command."""
    parser = ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [options] COMMAND [arguments of the command]",
        description="DPO with TRL when every preference belongs to a user.",
        epilog=MAIN_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--import_module",
        metavar="FILE.py",
        action="append",
        default=[],
        help="a file (or the name of a module) that registers user models of your own; may be given several times",
    )
    parser.add_argument(
        "--no_launch",
        action="store_true",
        help="`dpo` trains in this process: for use under `torchrun -m` or `accelerate launch -m`",
    )
    parser.add_argument(
        "command",
        metavar="COMMAND",
        choices=("audit", "dpo", "eval", "export", "generate", "info", "key", "serve", "users"),
        help="see below",
    )
    parser.add_argument("arguments", nargs=REMAINDER, help=SUPPRESS).required = False
    return parser


def make_audit_parser() -> ArgumentParser:
    """The options of `trl-personal audit`."""
    parser = CommandParser(
        prog=f"{PROG} audit",
        description="Say what preference data allow, before anything is trained: users, agreement, leakage between splits, "
        "and whether there is room for personalization on simple features of the texts.",
        epilog="The exit code is 0 whatever is recommended.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset", help="a file, a folder of files or of `save_to_disk`, or a name on the hub")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    _add_column_options(parser, "user_id")
    parser.add_argument(
        "--split_column", metavar="NAME", help="column with the split of each row, if one file has several"
    )
    parser.add_argument(
        "--min_pairs",
        type=_positive,
        default=20,
        metavar="N",
        help="pairs below which a user has too few; default: 20",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder to write audit.json (with the ids of users) and audit.png to"
    )
    parser.add_argument("--list_users", action="store_true", help="also each user, with the id")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="random seed for folds and shuffles; default: 0"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def make_eval_parser() -> ArgumentParser:
    """The options of `trl-personal eval`."""
    parser = CommandParser(
        prog=f"{PROG} eval",
        description="Say whether users gain from their own soft prompts: pair accuracy with the user's own prompt, the "
        "generic prompt and another user's prompt, against vanilla DPO on all users and other baselines, with intervals and a "
        "verdict.",
        epilog="The exit code is 0 whatever the verdict is.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder that training wrote, or a repository on the hub")
    data = parser.add_argument_group("data", "A file, a folder of files or of `save_to_disk`, or a name on the hub.")
    data.add_argument("--dataset_name", required=True, metavar="DATASET", help="held-out pairs to score")
    data.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    data.add_argument("--dataset_test_split", metavar="NAME", help="split to score; default: test, or the only one")
    data.add_argument(
        "--train_dataset",
        metavar="DATASET",
        help="pairs that the model was trained on; default: those of --dataset_name",
    )
    data.add_argument(
        "--dataset_train_split", default="train", metavar="NAME", help="split with these pairs; default: train"
    )
    data.add_argument(
        "--opposite_column",
        metavar="NAME",
        help="column with the preference of each user: pairs are scored with the prompt of an opposite user too",
    )
    _add_column_options(parser, "that of the training")
    _add_baseline_options(parser)
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--generate", type=_positive, default=0, metavar="N", help="prompts to answer for every user; default: none"
    )
    answers.add_argument(
        "--max_new_tokens", type=_positive, default=128, metavar="N", help="tokens of an answer at most; default: 128"
    )
    answers.add_argument(
        "--do_sample", action="store_true", help="sample tokens, instead of taking the likeliest ones"
    )
    answers.add_argument(
        "--wish_column",
        metavar="NAME",
        help="column with each user's wish in words (Answer in one short sentence.): the base is told it where fluency is "
        "measured, and so is a judge",
    )
    answers.add_argument(
        "--judge",
        metavar="JUDGE",
        help="compares users' answers with the generic user's: a function package.module:name, a reward model reward:FOLDER, "
        "or a model of an OpenAI-compatible endpoint, openai:NAME",
    )
    answers.add_argument(
        "--judge_base_url",
        metavar="URL",
        help="the endpoint, such as http://localhost:8000/v1 (key in OPENAI_API_KEY); default: OPENAI_BASE_URL, or OpenAI",
    )
    parser.add_argument(
        "--probes",
        action="store_true",
        help="what personalization costs: accuracy where users agree, distance from the base on neutral prompts, and how "
        "often users are told what they like to hear",
    )
    _add_loading_options(parser)
    parser.add_argument(
        "--batch_size", type=_positive, default=8, metavar="N", help="pairs scored at a time; default: 8"
    )
    parser.add_argument(
        "--beta",
        type=_above_zero,
        metavar="B",
        help="beta of DPO; default: that of the training",
    )
    parser.add_argument(
        "--max_length", type=_positive, metavar="N", help="tokens of a row at most; default: as in the training"
    )
    parser.add_argument(
        "--output_dir", metavar="FOLDER", help="folder for tables and pictures; default: MODEL-evaluation, beside it"
    )
    parser.add_argument("--list_users", action="store_true", help="also each user, with the id")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="random seed for sampled answers; default: 0"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_baseline_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("baselines", "They are trained with the settings that MODEL was trained with.")
    group.add_argument(
        "--ref_model", metavar="MODEL", help="model that the training started from; needed if MODEL is not an adapter"
    )
    group.add_argument(
        "--vanilla", metavar="FOLDER", help="vanilla DPO on all users, trained before (user_model_kind none)"
    )
    group.add_argument(
        "--baselines",
        default="",
        metavar="A,B,...",
        help="baselines to train now, on the pairs of --train_dataset: vanilla, user_id_text, in_context, lora_per_user",
    )
    group.add_argument(
        "--max_steps", type=_positive, metavar="N", help="training steps of each baseline; default: as in the training"
    )


def make_generate_parser() -> ArgumentParser:
    """The options of `trl-personal generate`."""
    parser = CommandParser(
        prog=f"{PROG} generate",
        description="Generate an answer to every prompt for every user, in batches.",
        epilog="A user who is not in the model gets the generic user's answers and is marked as unknown.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder that training wrote, or a repository on the hub")
    users = parser.add_mutually_exclusive_group()
    users.add_argument("--users", metavar="A,B,...", help="ids of the users; default: the generic user")
    users.add_argument(
        "--users_file",
        metavar="FILE",
        help="a file with one user id a line; in a .jsonl file, JSON: an id, null for the generic user, or weights of several "
        'users, {"ann": 0.7, "bo": 0.3}',
    )
    parser.add_argument(
        "--user_profiles",
        metavar="FILE.json",
        help='an object of texts about users, {"id": "text", ...}, for a model trained with profiles',
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    prompts.add_argument(
        "--prompts_file",
        metavar="FILE",
        help="one prompt a line; in a .jsonl file, objects with `prompt` (text or messages)",
    )
    parser.add_argument(
        "--user_strength",
        type=_strength,
        metavar="S",
        help="how far to go from the generic user (0) to each user (1, the default), from -1 to 2",
    )
    _add_generation_options(parser)
    _add_loading_options(parser)
    parser.add_argument("--format", choices=("table", "jsonl"), default="table", help="default: table")
    parser.add_argument("--output", metavar="FILE", help="file to write to; default: the standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_generation_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("generation", "What is not set follows the model's own generation settings.")
    group.add_argument(
        "--max_new_tokens", type=_positive, default=128, metavar="N", help="tokens of an answer at most; default: 128"
    )
    group.add_argument("--do_sample", action="store_true", help="sample tokens; implied by --temperature and --top_p")
    group.add_argument(
        "--temperature", type=_from_zero, metavar="T", help="0 takes the likeliest token, without sampling"
    )
    group.add_argument(
        "--top_p",
        type=_share,
        metavar="P",
        help="sample from the likeliest tokens, of probability P together",
    )
    group.add_argument(
        "--repetition_penalty",
        type=_above_zero,
        metavar="R",
        help="above 1, tokens that occurred before are less likely",
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="random seed for sampling; default: 0")
    group.add_argument(
        "--batch_size", type=_positive, default=8, metavar="N", help="answers written at a time; default: 8"
    )
    group.add_argument(
        "--no_chat_template", action="store_true", help="give text as it is to a model that has a chat template"
    )


def _add_loading_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("loading")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights; default: auto, as saved")
    group.add_argument(
        "--device_map",
        metavar="MAP",
        help='where the weights go, such as "auto" or "cuda:0"; default: an accelerator, if any',
    )
    group.add_argument("--load_in_4bit", action="store_true", help="quantize the language model (bitsandbytes)")


def make_export_parser() -> ArgumentParser:
    """The options of `trl-personal export`."""
    parser = CommandParser(
        prog=f"{PROG} export",
        description="Write a trained model, with its adapter merged, for other engines: for vLLM with the table of all soft "
        "prompts, or as a transformers folder in which the soft prompt of each user is tokens of the vocabulary.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder that training wrote, or a repository on the hub")
    parser.add_argument("--format", choices=("vllm", "tokens"), required=True, help="see above")
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="a new folder for the export")
    tokens = parser.add_argument_group("tokens")
    users = tokens.add_mutually_exclusive_group()
    users.add_argument("--users", metavar="A,B,...", help="ids of the users; default: all")
    users.add_argument("--users_file", metavar="FILE", help="a file with one user id a line")
    tokens.add_argument(
        "--untie",
        action="store_true",
        help="give the output embeddings a matrix of their own, in which users' tokens are unlikely",
    )
    parser.add_argument_group("vllm").add_argument(
        "--keep_adapter", action="store_true", help="leave a LoRA adapter beside its base instead of merging it"
    )
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="type of the weights; default: auto, as saved"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def make_info_parser() -> ArgumentParser:
    """The options of `trl-personal info`."""
    parser = CommandParser(
        prog=f"{PROG} info",
        description="Say what a trained model is. The language model's weights are not loaded.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder that training wrote, or a repository on the hub")
    parser.add_argument("--list_users", action="store_true", help="also the ids of the users")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) == 0:
        raise ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19) or int(text) >= 2**32:
        raise ArgumentTypeError(f"must be an integer from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def _from_zero(text: str) -> float:
    return _number(text, "at least 0", lambda number: number >= 0)


def _above_zero(text: str) -> float:
    return _number(text, "above 0", lambda number: number > 0)


def _share(text: str) -> float:
    return _number(text, "above 0 and at most 1", lambda number: 0 < number <= 1)


def _strength(text: str) -> float:
    return _number(text, "from -1 to 2", lambda number: -1 <= number <= 2)


def _number(text: str, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not is_allowed(number):
        raise ArgumentTypeError(f"must be a number {allowed}, got {text!r}")
    return number

"""The options of `trl-personal serve` and `trl-personal key`. Only the standard library, as in `cli.arguments`."""

from argparse import ArgumentParser
from pathlib import Path

from ..serving.keys import make_key_parser as _make_key_parser
from .arguments import PROG, CommandParser, _above_zero, _add_loading_options, _positive


def make_serve_parser() -> ArgumentParser:
    """The options of `trl-personal serve`."""
    parser = CommandParser(
        prog=f"{PROG} serve",
        description="Answer over HTTP, as OpenAI's API does: the `user` of a request is the user whose soft prompt is used.",
        epilog="SIGTERM and Ctrl-C let the server finish the answers that it is at. Needs `pip install trl-personal[serve]`.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder that training wrote, or a repository on the hub")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="file of API keys (`trl-personal key`); needed to listen elsewhere"
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the name of the folder")
    parser.add_argument(
        "--ref_model",
        metavar="NAME",
        help="the model that training started from, for users who join or are updated; an adapter does not need it",
    )
    parser.add_argument(
        "--no_users", action="store_true", help="serve the language model alone, without its users, as a baseline"
    )
    _add_limits(parser)
    _add_loading_options(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_limits(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    for name, default, text in (
        ("max_rows", 64, "answers written at once"),
        ("max_batch_tokens", 65536, "tokens of the answers written at once, with prompts and what may come"),
        ("max_prompt_tokens", 32768, "tokens of a prompt"),
        ("max_tokens", 4096, "tokens of an answer"),
        ("default_tokens", 256, "tokens of an answer where the request does not say"),
        ("max_answers", 512, "answers in progress and waiting together"),
        ("max_answers_per_key", 256, "the same for one API key"),
        ("max_body_bytes", 1_000_000, "bytes of a request"),
    ):
        group.add_argument(
            f"--{name}", type=_positive, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    group.add_argument(
        "--max_seconds",
        type=_above_zero,
        default=300.0,
        metavar="S",
        help="seconds a request may take, and a stop waits for; default: 300",
    )


def make_key_parser() -> ArgumentParser:
    """The options of `trl-personal key`."""
    return _make_key_parser(f"{PROG} key")


def _port(text: str) -> int:
    return 0 if text == "0" else _positive(text)

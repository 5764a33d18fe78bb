"""`python -m trl_personal.serving EXPORT --engine vllm`: the same server in front of vLLM, in vLLM's environment."""

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .gate import Limits
from .keys import KeyFile
from .run import open_socket, run_server
from .vllm_engine import VllmEngine


PROG = "python -m trl_personal.serving"
PRIVATE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}  # vLLM tells its makers how it is used otherwise


def make_parser() -> ArgumentParser:
    """The options of the module."""
    parser = ArgumentParser(
        prog=PROG,
        description="Serve an export of `trl-personal export --format vllm`: OpenAI's API, the `user` of a request is the "
        "user whose soft prompt is used.",
        epilog="SIGTERM and Ctrl-C let the server finish the answers that it is at.",
        allow_abbrev=False,
    )
    parser.add_argument("export", type=Path, help="folder that `trl-personal export` wrote")
    parser.add_argument("--engine", choices=("vllm",), required=True, help="what computes the answers")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="file of API keys (`python -m trl_personal.serving.keys`); needed to listen elsewhere",
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the name of the folder")
    parser.add_argument(
        "--engine_args",
        type=json.loads,
        default={},
        metavar="JSON",
        help='arguments of vLLM\'s AsyncEngineArgs, such as \'{"max_model_len": 4096, "gpu_memory_utilization": 0.9}\'',
    )
    group = parser.add_argument_group("limits")
    for limit in fields(Limits):
        group.add_argument(
            f"--{limit.name}", type=type(limit.default), default=limit.default, help=f"default: {limit.default}"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the server with `argv` (default: the process's arguments).

    Returns:
        The exit code: 0 after a stop, 1 after an error, which is one line on stderr. A usage error leaves through
        `SystemExit(2)`, as argparse does.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not isinstance(arguments.engine_args, dict):
        parser.error("argument --engine_args: must be a JSON object of names and values")
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    limits = Limits(**{limit.name: vars(arguments)[limit.name] for limit in fields(Limits)})
    try:
        keys = None if arguments.keys is None else KeyFile(arguments.keys)
        engine = VllmEngine(arguments.export, arguments.name, **arguments.engine_args)
        with open_socket(arguments.host, arguments.port, keys) as listener:
            run_server(engine, listener, keys, limits)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{PROG}: error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

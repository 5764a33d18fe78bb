"""`trl-personal`: finds the command, runs it, and turns an error into one line and an exit code."""

import sys
import traceback
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from ..terminal import printable
from .arguments import (
    PROG,
    make_audit_parser,
    make_eval_parser,
    make_export_parser,
    make_generate_parser,
    make_info_parser,
    make_main_parser,
)
from .serve_arguments import make_key_parser, make_serve_parser
from .users_arguments import flags_of_users, parse_users
from .words import in_flags
from .wrong_flags import find_wrong_flag, flags_of_dpo


INTERRUPTED = 130  # what shells report for Ctrl-C
PARSERS = {
    "audit": make_audit_parser,
    "eval": make_eval_parser,
    "export": make_export_parser,
    "generate": make_generate_parser,
    "info": make_info_parser,
    "key": make_key_parser,
    "serve": make_serve_parser,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `trl-personal` with `argv` (default: the process's arguments).

    Returns:
        The exit code: 0 if all went well, 1 after a run-time error, which is one line on stderr. A usage error leaves
        through `SystemExit(2)`, as argparse does.
    """
    options = make_main_parser().parse_args(argv)
    arguments = _parse_command(options)
    try:
        return _run(options, arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"trl-personal {_name_of(options, arguments)}: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if options.debug or arguments.debug:
            traceback.print_exc()
        text = in_flags(one_line(error), _flags_of(options.command))
        sys.stderr.write(f"trl-personal {_name_of(options, arguments)}: error: {text}\n")
        return 1


def _parse_command(options: Namespace) -> Namespace:
    """The arguments of the command. Those of `dpo` need TRL and are parsed later, but a wrong flag is told now."""
    if options.command in PARSERS:
        return PARSERS[options.command]().parse_args(options.arguments)
    if options.command == "users":
        return parse_users(options.arguments)
    if (wrong := find_wrong_flag(options.arguments)) is not None:
        sys.stderr.write(f"{PROG} dpo: error: {wrong}\nSee `{PROG} dpo --help`.\n")
        raise SystemExit(2)
    return Namespace(debug=False)


def _flags_of(command: str) -> dict[str, str]:
    """The flags of a command whose names can be nothing but an argument: those of one word are names of columns too."""
    flags: Iterable[str] = flags_of_users() if command == "users" else flags_of_dpo()
    if command in PARSERS:
        flags = PARSERS[command]()._option_string_actions
    found = {flag[2:]: flag[2:] for flag in flags if flag.startswith("--") and "_" in flag}
    return found | (
        {"new_id": "as", "overwrite": "overwrite", "checkpoints": "checkpoints"} if command == "users" else {}
    )


def _name_of(options: Namespace, arguments: Namespace) -> str:
    return " ".join(filter(None, [options.command, getattr(arguments, "users_command", None)]))


def _run(options: Namespace, arguments: Namespace) -> int:
    # imported here, as torch and TRL take seconds to load and `--help` needs neither
    for name in options.import_module:
        import_own_code(name)
    if options.command == "dpo":
        from .dpo import run_dpo

        return run_dpo(options)
    module = "..serving.keys" if options.command == "key" else f".{options.command}"
    getattr(import_module(module, __package__), f"run_{options.command}")(arguments)
    return 0


def import_own_code(name: str) -> None:
    """Import a module (`package.module`) or a file (`folder/module.py`), which registers user models."""
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}, named by --import_module.")
        sys.path.insert(0, str(path.parent.resolve()))
        name = path.stem
    import_module(name)


def one_line(error: BaseException) -> str:
    """
    What `error` says, on one line.

    ```python
    >>> one_line(ValueError("no `user_id`\\n   column")), one_line(KeyError("test"))
    ('no `user_id` column', "KeyError: 'test'")
    ```
    """
    text = " ".join([str(error), *getattr(error, "__notes__", ())])
    if not isinstance(error, (ValueError, TypeError, OSError)):  # those say what is wrong without their name
        text = f"{type(error).__name__}: {text}"
    return printable(" ".join(text.split()))

"""`trl-personal`: finds the command, runs it, and turns an error into one line and an exit code."""

import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..terminal import printable
from .arguments import make_audit_parser, make_eval_parser, make_generate_parser, make_info_parser, make_main_parser


INTERRUPTED = 130  # what shells report for Ctrl-C


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
        sys.stderr.write(f"trl-personal {options.command}: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if options.debug or arguments.debug:
            traceback.print_exc()
        sys.stderr.write(f"trl-personal {options.command}: error: {one_line(error)}\n")
        return 1


def _parse_command(options: Namespace) -> Namespace:
    """The arguments of the command; those of `dpo` need TRL and are parsed later."""
    if options.command == "audit":
        return make_audit_parser().parse_args(options.arguments)
    if options.command == "eval":
        return make_eval_parser().parse_args(options.arguments)
    if options.command == "generate":
        return make_generate_parser().parse_args(options.arguments)
    if options.command == "info":
        return make_info_parser().parse_args(options.arguments)
    return Namespace(debug=False)


def _run(options: Namespace, arguments: Namespace) -> int:
    # imported here, as torch and TRL take seconds to load and `--help` needs neither
    for name in options.import_module:
        import_own_code(name)
    if options.command == "dpo":
        from .dpo import run_dpo

        return run_dpo(options)
    if options.command == "audit":
        from .audit import run_audit

        run_audit(arguments)
    elif options.command == "eval":
        from .eval import run_eval

        run_eval(arguments)
    elif options.command == "generate":
        from .generate import run_generate

        run_generate(arguments)
    else:
        from .info import run_info

        run_info(arguments)
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

"""The options of `trl-personal users` and its commands. Only the standard library, so that `--help` is fast."""

from argparse import REMAINDER, SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from .arguments import PROG, CommandParser
from .users_fit_arguments import make_users_add_parser, make_users_update_parser


USERS_EPILOG = """\
commands:
  list      the users, how they came in, and how far their soft prompts are from the generic one
  add       let new users join: their rows are fitted to their pairs
  update    refine known users by more of their pairs
  rename    give a user another id
  copy      a second user with the same row
  export    write users' rows to a file
  import    take the users of such a file in
  remove    take users out, with every trace of them in the folder, and write a certificate
  verify    say whether a certificate is whole, and whether the folder still is what it says

`trl-personal users COMMAND --help` explains a command.
"""


def make_users_parser() -> ArgumentParser:
    """The command behind `trl-personal users`; what follows it is left to that command."""
    parser = ArgumentParser(
        prog=f"{PROG} users",
        usage=f"{PROG} users COMMAND [arguments of the command]",
        description="Users of a trained model: who they are, and how they come and go. The language model is not loaded to "
        "list, rename, copy, export, import or remove them.",
        epilog=USERS_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("users_command", metavar="COMMAND", choices=tuple(USERS_PARSERS), help="see below")
    parser.add_argument("arguments", nargs=REMAINDER, help=SUPPRESS).required = False
    return parser


def parse_users(argv: Sequence[str]) -> Namespace:
    """The arguments of a command of `trl-personal users`, and which it is as `users_command`."""
    group = make_users_parser().parse_args(argv)
    parser = USERS_PARSERS[group.users_command]()
    return parser.parse_args(group.arguments, Namespace(users_command=group.users_command))


def flags_of_users() -> set[str]:
    """The flags of all commands of `trl-personal users`."""
    return {flag for make in USERS_PARSERS.values() for flag in make()._option_string_actions}


def start_users_parser(command: str, description: str) -> CommandParser:
    """A parser of a command of `trl-personal users`, with what all of them have: the model's folder, `--debug`."""
    parser = CommandParser(prog=f"{PROG} users {command}", description=description, allow_abbrev=False)
    parser.add_argument("model", help="folder that training wrote")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _make_list_parser() -> CommandParser:
    parser = start_users_parser("list", "List the users, one a line.")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    return parser


def _make_rename_parser() -> CommandParser:
    parser = start_users_parser(
        "rename", "Give a user another id. Checkpoints and evaluations keep the old one: this is no removal."
    )
    parser.add_argument("user_id", metavar="ID", help="id of the user")
    parser.add_argument("new_id", metavar="NEW_ID", help="an id that no user has")
    return parser


def _make_copy_parser() -> CommandParser:
    parser = start_users_parser("copy", "Add a user with a copy of another user's row.")
    parser.add_argument("user_id", metavar="ID", help="id of the user to copy")
    parser.add_argument("new_id", metavar="NEW_ID", help="an id that no user has")
    return parser


def _make_export_parser() -> CommandParser:
    parser = start_users_parser(
        "export", "Write users' rows to a file that a model with the same shared parts can import."
    )
    parser.add_argument("user_ids", metavar="ID", nargs="+", help="ids of the users")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.safetensors", help="file to write")
    return parser


def _make_import_parser() -> CommandParser:
    parser = start_users_parser(
        "import", "Add the users of an exported file. The shared parts must be those that they were fitted beside."
    )
    parser.add_argument("file", metavar="FILE.safetensors", help="file that `users export` wrote")
    parser.add_argument("--as", dest="new_id", metavar="ID", help="another id, if the file holds one user")
    parser.add_argument("--overwrite", action="store_true", help="replace the rows of users who are known already")
    return parser


def _make_remove_parser() -> CommandParser:
    parser = start_users_parser(
        "remove", "Take users out of a model's folder, and of MODEL-evaluation beside it: rows, ids and every trace."
    )
    parser.add_argument("user_ids", metavar="ID", nargs="+", help="ids of the users")
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="also out of the checkpoints in the folder, optimizer state included",
    )
    parser.add_argument(
        "--also", metavar="PATH", action="append", default=[], help="another folder or file to search; several times"
    )
    parser.add_argument(
        "--certificate", metavar="FILE.json", help="file for the certificate; default: beside MODEL, with the time"
    )
    return parser


def _make_verify_parser() -> CommandParser:
    parser = start_users_parser(
        "verify", "Check that a certificate was not edited, and that the folder is as it was after the removal."
    )
    parser.add_argument("certificate", metavar="CERTIFICATE", help="file that `users remove` wrote")
    parser.add_argument(
        "--also",
        metavar="PATH",
        action="append",
        default=[],
        help="what `users remove` was given as --also, in that order",
    )
    parser.add_argument("--digest", metavar="HEX", help="the certificate's digest, as `users remove` printed it")
    parser.add_argument("--user_id", metavar="ID", help="also: whether the certificate is about this user")
    parser.add_argument("--salt", metavar="HEX", help="the salt that `users remove` printed, for --user_id")
    return parser


# a command of its own: a parser here, and a function of the same name in `cli.users`
USERS_PARSERS: dict[str, Callable[[], CommandParser]] = {
    "list": _make_list_parser,
    "add": make_users_add_parser,
    "update": make_users_update_parser,
    "rename": _make_rename_parser,
    "copy": _make_copy_parser,
    "export": _make_export_parser,
    "import": _make_import_parser,
    "remove": _make_remove_parser,
    "verify": _make_verify_parser,
}

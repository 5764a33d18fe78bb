"""The options of `trl-personal users add` and `update`. Only the standard library, so that `--help` is fast."""

from .arguments import (
    PROG,
    CommandParser,
    _above_zero,
    _add_column_options,
    _add_loading_options,
    _positive,
)


def make_users_add_parser() -> CommandParser:
    """The options of `trl-personal users add`."""
    parser = _start(
        "add",
        "Let new users join a trained model: the row of each is fitted to the user's pairs, and all else stays as it is, to "
        "the last bit. Says what to expect of each.",
        "pairs of the new users",
    )
    parser.add_argument(
        "--user_ids",
        nargs="+",
        default=[],
        metavar="ID",
        help="users who join too, with pairs or without (the generic prompt)",
    )
    return parser


def make_users_update_parser() -> CommandParser:
    """The options of `trl-personal users update`."""
    return _start(
        "update",
        "Refine the rows of known users by more of their pairs, around the rows that they have; all else stays as it is, to "
        "the last bit.",
        "pairs of known users",
    )


def _start(command: str, description: str, data: str) -> CommandParser:
    parser = CommandParser(prog=f"{PROG} users {command}", description=description, allow_abbrev=False)
    parser.add_argument("model", help="folder that training wrote; its user_model/ is changed in place")
    group = parser.add_argument_group("data", "A file, a folder of files or of `save_to_disk`, or a name on the hub.")
    group.add_argument(
        "--dataset_name", required=command == "update", metavar="DATASET", help=f"{data}, with a column for the user"
    )
    group.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    group.add_argument("--dataset_split", metavar="NAME", help="split to read; default: train, or the only one")
    _add_column_options(parser, "that of the training")
    parser.add_argument(
        "--ref_model", metavar="MODEL", help="model that the training started from; needed if MODEL is not an adapter"
    )
    _add_loading_options(parser)
    parser.add_argument(
        "--batch_size", type=_positive, default=16, metavar="N", help="pairs computed at a time; default: 16"
    )
    parser.add_argument("--beta", type=_above_zero, metavar="B", help="beta of DPO; default: that of the training")
    parser.add_argument(
        "--max_length", type=_positive, metavar="N", help="tokens of a row at most; default: as in the training"
    )
    parser.add_argument("--output", metavar="FILE.json", help="file for what to expect of each user, with the ids")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser

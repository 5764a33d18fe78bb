"""`trl-personal users`: who the users of a trained model are, and how they come and go. No language model is loaded."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..models.carry import SharedParts, export_rows, import_rows
from ..models.folder_checks import check_fingerprints
from ..models.folder_users import load_known_users, write_known_users
from ..models.known_users import KnownUsers
from ..terminal import json_line, print_whole, printable


def run_users(arguments: Namespace) -> None:
    """Run the command that `arguments.users_command` names."""
    if not Path(arguments.model).is_dir():
        raise FileNotFoundError(
            f"There is no folder {arguments.model}. Name the folder of a trained model; one on the hub is downloaded first "
            "(`hf download`)."
        )
    USERS_COMMANDS[arguments.users_command](arguments)


def run_list(arguments: Namespace) -> None:
    """Write a row for each user to the standard output."""
    users, _ = load_known_users(Path(arguments.model))
    rows = [
        {
            "user_id": user_id,
            "origin": users.origin(user_id),
            "num_pairs": users.joined.get(user_id, {}).get("num_pairs"),
            "offset_norm": round(norm, 6),
        }
        for user_id, norm in zip(users.user_vocab, users.offset_norms(), strict=True)
    ]
    if arguments.format == "json":
        sys.stdout.write(json_line(rows, indent=2) + "\n")
        return
    table = Table("user", "origin", "pairs", "norm of the offset", box=None)
    for row in rows:
        pairs = "" if row["num_pairs"] is None else str(row["num_pairs"])
        table.add_row(Text(printable(str(row["user_id"]))), str(row["origin"]), pairs, f"{row['offset_norm']:.3f}")
    print_whole(table)


def run_rename(arguments: Namespace) -> None:
    """Give a user another id."""
    _change(arguments, lambda users: users.renamed({arguments.user_id: arguments.new_id}))


def run_copy(arguments: Namespace) -> None:
    """Add a user with the row of another."""
    _change(arguments, lambda users: users.copied(arguments.user_id, arguments.new_id))


def _change(arguments: Namespace, change: Callable[[KnownUsers], KnownUsers]) -> None:
    users, config = load_known_users(Path(arguments.model))
    changed = change(users)
    write_known_users(Path(arguments.model), changed, config)
    sys.stdout.write(f"{arguments.model} has {len(changed.user_vocab)} users.\n")


def run_export(arguments: Namespace) -> None:
    """Write users' rows to a file."""
    folder = Path(arguments.model)
    users, config = load_known_users(folder)
    check_fingerprints(folder, config)
    export_rows(users, arguments.user_ids, SharedParts.of(users.user_model, config), arguments.output)
    sys.stdout.write(f"{len(arguments.user_ids)} users are in {arguments.output}.\n")


def run_import(arguments: Namespace) -> None:
    """Add the users of an exported file."""
    folder = Path(arguments.model)
    users, config = load_known_users(folder)
    check_fingerprints(folder, config)
    shared = SharedParts.of(users.user_model, config)
    changed, imported = import_rows(users, shared, arguments.file, arguments.new_id, arguments.overwrite)
    write_known_users(folder, changed, config)
    sys.stdout.write(f"{len(imported)} users were imported; {arguments.model} has {len(changed.user_vocab)}.\n")


# a command of its own: a function here, and a parser of the same name in `cli.users_arguments`
USERS_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "list": run_list,
    "rename": run_rename,
    "copy": run_copy,
    "export": run_export,
    "import": run_import,
}

"""`trl-personal users`: who the users of a trained model are, and how they come and go. No language model is loaded."""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..models.carry import SharedParts, export_rows, import_rows
from ..models.folder_checks import check_fingerprints
from ..models.folder_users import load_known_users, write_known_users
from ..models.known_users import KnownUsers
from ..removal import remove_from_folder, verify_certificate
from ..removal.journal import Journal
from ..terminal import json_line, print_whole, printable
from ..training.run_folder import only_run_in


def run_users(arguments: Namespace) -> None:
    """Run the command that `arguments.users_command` names."""
    if not Path(arguments.model).is_dir():
        raise FileNotFoundError(
            f"There is no folder {arguments.model}. Name the folder of a trained model; one on the hub is downloaded first "
            "(`hf download`)."
        )
    if arguments.users_command != "remove" and Journal(Path(arguments.model)).is_committed:
        raise ValueError(
            f"A removal of users from {arguments.model} was interrupted. Run it again: `trl-personal users remove` goes on."
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
    folder = Path(arguments.model)
    with only_run_in(folder):  # a training would write its own users over these
        users, config = load_known_users(folder)
        changed = change(users)
        write_known_users(folder, changed, config)
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
    with only_run_in(folder):
        users, config = load_known_users(folder)
        check_fingerprints(folder, config)
        shared = SharedParts.of(users.user_model, config)
        changed, imported = import_rows(users, shared, arguments.file, arguments.new_id, arguments.overwrite)
        write_known_users(folder, changed, config)
    sys.stdout.write(f"{len(imported)} users were imported; {arguments.model} has {len(changed.user_vocab)}.\n")


def run_remove(arguments: Namespace) -> None:
    """Take users out of the folder, and say where the certificate is."""
    removal = remove_from_folder(
        arguments.model,
        arguments.user_ids,
        checkpoints=arguments.checkpoints,
        also=arguments.also,
        certificate=arguments.certificate,
    )
    origins = Counter(user["origin"] for user in removal.certificate["users"])
    actions = Counter(file["action"] for file in removal.certificate["files"])
    if removal.finished:
        sys.stdout.write("A removal of these users was interrupted before; it is done now.\n")
    sys.stdout.write(
        f"Removed users: {sum(origins.values())} ({', '.join(f'{n} {name}' for name, n in origins.items())}). Files: "
        f"{', '.join(f'{n} {name}' for name, n in actions.items())}.\n"
    )
    if origins["trained"]:
        sys.stdout.write(
            "What the shared weights learned in training from users who were part of it stays: see the certificate.\n"
        )
    for entry in removal.certificate["left"]:
        if entry.startswith("The text of an id"):
            sys.stderr.write(f"{printable(entry)}\n")
    sys.stdout.write(f"certificate: {removal.path}\ndigest: {removal.digest}\nsalt: {removal.salt}\n")
    sys.stdout.write(
        "The certificate does not hold the salt: keep it to show whom the certificate is about, or forget it.\n"
    )


def run_verify(arguments: Namespace) -> None:
    """Say that a certificate is whole and fits the folder, or what is wrong."""
    content = verify_certificate(
        arguments.certificate,
        arguments.model,
        also=arguments.also,
        digest=arguments.digest,
        user_id=arguments.user_id,
        salt=arguments.salt,
    )
    key = "" if arguments.digest else " Without --digest, one that was written anew would pass too."
    sys.stdout.write(
        f"The certificate is whole, and {len(content['files'])} files are as it says ({content['time']}).{key}\n"
    )


def run_add(arguments: Namespace) -> None:
    """Let users join. (The language model, and the trainer that fits, are loaded for this and `update` alone.)"""
    from .users_fit import run_users_add

    run_users_add(arguments)


def run_update(arguments: Namespace) -> None:
    """Refine known users."""
    from .users_fit import run_users_update

    run_users_update(arguments)


# a command of its own: a function here, and a parser of the same name in `cli.users_arguments`
USERS_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "list": run_list,
    "add": run_add,
    "update": run_update,
    "rename": run_rename,
    "copy": run_copy,
    "export": run_export,
    "import": run_import,
    "remove": run_remove,
    "verify": run_verify,
}

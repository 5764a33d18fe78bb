"""What is known of users who came after the shared training, in `joined_users.json`: without such users there is none."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically
from ..user_models.base import FILES_ENTRY, check_user_files
from ..users import JOINED_FILE, USERS_FILE


FACTS = {"num_pairs": int, "in_training": bool, "copied_from": str}


def check_facts(facts: object) -> dict[str, Any]:
    """
    What is known of a user who came later, in the order in which it is written.

    Raises:
        `ValueError`: for an entry that is none of [`FACTS`], or of another type.
    """
    if not isinstance(facts, Mapping) or any(type(value) is not FACTS.get(name) for name, value in facts.items()):
        raise ValueError(f"A user who came later may have {FACTS} known of them, got {facts!r:.200}.")
    return {name: facts[name] for name in FACTS if name in facts and facts[name] is not False}


def write_joined(folder: Path, joined: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `joined_users.json`, an object from user id to what is known of the user; without such users there is no file."""
    path = folder / JOINED_FILE
    if not joined:
        path.unlink(missing_ok=True)
        return
    content = {user_id: check_facts(facts) for user_id, facts in joined.items()}
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def read_joined(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Read `joined_users.json`, if the config of the users in `folder` lists it. One that it does not list is of an earlier save.

    Raises:
        `ValueError`: if it is not the file that was saved, names a user who is not in `users.json`, or says what cannot be.
    """
    if JOINED_FILE not in (config.get(FILES_ENTRY) or ()):
        return {}
    check_user_files(folder, config, (JOINED_FILE,))
    found = read_json(folder / JOINED_FILE)
    unknown = len(found.keys() - read_json(folder / USERS_FILE).keys())
    if unknown:
        raise ValueError(
            f"{folder / JOINED_FILE} names {unknown} users who are not in {USERS_FILE}. Put back what was saved."
        )
    try:
        return {user_id: check_facts(facts) for user_id, facts in found.items()}
    except ValueError as error:
        raise ValueError(f"{folder / JOINED_FILE} is damaged. {error}") from error

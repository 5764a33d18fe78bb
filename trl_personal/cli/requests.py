"""What `trl-personal generate` is asked for: prompts and users, from the command line or from files."""

import json
from pathlib import Path
from typing import Any

from ..files import read_json
from ..user_profile import Prompt


def read_prompts(prompts: list[str] | None, path: str | None) -> list[Prompt]:
    """
    Those given, or those in a file.

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: if there is no prompt, an empty one, or a line of a
        `.jsonl` file without one.
    """
    found: list[Prompt] = list(prompts or ())
    if path is not None:
        lines = [(number, line) for number, line in enumerate(_read_lines(path), start=1) if line.strip()]
        is_json = Path(path).suffix in (".jsonl", ".json")
        found = [_prompt_in(line, f"{path}, line {number}") if is_json else line for number, line in lines]
    if not found:
        raise ValueError(f"There is no prompt in {path}.")
    if not all(prompt.strip() if isinstance(prompt, str) else prompt for prompt in found):
        raise ValueError("A prompt is empty. Give at least one word.")
    return found


def _prompt_in(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}). A .jsonl file has one object a line.") from error
    prompt: Any = row.get("prompt") if isinstance(row, dict) else None
    is_messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
    )
    if not isinstance(prompt, str) and not is_messages:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{place} must be an object with `prompt`, a text or a list of messages; found {found}.")
    return prompt


def read_users(users: str | None, path: str | None) -> list[Any]:
    """Users, each once: ids, or from a .jsonl file blends too; the generic user (`None`) if there are none."""
    if path is not None and Path(path).suffix == ".jsonl":
        return _read_blends(path)
    texts = _read_lines(path) if path is not None else (users or "").split(",")
    user_ids = dict.fromkeys(text.strip() for text in texts if text.strip())
    if not user_ids and (users is not None or path is not None):
        raise ValueError(f"There is no user id in {path or '--users'}. Leave the option out for the generic user.")
    return list(user_ids) or [None]


def _read_blends(path: str) -> list[Any]:
    users: list[Any] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            user = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}). A .jsonl file has one user a line."
            ) from error
        if not isinstance(user, (str, int, dict, type(None))) or isinstance(user, bool):
            raise ValueError(
                f"{path}, line {number} must be a user id, null or an object of weights by user id; found {line:.80}."
            )
        user = str(user) if isinstance(user, int) else user  # 12 and "12" are one user
        if user not in users:
            users.append(user)
    if not users:
        raise ValueError(f"There is no user in {path}. Leave the option out for the generic user.")
    return users


def read_user_profiles(path: str | None) -> dict[str, str | None]:
    """
    Text about users, by their ids, from a JSON object in a file; none without a file.

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: if it is no JSON object of texts.
    """
    if path is None:
        return {}
    profiles = read_json(Path(path))
    if not all(isinstance(text, str | None) for text in profiles.values()):
        raise ValueError(f"{path} must be a JSON object with a text (or null) for each user id.")
    return profiles


def _read_lines(path: str) -> list[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return Path(path).read_text(encoding="utf-8-sig").splitlines()

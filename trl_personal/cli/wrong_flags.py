"""Flags that no command has, answered with the nearest right one. Only the standard library: no waiting for torch."""

import ast
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path


# where the arguments of `dpo` are declared: read as text, since importing them takes seconds
DECLARED_IN = {
    "transformers": ("training_args.py",),
    "trl": ("trainer/base_config.py", "trainer/dpo_config.py", "trainer/model_config.py", "scripts/utils.py"),
    "trl_personal": ("training/config.py", "cli/arguments.py"),
    "accelerate": ("commands/launch.py",),
}
SHORT_NAMES = {
    "--lr": "--learning_rate",
    "--model": "--model_name_or_path",
    "--dataset": "--dataset_name",
    "--data": "--dataset_name",
    "--epochs": "--num_train_epochs",
    "--batch_size": "--per_device_train_batch_size",
    "--output": "--output_dir",
    "--users": "--user_id_column",
}
OTHER_FLAGS = ("help", "config", "accelerate_config")
FLAG = re.compile(r"[\"'](--[a-z][\w-]*)[\"']")


def unknown_arguments(unknown: Sequence[str], known: Iterable[str]) -> str:
    """
    What to say of arguments that are not known.

    ```python
    >>> print(unknown_arguments(["--nmu_clusters", "4"], ["--num_clusters", "--user_rank"]))
    unrecognized arguments: --nmu_clusters 4. Did you mean --num_clusters?
    ```
    """
    flag = next((part for part in unknown if part.startswith("-")), "").split("=", 1)[0]
    if flag in SHORT_NAMES and SHORT_NAMES[flag] in known:
        return f"unrecognized arguments: {' '.join(unknown)}. Did you mean {SHORT_NAMES[flag]}?"
    close = get_close_matches(
        flag.replace("-", "_"), {name.replace("-", "_"): None for name in known}, n=1, cutoff=0.7
    )
    nearest = f". Did you mean {close[0].replace('__', '--', 1)}?" if close else ""
    return f"unrecognized arguments: {' '.join(unknown)}{nearest}"


def find_wrong_flag(argv: Sequence[str]) -> str | None:
    """What to say of the first flag among the arguments of `dpo` that cannot be one; `None` if there is none."""
    flags = [part.split("=", 1)[0] for part in argv if part.startswith("--") and len(part) > 2]
    if not flags:
        return None
    known = flags_of_dpo()
    plain = {flag.replace("-", "_") for flag in known}
    for flag in flags:
        name = flag.replace("-", "_")
        begins = [other for other in plain if other.startswith(name)]  # argparse takes the beginning of a flag too
        if name not in plain and len(begins) != 1:
            return unknown_arguments([flag], known)
    return None


@cache
def flags_of_dpo() -> frozenset[str]:
    """The flags of `dpo` and of `accelerate launch`, and perhaps some more: all fields in the files that declare them."""
    found = {f"--{name}" for name in OTHER_FLAGS}
    for package, files in DECLARED_IN.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in files:
                path = Path(folder) / file
                if path.is_file():
                    found |= _flags_in(path.read_text(encoding="utf-8"))
    return frozenset(found)


def _flags_in(source: str) -> set[str]:
    fields = {
        statement.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    return {f"--{prefix}{name}" for name in fields for prefix in ("", "no_")} | set(FLAG.findall(source))

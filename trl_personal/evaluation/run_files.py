"""What a script that trains and evaluates leaves: its pairs, its results, and commands that go on from there."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import DatasetDict

from ..terminal import printable
from ..user_profile import Prompt
from ..writing import text_of_last
from .results import ModelEvaluation


def write_pairs(dataset: DatasetDict, folder: str | Path) -> Path:
    """
    Write each split as JSON lines, for `trl-personal eval FOLDER --dataset_name FOLDER/pairs`.

    Args:
        dataset (`DatasetDict`): Preference rows with users.
        folder (`str` or `Path`): Where a training writes.

    Returns:
        The folder `pairs` in it, with a file `<split>.jsonl` for each split.
    """
    pairs = Path(folder) / "pairs"
    if PartialState().is_main_process:
        pairs.mkdir(parents=True, exist_ok=True)
        for name, split in dataset.items():
            split.to_json(pairs / f"{name}.jsonl", force_ascii=False)
    return pairs


def write_results(path: str | Path, evaluation: ModelEvaluation, **others: Any) -> None:
    """
    Write all numbers of an evaluation and how they were made as one JSON object, without the pairs.

    Args:
        path (`str` or `Path`): The file to write.
        evaluation ([`ModelEvaluation`]): What was found.
        **others: More numbers, such as `seed`; they replace those of the evaluation that have the same name.
    """
    results = evaluation.to_dict()
    run = results.pop("run")
    Path(path).write_text(json.dumps({**run, **results, **others}, ensure_ascii=False, indent=2), encoding="utf-8")


def next_commands(
    folder: str | Path,
    users: Sequence[str],
    prompt: Prompt,
    *,
    ref_model: str | None = None,
    opposite_column: str | None = None,
    max_new_tokens: int = 128,
) -> str:
    """
    Three commands that go on from a training: its evaluation with answers, answers to a prompt, and what the folder holds.

    Args:
        folder (`str` or `Path`): What the training wrote, with its [`write_pairs`], and vanilla DPO in `vanilla/` if it was
            trained.
        users (`Sequence[str]`): The users to write answers for.
        prompt (`str` or `list[dict]`): The prompt to answer; of a conversation what is said last.
        ref_model (`str`, *optional*): The model that the training started from; left out where there is an adapter.
        opposite_column (`str`, *optional*): The column of the pairs with what a row's user prefers.
        max_new_tokens (`int`, *optional*, defaults to `128`): The longest answer.

    Returns:
        A command a line.

    ```python
    >>> print(next_commands("out", ["ann", "bo"], "Why?"))
    trl-personal eval out --dataset_name out/pairs --generate 12 --max_new_tokens 128
    trl-personal generate --model out --users ann,bo --prompt 'Why?' --max_new_tokens 128
    trl-personal info out
    ```
    """
    root, folder = Path(folder), str(folder)
    most = ["--max_new_tokens", str(max_new_tokens)]
    options = {
        "--ref_model": None if (root / "adapter_config.json").is_file() else ref_model,
        "--vanilla": str(root / "vanilla") if (root / "vanilla").is_dir() else None,
        "--opposite_column": opposite_column,
    }
    given = [part for flag, value in options.items() if value is not None for part in _option(flag, value)]
    named = ",".join(user for user in users if "," not in user)  # a comma ends a name on the command line
    asked = [*(_option("--users", named) if named else []), *_option("--prompt", text_of_last(prompt))]
    commands = [
        ["trl-personal", "eval", folder, "--dataset_name", str(root / "pairs"), *given, "--generate", "12", *most],
        ["trl-personal", "generate", "--model", folder, *asked, *most],
        ["trl-personal", "info", folder],
    ]
    return "\n".join(" ".join(map(_quote, command)) for command in commands)


def _option(flag: str, value: str) -> list[str]:
    """A value that begins with a dash would be taken for a flag."""
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _quote(part: str) -> str:
    """
    `part` for a shell: in bash's quotes with escapes if it has line ends or what steers a terminal.

    ```python
    >>> print(_quote("two lines"), _quote("two" + chr(10) + "lines"))
    'two lines' $'two\\nlines'
    ```
    """
    if printable(part) == part:
        return shlex.quote(part)
    escaped = {"\\": "\\\\", "'": "\\'", "\n": "\\n"}
    text = (escaped.get(c, c if printable(c) == c else f"\\u{ord(c):04x}") for c in part)
    return f"$'{''.join(text)}'"

"""Messages in the words of the command line: what Python calls an argument is a flag here."""

import re
from collections.abc import Mapping


CALL = re.compile(r"`[A-Z]\w*\((\w+)=([^`]*)\)`")
SETTING = re.compile(r"`(\w+)=([^`]*)`")
NAME = re.compile(r"`(\w+)`")


def in_flags(text: str, flags: Mapping[str, str], alone: bool = True) -> str:
    """
    A message of the package in the words of the command line.

    Args:
        text (`str`): A message with arguments in backticks.
        flags (`Mapping[str, str]`): The flag for each argument, without its dashes.
        alone (`bool`): Whether an argument that stands without a value becomes a flag too.

    ```python
    >>> in_flags("Set `num_clusters=4`, not `num_clusters`; found `prompt`.", {"num_clusters": "num_clusters"})
    'Set `--num_clusters 4`, not `--num_clusters`; found `prompt`.'
    >>> in_flags("No `prompt`. Did you mean `prompt='question'`?", {"prompt": "prompt_column"}, alone=False)
    'No `prompt`. Did you mean `--prompt_column question`?'
    >>> in_flags("Name yours with `PersonalizedDPOConfig(user_id_column=...)`.", {"user_id_column": "user_id_column"})
    'Name yours with `--user_id_column ...`.'
    ```
    """

    def as_flag(found: re.Match[str]) -> str:
        if found[1] not in flags:
            return found[0]
        value = found[2].strip("'\"")
        return f"`--{flags[found[1]]} {value}`"

    text = SETTING.sub(as_flag, CALL.sub(as_flag, text))
    return NAME.sub(lambda found: f"`--{flags[found[1]]}`" if alone and found[1] in flags else found[0], text)

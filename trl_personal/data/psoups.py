"""Personalized Soups: six simulated users, two for each of three ways to answer, who conflict in pairs."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import DatasetDict, Features, Value

from .messages import assistant_message, prompt_features, user_message
from .pairs import GROUP, OnReport, make_splits
from .rows import Row, SkippedRow, text_of, user_id_of
from .source import RowSource, Source, check_columns, open_source, peek, read_json_list
from .splits import choose_split_rule
from .text_files import Placed


# The paper's names of the users, in the order of their numbers 1 to 6, and what each of them wants
USER_PROFILES = {
    "P1A": "Wants answers that a child in elementary school understands.",
    "P1B": "Wants answers for an expert: only somebody with a doctorate in the field has to understand them.",
    "P2A": "Wants short answers that come to the point.",
    "P2B": "Wants long answers with all the background.",
    "P3A": "Wants friendly, witty answers, as from a close friend.",
    "P3B": "Wants unfriendly answers.",
}
USERS = tuple(USER_PROFILES)
# The same in a word, two users for each dimension: expertise, informativeness, tone
STYLES = dict(zip(USERS, ("plain", "expert", "short", "detailed", "friendly", "unfriendly"), strict=True))
PREFERENCE_PROMPT = "Generate a response"  # opens the sentence that ends each `user_input` of `rm_training`

# Columns for user, instruction, preferred and other answer: the paper's file, and its copies on the Hub
SCHEMAS = (("user_id", "user_input", "completion_a", "completion_b"), ("uid", "prompt", "chosen", "rejected"))


def load_psoups(
    name_or_path: str | Path = "RiverDong/psoups",
    *,
    conversational: bool = False,
    test_size: float | None = None,
    unknown_users: float = 0.0,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    Personalized Soups' comparisons (arXiv 2310.11564) as the P-DPO paper uses them: six users, no text about the preference
    in the prompt.

    Three sources are read: the paper's `allcombo_8_cleaned.json` (`user_id` 1 to 6, `user_input`, `completion_a`, which is
    the preferred one, `completion_b`); the folder `rm_training` of the authors' archive with `P1A.json` to `P3B.json`, from
    which the preference prompt and repeated rows are removed here; and copies on the Hub (`uid`, `prompt`, `chosen`,
    `rejected`).

    Most instructions were put to all users, so a random split of the rows would leak. Prompts are held out for all users
    alike, see [`HeldOut`]. (The paper shuffles rows, 90/10; its test split is another one.)

    Args:
        name_or_path (`str` or `Path`): A set on the Hub, the file, or the folder.
        conversational (`bool`): Whether prompts and answers are messages, for the chat template, and not text.
        test_size (`float`, *optional*): Share of the prompts in `test`. `None` keeps the splits of a source that has several,
            and means 0.1 for one that has none.
        unknown_users (`float`): Share of the users to keep for `test_unknown_users`.
        seed (`int`): Random seed for holding out. Another seed holds out other prompts and users.
        config_name (`str`, *optional*): Name of the configuration of the set on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the set on the Hub.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`].

    Returns:
        `DatasetDict` with `train`, `test` (unless its share is 0) and, if asked for,
        `test_unknown_users`; columns `prompt`, `chosen`, `rejected` (text or messages), `user_id` ("P1A" to "P3B") and
        `user_profile` (a sentence on what the user wants).

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: for a schema that is not known, or if no pair is left.
    """
    path = Path(name_or_path).expanduser()
    repeated = 0
    is_rm_training = path.is_dir()
    if is_rm_training:
        sources, repeated = _open_rm_training(path)
    else:
        sources = open_source(name_or_path, config_name=config_name, revision=revision)
    columns = _find_schema(peek(next(iter(sources.values())), str(name_or_path)), str(name_or_path))
    return make_splits(
        sources,
        partial(_pairs, columns=columns, conversational=conversational, has_preference_prompt=is_rm_training),
        Features(prompt_features(conversational) | {"user_id": Value("string"), "user_profile": Value("string")}),
        choose_split_rule(sources, test_size, unknown_users, seed),
        name=str(name_or_path),
        rows_read=repeated,
        filtered=Counter({"a repeated row": repeated} if repeated else {}),
        on_report=on_report,
    )


def opposite_style(user_id: str) -> str:
    """
    The user who wants the opposite in the same dimension.

    ```python
    >>> opposite_style("P2A"), opposite_style("P2B")
    ('P2B', 'P2A')
    ```
    """
    return user_id[:-1] + {"A": "B", "B": "A"}[user_id[-1]]


def _find_schema(rows: list[Row], name: str) -> tuple[str, str, str, str]:
    if set(SCHEMAS[1]) <= {column for row in rows for column in row}:
        return SCHEMAS[1]
    hint = f"The columns of a copy on the Hub, {list(SCHEMAS[1])}, would do too. For others use `load_generic`."
    check_columns(rows, set(SCHEMAS[0]), name, hint)
    return SCHEMAS[0]


def _open_rm_training(folder: Path) -> tuple[dict[str, Source], int]:
    """The six files as one source with a `user_id` column and without repeated rows, and how many those were."""
    missing = [f"{user}.json" for user in USERS if not (folder / f"{user}.json").is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(f"{folder} lacks {missing}; found {found}. Name the folder `rm_training` or a file.")
    placed: list[Placed] = []
    repeated = 0
    for user in USERS:
        path = folder / f"{user}.json"
        seen: set[str] = set()
        for number, row in enumerate(read_json_list(path), start=1):
            text = json.dumps(row)
            if text not in seen:
                placed.append((f"{path}, row {number}", _with_user(row, user)))
            repeated += text in seen
            seen.add(text)
    return {"train": RowSource(placed)}, repeated


def _with_user(row: object, user: str) -> Row | SkippedRow:
    return {**row, "user_id": user} if isinstance(row, dict) else SkippedRow("not a JSON object")


def _pairs(
    row: Row, columns: tuple[str, str, str, str], conversational: bool, has_preference_prompt: bool
) -> Iterator[Row]:
    user_column, prompt_column, chosen_column, rejected_column = columns
    user_id = _user_name(user_id_of(row, user_column), user_column)
    prompt = text_of(row, prompt_column).strip()
    if has_preference_prompt:
        prompt = prompt.rpartition(PREFERENCE_PROMPT)[0].strip()
        if not prompt:
            raise SkippedRow(f"`{prompt_column}` without an instruction or without the preference prompt")
    chosen, rejected = text_of(row, chosen_column), text_of(row, rejected_column)
    if chosen == rejected:
        raise SkippedRow("both answers are the same text", broken=False)
    yield {
        "prompt": [user_message(prompt)] if conversational else prompt,
        "chosen": [assistant_message(chosen)] if conversational else chosen,
        "rejected": [assistant_message(rejected)] if conversational else rejected,
        "user_id": user_id,
        "user_profile": USER_PROFILES[user_id],
        GROUP: prompt,
    }


def _user_name(user_id: str, column: str) -> str:
    if user_id in USER_PROFILES:
        return user_id
    if user_id not in [str(number) for number in range(1, len(USERS) + 1)]:
        raise SkippedRow(f"`{column}` is none of the six users")
    return USERS[int(user_id) - 1]

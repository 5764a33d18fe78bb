"""PRISM: dialogues of 1,396 people with many models, the answers they chose, and a survey on who they are."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict, Features, Value

from .messages import Message, assistant_message, prompt_features, user_message
from .pairs import GROUP, OnReport, make_splits
from .rows import Row, SkippedRow, text_of, user_id_of
from .source import RowSource, Source, check_columns, open_source, peek
from .splits import choose_split_rule


PAPER_UNKNOWN_USERS = 162 / 1396  # users that the paper keeps for testing
COLUMNS = {
    "survey": {"user_id", "stated_prefs", "order_stated_prefs"},
    "conversations": {"conversation_id", "user_id", "conversation_history"},
    "utterances": {"conversation_id", "user_id", "turn", "user_prompt", "model_response", "if_chosen"},
}

# The survey fields of the paper's profile, and how they are called in it
PROFILE_FIELDS = {
    "self_description": "Self-description",
    "age": "Age",
    "gender": "Gender",
    "employment_status": "Employment",
    "education": "Education",
    "marital_status": "Marital status",
    "english_proficiency": "English proficiency",
}
ATTRIBUTES = ("values", "creativity", "fluency", "factuality", "diversity", "safety", "personalisation", "helpfulness")
NUM_STATED = 3  # attributes that a profile names, as in the paper
UNANSWERED = "Prefer not to say"


def load_prism(
    name_or_path: str | Path = "HannahRoseKirk/prism-alignment",
    *,
    table: Literal["conversations", "utterances"] = "conversations",
    stated_preferences: Literal["scores", "display_order"] = "scores",
    conversational: bool = True,
    test_size: float = 0.1,
    unknown_users: float = PAPER_UNKNOWN_USERS,
    seed: int = 0,
    revision: str | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    PRISM's choices (arXiv 2404.16019) with the profile of each user: in every turn, each rejected answer against the chosen
    one.

    The prompt is the dialogue so far: earlier turns with the answer the user chose, and the user's new message. A turn can
    have several chosen answers, if they are equal: the first is used. A turn without an answer that differs has no pair; a
    turn without a chosen answer ends its conversation here, as what follows has no history.

    Whole conversations are held out, by their opening prompt, so that no prompt of `train` is in another split, nor an
    earlier or later turn of its conversation. The users of `test_unknown_users` are in no other split. (The paper holds
    out 162 of 1,396 users too, but other ones.)

    The profile has the seven survey fields of the paper, without those that were not answered, and three stated preferences:
    with `stated_preferences="scores"` the attributes the user scored highest (`stated_prefs`; ties in the codebook's order).
    The paper's code takes the first three of `order_stated_prefs`, which the codebook calls the random order of the sliders
    on the user's screen: `"display_order"` reproduces that.

    Args:
        name_or_path (`str` or `Path`): The set on the Hub, or a folder with `survey.jsonl` and the table's `.jsonl` file.
        table (`str`): Which table to read, `"conversations"` or `"utterances"`. Both hold the same answers.
        stated_preferences (`str`): Which stated preferences a profile has, `"scores"` or `"display_order"`, see above.
        conversational (`bool`): Whether prompts and answers are messages, for the chat template, and not text with `User:` and
            `Assistant:` in front of each message.
        test_size (`float`, defaults to 0.1): Share of the opening prompts in `test`.
        unknown_users (`float`, defaults to 162 of 1,396): Share of the users in `test_unknown_users`.
        seed (`int`): Random seed for holding out. Another seed holds out other prompts and users.
        revision (`str`, *optional*): Branch, tag or commit of the set on the Hub.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`], whose rows are conversations.

    Returns:
        `DatasetDict` with `train`, `test` and `test_unknown_users` (not those whose share is 0);
        columns `prompt`, `chosen`, `rejected` (messages or text), `user_id`, `user_profile` (text, or `None` if nothing was
        answered), `conversation_id` and `turn`.

    Raises:
        `FileNotFoundError`: if a file is missing. `ValueError`: for an option or a schema that is not known, or if no pair is
        left.
    """
    if table not in ("conversations", "utterances"):
        raise ValueError(f'`table` must be "conversations" or "utterances", found {table!r}.')
    if stated_preferences not in ("scores", "display_order"):
        raise ValueError(f'`stated_preferences` must be "scores" or "display_order", found {stated_preferences!r}.')
    filtered: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    survey = _open_table(name_or_path, "survey", revision)
    profiles = _read_survey(survey, stated_preferences, filtered, broken)
    source = _open_table(name_or_path, table, revision)
    if table == "utterances":
        source = _join_utterances(source, broken)
    columns = {"user_id": Value("string"), "user_profile": Value("string")}
    columns |= {"conversation_id": Value("string"), "turn": Value("int64")}
    return make_splits(
        {"train": source},
        partial(_pairs, profiles=profiles, conversational=conversational),
        Features(prompt_features(conversational) | columns),
        choose_split_rule(["train"], test_size, unknown_users, seed),
        name=str(name_or_path),
        filtered=filtered,
        broken=broken,
        on_report=on_report,
    )


def _open_table(name_or_path: str | Path, table: str, revision: str | None) -> Source:
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        path = folder / f"{table}.jsonl"
        if not path.is_file():
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "a file"
            raise FileNotFoundError(f"{folder} must be a folder with {table}.jsonl; found {found}.")
        source = open_source(path)["train"]
    else:
        source = open_source(name_or_path, config_name=table, revision=revision)["train"]
    hint = f"This is not the table `{table}` of PRISM."
    check_columns(peek(source, str(name_or_path)), COLUMNS[table], f"{name_or_path}, {table},", hint)
    return source


def _read_survey(
    survey: Source, stated_preferences: str, filtered: Counter[str], broken: Counter[str]
) -> dict[str, str | None]:
    """The profile of each user."""
    profiles = {}
    for _, row in survey:
        try:
            if isinstance(row, SkippedRow):
                raise row
            profiles[user_id_of(row, "user_id")] = user_profile(row, stated_preferences)
            if row.get("num_completed_conversations") == 0:
                filtered["survey: a user without conversations"] += 1
        except SkippedRow as skipped:
            broken[f"survey: {skipped.reason}"] += 1
    return profiles


def user_profile(row: Row, stated_preferences: str = "scores") -> str | None:
    """
    The profile of one user, from a row of the survey; `None` if nothing was answered.

    ```python
    >>> scores = {"safety": 10, "fluency": 90, "values": 50, "helpfulness": 60, "other": 99}
    >>> print(user_profile({"age": "18-24 years old", "stated_prefs": scores}))
    Age: 18-24 years old
    Preferences: fluency, helpfulness, values
    ```
    """
    answers = {name: row.get(field) for field, name in PROFILE_FIELDS.items()}
    answers["Preferences"] = ", ".join(_stated_preferences(row, stated_preferences))
    lines = [f"{name}: {answer}" for name, answer in answers.items() if answer and answer != UNANSWERED]
    return "\n".join(lines) or None


def _stated_preferences(row: Row, rule: str) -> list[str]:
    numbers = row.get("stated_prefs" if rule == "scores" else "order_stated_prefs")
    if not isinstance(numbers, dict):
        return []
    sign = -1 if rule == "scores" else 1
    ranks = {name: sign * numbers[name] for name in ATTRIBUTES if isinstance(numbers.get(name), int | float)}
    return sorted(ranks, key=ranks.__getitem__)[:NUM_STATED]  # a stable sort: equal scores keep the codebook's order


def _join_utterances(utterances: Source, broken: Counter[str]) -> Source:
    """Utterances, put together to the conversations they come from."""
    conversations: dict[str, Row] = {}
    turns: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for _, row in utterances:
        try:
            if isinstance(row, SkippedRow):
                raise row
            conversation_id = text_of(row, "conversation_id")
            if not isinstance(row.get("turn"), int):
                raise SkippedRow("`turn` is not an integer")
        except SkippedRow as skipped:
            broken[f"utterance: {skipped.reason}"] += 1
            continue
        conversations.setdefault(conversation_id, {"conversation_id": conversation_id, "user_id": row.get("user_id")})
        turns[conversation_id][row["turn"]].append(row)
    return RowSource(
        [
            (f"conversation {number}", {**conversation, "conversation_history": _history(turns[conversation_id])})
            for number, (conversation_id, conversation) in enumerate(conversations.items(), start=1)
        ]
    )


def _history(turns: dict[int, list[Row]]) -> list[Row]:
    history = []
    for turn, rows in sorted(turns.items()):
        history.append({"turn": turn, "role": "user", "content": rows[0].get("user_prompt")})
        for row in sorted(rows, key=lambda row: row.get("within_turn_id") or 0):
            answer = {"content": row.get("model_response"), "if_chosen": row.get("if_chosen")}
            history.append({"turn": turn, "role": "model", **answer})
    return history


def _pairs(row: Row, profiles: dict[str, str | None], conversational: bool) -> Iterator[Row | SkippedRow]:
    user_id = user_id_of(row, "user_id")
    if user_id not in profiles:
        raise SkippedRow("a conversation whose user is not in the survey")
    base = {
        "user_id": user_id,
        "user_profile": profiles[user_id],
        "conversation_id": text_of(row, "conversation_id"),
    }
    dialogue: list[Message] = []
    for turn, items in _turns(row):
        question, chosen, others = _read_turn(items)
        dialogue.append(user_message(question))
        base[GROUP] = dialogue[0]["content"]
        for other in others:
            if isinstance(other, SkippedRow):
                yield other
                continue
            yield {**base, "turn": turn, **_format(dialogue, chosen, other, conversational)}
        dialogue.append(assistant_message(chosen))


def _turns(row: Row) -> list[tuple[int, list[Row]]]:
    history = row.get("conversation_history")
    if not isinstance(history, list) or not history:
        raise SkippedRow("`conversation_history` is not a list of messages")
    turns: dict[int, list[Row]] = defaultdict(list)
    for item in history:
        if not isinstance(item, dict) or not isinstance(item.get("turn"), int):
            raise SkippedRow("`conversation_history` has a message without a turn")
        turns[item["turn"]].append(item)
    return sorted(turns.items())


def _read_turn(items: list[Row]) -> tuple[str, str, list[str | SkippedRow]]:
    """The user's message, the chosen answer, and the rejected ones (or why there is no pair with them)."""
    questions = [item for item in items if item.get("role") == "user"]
    answers = [item for item in items if item.get("role") == "model"]
    if len(questions) != 1 or not _has_text(questions[0]):
        raise SkippedRow("a turn without one message of the user, and the rest of its conversation")
    chosen = [item["content"] for item in answers if item.get("if_chosen") is True and _has_text(item)]
    if not chosen:
        raise SkippedRow("a turn without a chosen answer, and the rest of its conversation")
    rejected = [item for item in answers if item.get("if_chosen") is not True]
    if not rejected:
        return questions[0]["content"], chosen[0], [SkippedRow("a turn without a rejected answer", broken=False)]
    return questions[0]["content"], chosen[0], [_rejected(item, chosen[0]) for item in rejected]


def _has_text(item: Row) -> bool:
    try:
        return bool(text_of(item, "content"))
    except SkippedRow:
        return False


def _rejected(item: Row, chosen: str) -> str | SkippedRow:
    if item.get("if_chosen") is not False:
        return SkippedRow("an answer of which nothing says if it was chosen")
    if not _has_text(item):
        return SkippedRow("a rejected answer without text")
    if item["content"] == chosen:
        return SkippedRow("a rejected answer equal to the chosen one", broken=False)
    return str(item["content"])


def _format(dialogue: list[Message], chosen: str, rejected: str, conversational: bool) -> dict[str, Any]:
    if conversational:
        answers = {"chosen": [assistant_message(chosen)], "rejected": [assistant_message(rejected)]}
        return {"prompt": list(dialogue), **answers}
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in dialogue]
    return {"prompt": "\n".join([*lines, "Assistant:"]), "chosen": f" {chosen}", "rejected": f" {rejected}"}

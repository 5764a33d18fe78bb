"""Made-up dialogues of users with a profile, who pick one of three answers in each turn. Nothing to download."""

import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, DatasetDict

from .messages import Message, assistant_message, user_message
from .synthetic_style import ANSWERS, PEOPLE, THINGS


# What users like, and how their profiles say so
TASTES = {
    "short": ("quick answers", "few words", "answers without detours", "brief replies"),
    "detailed": ("the whole story", "thorough answers", "every detail", "long explanations"),
    "friendly": ("a warm tone", "cheerful replies", "kind words", "friendly talk"),
}
AGES = ("18-24", "25-34", "35-44", "45-54", "55-64")
JOBS = ("student", "nurse", "baker", "driver", "clerk", "gardener", "painter", "cook")
OPENINGS = ("How does a {thing} work?", "What does a {thing} do? My {person} has one.", "Tell me about a {thing}.")
FOLLOW_UPS = ("And a {thing}?", "Thanks. What about a {thing}, for my {person}?", "Now explain a {thing}, please.")


def make_dialogue_preferences(
    num_users: int = 9, num_unknown_users: int = 6, dialogues_per_user: int = 25, seed: int = 42
) -> DatasetDict:
    """
    Dialogues of two turns, in the columns of [`load_prism`]: in each turn the user picks one of a short, a detailed and a
    friendly answer, always by the same taste, so that a turn has two pairs. The profile of a user says the taste in words that
    other users with this taste share.

    Args:
        num_users (`int`, *optional*, defaults to `9`): Number of users in `train` and `test`, who are named `user_01` and so
            on. Tastes take turns.
        num_unknown_users (`int`, *optional*, defaults to `6`): Number of users who are in `test_unknown_users` only.
        dialogues_per_user (`int`, *optional*, defaults to `25`): Number of dialogues of each known user. A fifth of them are
            in `test`.
        seed (`int`, *optional*, defaults to `42`): Random seed. The same seed gives the same rows.

    Returns:
        [`~datasets.DatasetDict`] with `train`, `test` and `test_unknown_users`, columns `prompt`, `chosen`, `rejected`
        (messages), `user_id`, `user_profile`, `conversation_id`, `turn` and `preference` (the taste).

    Raises:
        `ValueError`: if a number of users is below three (one for each taste), or that of dialogues below five.

    ```python
    >>> dataset = make_dialogue_preferences(num_users=3, num_unknown_users=3, dialogues_per_user=5, seed=1)
    >>> dataset.num_rows
    {'train': 48, 'test': 12, 'test_unknown_users': 12}
    >>> print(dataset["train"][0]["user_profile"])
    Self-description: I am a nurse and I like few words.
    Age: 35-44 years old
    ```
    """
    if min(num_users, num_unknown_users) < len(TASTES) or dialogues_per_user < 5:
        raise ValueError(
            f"There must be {len(TASTES)} known and unknown users and 5 dialogues at least, got {num_users}, "
            f"{num_unknown_users} and {dialogues_per_user}."
        )
    rng = random.Random(seed)
    tastes = list(TASTES)
    num_test = dialogues_per_user // 5
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "test_unknown_users": []}
    for number in range(num_users + num_unknown_users):
        taste = tastes[number % len(tastes)]
        like = rng.choice(TASTES[taste])
        profile = f"Self-description: I am a {rng.choice(JOBS)} and I like {like}.\nAge: {rng.choice(AGES)} years old"
        user = {"user_id": f"user_{number + 1:02d}", "user_profile": profile, "preference": taste}
        known = number < num_users
        for dialogue in range(dialogues_per_user if known else num_test):
            split = ("test" if dialogue < num_test else "train") if known else "test_unknown_users"
            rows[split] += _dialogue(rng, user, f"{user['user_id']}_{dialogue}")
    return DatasetDict({split: Dataset.from_list(split_rows) for split, split_rows in rows.items()})


def _dialogue(rng: random.Random, user: dict[str, str], conversation_id: str) -> Iterator[dict[str, Any]]:
    history: list[Message] = []
    for turn, (thing, questions) in enumerate(zip(rng.sample(list(THINGS), 2), (OPENINGS, FOLLOW_UPS), strict=True)):
        does, how, care = THINGS[thing][0]
        facts = {"thing": thing, "person": rng.choice(PEOPLE), "does": does, "how": how, "care": care}
        history = [*history, user_message(rng.choice(questions).format(**facts))]
        answers = {taste: rng.choice(ANSWERS[taste]).format(**facts) for taste in TASTES}
        chosen = assistant_message(answers[user["preference"]])
        for taste, answer in answers.items():
            if taste != user["preference"]:
                pair = {"prompt": history, "chosen": [chosen], "rejected": [assistant_message(answer)]}
                yield {**pair, **user, "conversation_id": conversation_id, "turn": turn}
        history = [*history, chosen]

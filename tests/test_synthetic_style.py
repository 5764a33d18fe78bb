"""The made-up questions and dialogues: deterministic, split without leakage, conflicting as their docstrings say."""

from collections import Counter, defaultdict
from statistics import mean

import pytest

from trl_personal.data import make_dialogue_preferences, make_style_preferences
from trl_personal.data.psoups import STYLES, opposite_style
from trl_personal.data.synthetic_dialogue import TASTES


@pytest.fixture(scope="module")
def styles():
    return make_style_preferences(seed=3)


@pytest.fixture(scope="module")
def dialogues():
    return make_dialogue_preferences(seed=3)


@pytest.mark.parametrize("make", [make_style_preferences, make_dialogue_preferences])
def test_the_same_seed_gives_the_same_rows_and_another_one_others(make):
    assert make(seed=3)["train"].to_list() == make(seed=3)["train"].to_list()
    assert make(seed=4)["train"][0] != make(seed=3)["train"][0]


def test_all_six_users_judge_every_question_and_no_question_is_in_both_splits(styles):
    assert not set(styles["train"]["prompt"]) & set(styles["test"]["prompt"])
    for split, num_prompts in (("train", 200), ("test", 30)):
        users = defaultdict(list)
        for row in styles[split]:
            users[row["prompt"]].append(row["user_id"])
        assert len(users) == num_prompts
        assert all(judges == list(STYLES) for judges in users.values())


def test_a_rule_without_users_is_right_in_exactly_half_of_the_pairs(styles):
    for split in styles.values():
        rows = {(row["prompt"], row["user_id"]): (row["chosen"], row["rejected"]) for row in split}
        assert all(rows[prompt, opposite_style(user)] == pair[::-1] for (prompt, user), pair in rows.items())
        assert all(chosen != rejected for chosen, rejected in rows.values())


def test_styles_show_in_the_text(styles):
    chosen = defaultdict(list)
    for row in styles["train"]:
        chosen[STYLES[row["user_id"]]].append(row["chosen"])
    words = {style: mean(len(text.split()) for text in texts) for style, texts in chosen.items()}
    letters = {style: mean(len(word) for text in texts for word in text.split()) for style, texts in chosen.items()}
    assert words["detailed"] > 3 * words["short"]
    assert letters["expert"] > letters["plain"] + 2
    assert abs(words["expert"] - words["plain"]) < 5
    assert abs(words["friendly"] - words["unfriendly"]) < 5
    friendly = [mean("!" in text for text in chosen[style]) for style in ("friendly", "unfriendly")]
    assert friendly == [1, 0]


def test_dialogues_have_two_turns_with_two_pairs_each(dialogues):
    for split, users in (("train", 9), ("test", 9), ("test_unknown_users", 6)):
        rows = defaultdict(list)
        for row in dialogues[split]:
            rows[row["conversation_id"]].append(row)
        assert len({row["user_id"] for row in dialogues[split]}) == users
        for first, second, third, fourth in rows.values():
            assert [first["turn"], second["turn"], third["turn"], fourth["turn"]] == [0, 0, 1, 1]
            assert first["chosen"] == second["chosen"]
            assert third["prompt"][:2] == first["prompt"] + first["chosen"]
            assert [message["role"] for message in third["prompt"]] == ["user", "assistant", "user"]


def test_users_and_conversations_are_kept_apart_and_tastes_are_even(dialogues):
    known = set(dialogues["train"]["user_id"])
    assert known == set(dialogues["test"]["user_id"])
    assert not known & set(dialogues["test_unknown_users"]["user_id"])
    assert not set(dialogues["train"]["conversation_id"]) & set(dialogues["test"]["conversation_id"])
    for split in dialogues.values():
        assert len(set(Counter(split["preference"]).values())) == 1


def test_profiles_say_the_taste_in_words(dialogues):
    for split in dialogues.values():
        for row in split:
            assert any(words in row["user_profile"] for words in TASTES[row["preference"]])


def test_numbers_that_make_no_data_are_refused():
    with pytest.raises(ValueError, match="Both splits need a prompt at least, got 0 and 30"):
        make_style_preferences(train_prompts=0)
    with pytest.raises(ValueError, match="There are 2688 questions, too few for 2700 in train and 30"):
        make_style_preferences(train_prompts=2700)
    with pytest.raises(ValueError, match="got 2, 6 and 25"):
        make_dialogue_preferences(num_users=2)

"""The made-up posts: deterministic, split by post, and lengths that follow the users' preferences."""

import re
from collections import Counter
from statistics import mean

import pytest

from trl_personal.data import make_length_preferences


@pytest.fixture(scope="module")
def dataset():
    return make_length_preferences(seed=3)


def words(text):
    return len(text.split())


def test_the_same_seed_gives_the_same_rows_and_another_one_others(dataset):
    assert make_length_preferences(seed=3)["train"][:20] == dataset["train"][:20]
    assert make_length_preferences(seed=4)["train"][0] != dataset["train"][0]


def test_seven_of_ten_users_prefer_longer_answers(dataset):
    preferences = dict(zip(dataset["train"]["user_id"], dataset["train"]["preference"], strict=True))
    assert Counter(preferences.values()) == {"longer": 7, "shorter": 3}
    assert set(dataset["test"]["user_id"]) == set(preferences)


def test_choices_follow_the_preference_in_every_row(dataset):
    for split in dataset.values():
        for row in split:
            assert (len(row["chosen"]) > len(row["rejected"])) == (row["preference"] == "longer")


def test_no_post_is_in_both_splits(dataset):
    assert not set(dataset["train"]["prompt"]) & set(dataset["test"]["prompt"])


def test_both_groups_read_and_reject_texts_of_the_same_lengths(dataset):
    """So that only the preference tells users apart."""
    lengths = {"longer": [], "shorter": []}
    for row in dataset["train"]:
        lengths[row["preference"]].append(words(row["chosen"]) + words(row["rejected"]))
    assert mean(lengths["longer"]) == pytest.approx(mean(lengths["shorter"]), rel=0.05)


def test_answers_vary_beyond_their_length(dataset):
    chosen = [row["chosen"] for row in dataset["train"]]
    assert len(set(chosen)) > 0.5 * len(chosen)  # users share posts
    short = [row["chosen"] for row in dataset["train"] if row["preference"] == "shorter"]
    long = [row["chosen"] for row in dataset["train"] if row["preference"] == "longer"]
    assert mean(map(words, long)) > 3 * mean(map(words, short))
    openings = Counter(re.match(r"\W*\w+", text).group() for text in long)
    assert len(openings) > 5
    assert openings.most_common(1)[0][1] < 0.6 * len(long)

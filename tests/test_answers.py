"""Lengths, variety and win rates, counted by hand."""

import pytest

from trl_personal.evaluation import distinct_n, judge_both_ways, summarize_answers, win_rates


PROMPTS = ["p", "q", "r"]


def prefers_longer(prompts, pairs):
    return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]


def test_a_judge_who_always_takes_the_first_answer_gives_ties():
    assert judge_both_ways(lambda prompts, pairs: [0] * len(pairs), PROMPTS, "abc", "xyz") == [-1, -1, -1]


def test_a_judge_is_asked_with_both_orders():
    seen = []

    def judge(prompts, pairs):
        seen.append((prompts, pairs))
        return [0] * len(pairs)

    judge_both_ways(judge, ["p", "q"], ["a", "b"], ["x", "y"])
    assert seen == [(["p", "q"], [["a", "x"], ["b", "y"]]), (["p", "q"], [["x", "a"], ["y", "b"]])]


def test_win_rates_count_ties_half():
    answers = {"ann": ["long one", "x", "same"], "bo": ["x", "x", "x"]}
    rates = win_rates(prefers_longer, PROMPTS, answers, ["short", "short", "four"])
    assert (rates["ann"].wins, rates["ann"].losses, rates["ann"].ties) == (1, 1, 1)
    assert rates["ann"].rate.value == 0.5
    assert (rates["bo"].wins, rates["bo"].losses, rates["bo"].rate.value) == (0, 3, 0.0)
    own_rival = win_rates(prefers_longer, PROMPTS, answers, {"ann": ["", "", ""], "bo": ["xx", "xx", "xx"]})
    assert [own_rival[user].wins for user in answers] == [3, 0]


def test_bad_judgements_are_refused():
    with pytest.raises(ValueError, match="0, 1 or -1 for each of 3 prompts, found 3 judgements: \\[2\\]"):
        judge_both_ways(lambda prompts, pairs: [2] * 3, PROMPTS, "abc", "xyz")
    with pytest.raises(ValueError, match="found 1 judgements"):
        judge_both_ways(lambda prompts, pairs: [0], PROMPTS, "abc", "xyz")


def test_lengths_and_variety():
    rows = summarize_answers({"ann": ["a b c", "a b"], None: ["", ""]}, reference=["one", "one two three"])
    assert rows[0]["mean_generated_length"] == 2.5
    assert rows[0]["length_drift"] == 0.5
    assert rows[0]["distinct_1"] == 3 / 5
    assert rows[0]["distinct_2"] == 2 / 3
    assert (rows[1]["user_id"], rows[1]["empty_share"], rows[1]["distinct_1"]) == (None, 1, None)
    assert distinct_n(["one"], 2) is None

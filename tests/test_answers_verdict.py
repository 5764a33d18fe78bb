"""The answers' half of the verdict: exact on a toy, right in planted evaluations, and silent about users who are alike."""

import itertools
import json
import random

import numpy as np
import pytest
from rich.console import Console

from trl_personal.evaluation import evaluate_answers, overall_verdict
from trl_personal.evaluation.answer_features import ANSWER_FEATURES
from trl_personal.evaluation.answers_report import answers_table
from trl_personal.evaluation.judged import judge_answers
from trl_personal.evaluation.permutation import flip_differences, permute_pairs, permute_users, preferred_directions
from trl_personal.evaluation.verdict import evaluate_margins


PROMPTS = [f"question {number}" for number in range(20)]
SENTENCES = "The sun is up. We like (red) boats! Is it late? Bring 3 apples, two pears and a knife; thanks.".split(" ")


def write(rng, low, high):
    return " ".join(rng.choices(SENTENCES, k=rng.randint(low, high)))


def answers_of(lengths, seed=0):
    """For each user answers with a number of words in a range; all draw from the same words."""
    rng = random.Random(seed)
    return {user: [write(rng, *length) for _ in PROMPTS] for user, length in lengths.items()}


# --- The test -----------------------------------------------------------------------------------------------------------


def test_p_values_approach_those_of_all_permutations():
    """Two users and six prompts: each of 2^6 exchanges can be written down."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 6, 3))
    features[0, :, 0] += 1.0
    z = features - features.mean(axis=0)
    z /= np.sqrt((z**2).sum(axis=(0, 1)))
    sums = np.array([(np.array(signs)[:, None] * z[0]).sum(axis=0) for signs in itertools.product([1, -1], repeat=6)])
    spread, found = 2 * sums**2, 2 * z[0].sum(axis=0) ** 2
    exact = (spread.max(axis=1)[:, None] >= found - 1e-9).mean(axis=0)
    test = permute_users(features, num_permutations=20_000)
    np.testing.assert_allclose(test.p_values, exact, atol=0.015)
    differences = features[:1] - features[1:]
    statistics = np.abs(
        np.array(
            [(np.array(signs)[:, None] * differences[0]).sum(axis=0) for signs in itertools.product([1, -1], repeat=6)]
        )
    )
    statistics /= np.sqrt((differences[0] ** 2).sum(axis=0))
    exact = (statistics.max(axis=1) >= statistics[0].max() - 1e-9).mean()
    np.testing.assert_allclose(flip_differences(differences, num_permutations=20_000), [exact], atol=0.015)
    assert test.p_value == test.p_values.min()


def test_what_differs_one_way_here_and_another_way_there_is_no_users_own():
    one, other = np.array([1.0, -1.0] * 5), np.array([-1.0, 1.0] * 5)
    assert permute_users(np.stack([one, other])[:, :, None]).p_value > 0.5
    same = permute_users(np.ones((3, 10, 2)))
    assert same.p_values.tolist() == [1, 1]
    assert same.fit_p_value is None


def test_fit_is_one_sided():
    features = np.zeros((2, 10, 1))
    features[0] = 1.0
    towards, against = (permute_users(features, np.array([[sign], [-sign]]) * 1.0).fit_p_value for sign in (1, -1))
    assert towards == pytest.approx(1 / 2**10, abs=3e-3)
    assert against == 1


def test_many_users_have_fewer_permutations(monkeypatch):
    monkeypatch.setattr("trl_personal.evaluation.permutation.MAX_NUMBERS", 1000)
    features = np.zeros((2, 10, 1))
    features[0] = 1.0
    assert permute_users(features).p_value >= 1 / 200


def test_directions_are_means_in_units_of_all_pairs():
    found = preferred_directions(
        np.array([[3.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]),
        np.array([0, 0, 1]), 2,
    )  # fmt: skip
    np.testing.assert_allclose(found, [[1.5 / np.sqrt(6), 0], [-3 / np.sqrt(6), 0]])


# --- The report ---------------------------------------------------------------------------------------------------------


def test_means_and_differences_by_hand():
    prompts = ["p", "q"]
    answers = {"ann": ["a b", "a b c d"], "bo": ["a", ""], "cy": ["a b c", "a"], None: ["a a", "a a a"]}
    base = {None: ["a b c d", "a b"], "bo": ["x", "y"]}
    nats = {"ann": [1.0, 2.0], "bo": [3.0, float("nan")]}
    report = evaluate_answers(
        answers, prompts, base_answers=base, nats_per_token=nats,
        base_nats_per_token={None: [0.5, 0.5], "bo": [1.0, 1.0]},
    )  # fmt: skip
    ann, bo, _ = report.users
    assert (ann.means["words"].value, ann.minus_generic["words"].value) == (3, 0.5)
    assert ann.minus_others["words"].value == (0 + 3.5) / 2
    assert ann.minus_base["words"].value == 0  # two fewer, two more
    assert (bo.means["empty"].value, bo.minus_base["words"].value) == (0.5, -0.5)  # of its own wish
    assert (bo.means["nats_per_token"].value, bo.minus_base["nats_per_token"].value) == (3, 2)
    assert report.generic.means["repetition"].value == 0.25
    assert (report.generic.minus_others, report.generic.minus_generic) == ({}, {})
    assert (report.base.user_id, report.base.distinct_2, report.num_pairs) == (None, 0.75, 3)
    assert "nats_per_token" not in report.users[2].means
    found = json.dumps(report.to_dict(), allow_nan=False)  # two prompts have wide intervals, one has endless ones
    assert json.loads(found)["users"][1]["minus_base"]["nats_per_token"]["low"] is None
    with pytest.raises(ValueError, match="one answer to each of 2 prompts"):
        evaluate_answers({"ann": ["a"]}, prompts)
    with pytest.raises(ValueError, match="There are no prompts"):
        evaluate_answers({"ann": []}, [])


def test_a_user_named_base_is_a_user():
    report = evaluate_answers({"base": ["a"], "bo": ["b c"]}, ["p"], base_answers={None: ["x y z"]})
    assert [user.user_id for user in report.users] == ["base", "bo"]
    assert report.base.means["words"].value == 3


def test_few_prompts_or_users_are_told():
    assert "9 prompts are too few" in evaluate_answers({"a": ["x"] * 9, "b": ["y"] * 9}, PROMPTS[:9]).verdict
    alone = evaluate_answers({"a": ["x"] * 10, None: ["x y z"] * 10}, PROMPTS[:10])
    assert "nobody to differ from" in alone.verdict
    assert alone.users[0].p_generic < 0.05
    assert overall_verdict(True, alone) == "Personal on pairs; the answers are too few to tell."


def test_table_names_no_user_unless_asked():
    report = evaluate_answers(answers_of({"ann": (2, 5), "bo": (9, 15), None: (2, 9)}), PROMPTS)
    for list_users in (False, True):
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(answers_table(report, list_users))
        text = console.export_text()
        assert "2 users, mean" in text
        assert ("ann" in text) == list_users


# --- Planted evaluations ------------------------------------------------------------------------------------------------


def margins(seed=0):
    """Pairs of four users that their own prompts get right and others do not."""
    rng = np.random.default_rng(seed)
    users, prompts = np.repeat(["ann", "bo", "cy", "di"], 20).tolist(), PROMPTS * 4
    own, others = rng.normal(2, 1, 80), {name: rng.normal(0, 1, 80) for name in ("generic", "swapped", "vanilla")}
    return evaluate_margins(own, user_ids=users, prompt_ids=prompts, **others)


def test_pairs_that_separate_and_answers_that_do_not():
    answers = answers_of(dict.fromkeys(["ann", "bo", "cy", "di", None], (4, 30)))
    report = evaluate_answers(answers, PROMPTS)
    assert not report.has_difference
    assert report.verdict.startswith("No evidence that answers differ between users (p = ")
    pairs = margins()
    assert pairs.has_gain
    assert overall_verdict(pairs.has_gain, report) == "Personal on pairs, not in the answers yet."


def test_counts_in_the_sentence_are_counts():
    answers = {
        "ann": ["so it is and is so."] * len(PROMPTS),
        "bo": ["so it. is and. is so."] * len(PROMPTS),
    }
    report = evaluate_answers(answers, PROMPTS)
    assert "sentences (from 1.0 to 3.0)" in report.verdict
    assert "sentence length (from 2.0 to 6.0)" in report.verdict


def test_answers_that_separate_are_found_with_their_features_and_directions():
    lengths = {"ann": (4, 9), "bo": (20, 30), "cy": (4, 9), "di": (20, 30)}
    answers = answers_of({**lengths, None: (12, 16)})
    chosen, rejected = (
        answers_of(lengths, seed=1),
        answers_of({u: (20, 30) if n == (4, 9) else (4, 9) for u, n in lengths.items()}, 2),
    )
    pairs = {user: list(zip(PROMPTS, chosen[user], rejected[user], strict=True)) for user in lengths}
    report = evaluate_answers(answers, PROMPTS, pairs=pairs)
    assert report.is_personal
    assert report.p_values["words"] < 0.005
    assert (report.num_pairs, report.num_pairs_apart) == (6, 4)
    assert all(user.p_generic < 0.05 for user in report.users)
    assert "in words (from 6." in report.verdict
    assert "they lean towards what the users chose (p = 0.0005)" in report.verdict
    assert overall_verdict(True, report) == "Personal on pairs and in the answers."
    assert "pairs are no evidence" in overall_verdict(False, report)
    wrong = {user: [(prompt, no, yes) for prompt, yes, no in rows] for user, rows in pairs.items()}
    report = evaluate_answers(answers, PROMPTS, pairs=wrong)
    assert report.has_difference
    assert not report.is_personal
    assert "they do not clearly lean" in report.verdict
    assert overall_verdict(True, report).startswith("Personal on pairs, not in the answers yet: they differ, but")


def prefers_longer(prompts, pairs):
    return [-1 if len(a.split()) == len(b.split()) else int(len(b.split()) > len(a.split())) for a, b in pairs]


def test_answers_that_separate_by_length_alone_win_half_when_length_is_controlled():
    answers = answers_of({"brief": (4, 9), "detailed": (25, 40), None: (12, 20)})
    report = judge_answers(prefers_longer, PROMPTS, answers)
    assert (report.users["brief"].rate.value, report.users["detailed"].rate.value) == (0, 1)
    for rate in report.length_controlled.values():
        assert 0.45 <= rate.value <= 0.55
        assert rate.low < 0.3 < 0.7 < rate.high  # nothing shows what happens at the same length
    assert 0.45 <= report.mean_length_controlled.value <= 0.55


def test_collapsed_answers_are_named():
    rng = random.Random(0)
    answers = answers_of(dict.fromkeys(["ann", "bo", None], (10, 20)))
    base = {None: answers_of({"x": (10, 20)}, seed=5)["x"]}
    fluent = {user: [1 + 0.1 * rng.random() for _ in PROMPTS] for user in answers}
    options = {"base_answers": base, "base_nats_per_token": {None: [1.0] * 20}}
    assert evaluate_answers(answers, PROMPTS, nats_per_token=fluent, **options).collapse is None
    garbled = {**fluent, "bo": [6 + rng.random() for _ in PROMPTS]}
    report = evaluate_answers(answers, PROMPTS, nats_per_token=garbled, **options)
    assert report.collapse.startswith("Answers collapse for 1 of 2 users: 6.")
    assert report.collapse.endswith("nats per token where the base's own have 1.00.")
    assert report.users[1].collapsed_in == ("nats_per_token",)
    assert overall_verdict(True, report).endswith(report.collapse)
    doubtful = {**fluent, "bo": [6.0] * 3 + [1.0] * 17}  # 0.75 more on average, by three prompts of twenty
    assert evaluate_answers(answers, PROMPTS, nats_per_token=doubtful, **options).collapse is None
    repeated = {**answers, "ann": ["no " * 30] * 20, "bo": [""] * 20}
    report = evaluate_answers(repeated, PROMPTS, **options)
    assert [user.collapsed_in for user in report.users] == [("repetition",), ("empty",)]
    assert "2 of 2 users" in report.collapse
    generic = evaluate_answers({"ann": answers["ann"], None: ["no " * 30] * 20}, PROMPTS, **options)
    assert generic.collapse.startswith("Answers collapse for the generic user: ")


# --- Users who are alike ------------------------------------------------------------------------------------------------


def alike(seed, num_users, num_prompts, pool=None):
    """Correlated, skewed features that depend on the prompt; with a pool, users pick from a few answers to each."""
    rng, num_features = np.random.default_rng(seed), len(ANSWER_FEATURES)
    mix = rng.normal(size=(num_features, num_features)) / np.sqrt(num_features)
    features = np.exp(rng.normal(size=(pool or num_users, num_prompts, num_features)) @ mix)
    if pool:
        features = np.take_along_axis(features, rng.integers(0, pool, (num_users, num_prompts, 1)), axis=0)
    return features + 3 * rng.normal(size=(1, num_prompts, num_features)), rng.normal(size=(num_users, num_features))


def false_alarms(num_seeds, **kwargs):
    """How often users differ, any pair does, any user differs from the first one, and answers fit random directions."""
    found = []
    for seed in range(num_seeds):
        features, directions = alike(seed, **kwargs)
        test = permute_users(features, directions, num_permutations=199, seed=seed)
        one, other = np.triu_indices(len(features), k=1)
        pairs = flip_differences(features[one] - features[other], 199, seed)
        first = flip_differences(features[1:] - features[0], 199, seed)
        found.append([test.p_value, pairs.min(), first.min(), test.fit_p_value])
    return (np.array(found) < 0.05).mean(axis=0)


def test_users_who_are_alike_seldom_differ():
    assert max(false_alarms(100, num_users=4, num_prompts=12)) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_users", "num_prompts", "pool"),
    [(2, 10, None), (4, 20, None), (10, 12, None), (4, 20, 2), (10, 20, 3), (40, 10, None)],
)
def test_false_alarms_stay_at_their_level(num_users, num_prompts, pool):
    rates = false_alarms(400, num_users=num_users, num_prompts=num_prompts, pool=pool)
    print(num_users, num_prompts, pool, *rates)
    assert max(rates) <= 0.08  # 0.05 and three standard errors of 400 seeds


def fits_of_shuffled_pairs(num_seeds):
    """Answers of four users differ, their pairs belong to anybody: how often answers seem to fit them."""
    found = []
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(4, 12, 5)) + 2 * rng.normal(size=(4, 1, 5))
        chosen, rejected, users = rng.normal(size=(80, 5)), rng.normal(size=(80, 5)), rng.integers(0, 4, 80)
        test = permute_users(features, preferred_directions(chosen, rejected, users, 4), 199, seed)
        found.append([test.fit_p_value, permute_pairs(features, chosen, rejected, users, 199, seed)])
    return (np.array(found) < 0.05).mean(axis=0)


def test_answers_that_differ_do_not_fit_wants_that_are_nobodys():
    by_answers, by_pairs = fits_of_shuffled_pairs(100)
    assert by_answers > 0.2  # alone it would say so of many
    assert by_pairs <= 0.1


@pytest.mark.slow
def test_texts_of_users_who_are_alike_seldom_differ():
    found = []
    for seed in range(200):
        answers = answers_of(dict.fromkeys(["ann", "bo", "cy", "di"], (4, 30)), seed)
        found.append(evaluate_answers(answers, PROMPTS, num_permutations=199).has_difference)
    assert np.mean(found) <= 0.1

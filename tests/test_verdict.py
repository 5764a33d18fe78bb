"""The verdict on personalization: equal to hand computation on a toy, right in simulations of users with or without tastes."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

from trl_personal.agreement import compare, majority_agreement, measure_agreement
from trl_personal.evaluation.report import personalization_table, scorers_of
from trl_personal.evaluation.verdict import calibration_error, evaluate_margins


NUM_FEATURES = 6


# --- Agreement ----------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    """Answers x and y are judged by ann, bo (twice) and cy, two for x; u and v by ann alone; y and z by two who agree."""
    prompts = ["p", "p", "p", "p", "p", "q", "q"]
    chosen, rejected = ["x", "x", "x", "y", "u", "z", "z"], ["y", "y", "y", "x", "v", "y", "y"]
    users = [0, 1, 1, 2, 0, 0, 1]
    comparisons, directions = compare(prompts, chosen, rejected)
    found = measure_agreement(comparisons, directions, users)
    assert (found.num_comparisons, found.num_shared, found.num_conflicting) == (3, 2, 1)
    assert found.disagreement_rate == 2 / 4  # of ann-bo, ann-cy, bo-cy and ann-bo on q, cy's two
    assert found.pooled_ceiling == 4 / 5
    assert found.contradiction_rate == 0
    agrees = majority_agreement(comparisons, directions, users)
    np.testing.assert_array_equal(agrees, [1, 1, 1, 0, np.nan, 1, 1])


def test_a_user_who_takes_back_a_judgement_counts_as_a_contradiction():
    found = measure_agreement([0, 0, 0], [True, False, True], [0, 0, 0])
    assert found.contradiction_rate == 2 / 3
    assert (found.num_shared, found.disagreement_rate, found.pooled_ceiling) == (0, None, None)


# --- The report on a toy ------------------------------------------------------------------------------------------------

TOY = {
    "user_ids": ["ann", "ann", "bo", "bo", "bo", "cy"],
    "prompt_ids": ["p", "q", "p", "q", "r", "p"],
    "own": [2.0, 1.0, 1.0, -1.0, 3.0, -1.0],
    "generic": [-1.0, 1.0, -1.0, -1.0, 3.0, -1.0],
    "swapped": [-2.0, 1.0, 1.0, -3.0, -1.0, -1.0],
    "vanilla": [1.0, -1.0, -1.0, -1.0, 1.0, 1.0],
    "known_users": {"ann", "bo"},
    "agrees_with_majority": [1, 1, 0, 0, 1, math.nan],
}


def test_report_equals_hand_computation():
    report = evaluate_margins(**TOY, beta=1.0)
    ann, bo, cy = report.users
    assert [(u.user_id, u.known, u.minority, u.num_pairs, u.num_prompts) for u in report.users] == [
        ("ann", True, False, 2, 2),
        ("bo", True, True, 3, 3),
        ("cy", False, None, 1, 1),
    ]
    accuracies = {name: (ann.accuracy[name].value, bo.accuracy[name].value) for name in ann.accuracy}
    expected = {"own": (1.0, 2 / 3), "generic": (0.5, 1 / 3), "swapped": (0.5, 1 / 3), "vanilla": (0.5, 1 / 3)}
    for name, values in expected.items():
        assert accuracies[name] == pytest.approx(values), name
    assert (ann.mean_margin["own"], bo.mean_margin["swapped"]) == (1.5, -1.0)
    assert (ann.gain, bo.gain, cy.gain) == pytest.approx((0.5, 1 / 3, -1.0))
    means = {name: group.accuracy["own"].value for name, group in report.groups.items()}
    assert means == pytest.approx({"all": (1 + 2 / 3 + 0) / 3, "known": 5 / 6, "unknown": 0.0, "minority": 2 / 3})
    assert (report.groups["known"].num_users, report.groups["known"].num_pairs) == (2, 5)
    assert (report.worst_user["own"], report.worst_decile["own"], report.worst_user["vanilla"]) == pytest.approx(
        (2 / 3, 2 / 3, 1 / 3)
    )
    advantages = {name: advantage.value for name, advantage in report.advantages.items()}
    assert advantages == pytest.approx({"vanilla": 5 / 12, "generic": 5 / 12, "swapped": 5 / 12})


def test_the_gain_is_the_smallest_advantage_with_the_lowest_ends():
    values = TOY | {"vanilla": [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]}
    report = evaluate_margins(**values)
    assert report.gain.value == pytest.approx(report.advantages["vanilla"].value) == pytest.approx(0.25)
    for end in ("low", "high"):
        assert getattr(report.gain, end) == min(
            getattr(report.advantages["vanilla"], end), getattr(report.advantages["generic"], end)
        )


def test_worst_decile_is_the_mean_of_the_lowest_tenth():
    users = np.repeat(np.arange(20), 10)
    own = np.where(np.tile(np.arange(10), 20) < users // 2, 1.0, -1.0)  # user u is right on u // 2 of ten pairs
    report = evaluate_margins(own, own, [f"u{u}" for u in users], np.arange(200))
    assert report.worst_user["own"] == 0.0
    assert report.worst_decile["own"] == pytest.approx((0.0 + 0.0) / 2)
    report = evaluate_margins(-own, own, [f"u{u}" for u in users], np.arange(200))
    assert report.worst_decile["own"] == pytest.approx(0.1)  # two users are wrong on nine of ten


def test_calibration_by_hand():
    """Confidences 0.9 (right), 0.9 (wrong) and 0.6 (right), in bins of their own: (|1.8 - 1| + |0.6 - 1|) / 3."""
    margins = [math.log(9), -math.log(9), math.log(1.5)]
    assert calibration_error(margins, beta=1.0) == pytest.approx((0.8 + 0.4) / 3)
    assert calibration_error(np.array(margins) / 0.1, beta=0.1) == pytest.approx(0.4)


def test_calibration_of_honest_probabilities_is_small():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=50_000)
    margins *= np.where(rng.random(50_000) < 1 / (1 + np.exp(-margins)), 1, -1)
    assert calibration_error(margins, beta=1.0) < 0.01
    assert calibration_error(margins, beta=5.0) > 0.1


def test_report_is_json_and_a_table_without_ids():
    report = evaluate_margins(**TOY)
    assert json.loads(json.dumps(report.to_dict()))["users"][0]["accuracy"]["own"]["value"] == 1.0
    for list_users in (False, True):
        console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(personalization_table(report, list_users))
        text = console.export_text()
        assert ("ann" in text) == list_users
        assert "minority, mean" in text
        assert "0.83" in text


# --- The verdict --------------------------------------------------------------------------------------------------------


def repeated(**replaced):
    """The toy's known users on 60 prompts each time a new one."""
    values = {name: list(column)[:5] * 60 for name, column in (TOY | replaced).items() if name != "known_users"}
    values["prompt_ids"] = list(range(300))
    return values


def test_a_clear_gain_is_called_one():
    report = evaluate_margins(**repeated())
    assert report.has_gain
    assert report.verdict == (
        f"These users gain: {report.gain:+.3f} pair accuracy over vanilla DPO and the generic prompt, mean of 2 known users, "
        "of whom 2 do better and 0 worse."
    )
    assert report.gain.value == pytest.approx(5 / 12)


def test_no_gain_if_another_users_prompt_does_as_well():
    report = evaluate_margins(**repeated(swapped=TOY["own"]))
    assert not report.has_gain
    assert report.verdict.endswith("the user's own prompt does not clearly beat another user's prompt.")


def test_other_ways_are_named_but_decide_nothing():
    others = {"user_id_text": TOY["own"], "in_context": TOY["swapped"], "mine": TOY["own"]}
    report = evaluate_margins(**repeated(), others={name: values[:5] * 60 for name, values in others.items()})
    assert report.has_gain
    assert report.gain == evaluate_margins(**repeated()).gain
    assert report.verdict.endswith("; not clearly better than the user id as text or mine.")
    assert report.advantages["in_context"] == report.advantages["swapped"]
    assert scorers_of(report) == ["own", "generic", "swapped", "vanilla", "user_id_text", "in_context", "mine"]
    assert report.groups["all"].mean_margin["own"] == pytest.approx(
        np.mean([user.mean_margin["own"] for user in report.users])
    )


def test_the_prompt_of_an_opposite_user_is_shown_but_decides_nothing():
    plain, unbeaten, beaten = (
        evaluate_margins(**repeated(), **more)
        for more in ({}, {"opposite": TOY["own"][:5] * 60}, {"opposite": [-1.0] * 300})
    )
    assert (unbeaten.verdict, unbeaten.gain, unbeaten.has_gain) == (plain.verdict, plain.gain, True)
    assert unbeaten.advantages["opposite"].value == 0
    assert beaten.advantages["opposite"].low > 0
    assert scorers_of(beaten) == ["own", "generic", "swapped", "opposite", "vanilla"]
    without_swapped = {name: values for name, values in repeated().items() if name != "swapped"}
    assert not evaluate_margins(**without_swapped, opposite=[-1.0] * 300).has_gain


def test_no_gain_over_the_better_baseline_though_the_other_is_beaten():
    report = evaluate_margins(**repeated(vanilla=TOY["own"]))
    assert not report.has_gain
    assert report.advantages["generic"].low > 0
    assert "does not clearly beat vanilla DPO." in report.verdict


def test_no_gain_without_the_swap_control():
    values = repeated()
    del values["swapped"]
    report = evaluate_margins(**values)
    assert not report.has_gain
    assert report.verdict.endswith("; not tested against another user's prompt, so the gain may not be personal.")


def test_missing_vanilla_model_is_said():
    values = repeated()
    del values["vanilla"]
    report = evaluate_margins(**values)
    assert report.has_gain
    assert "(vanilla DPO not measured)" in report.verdict


def test_few_prompts_are_too_few():
    values = repeated()
    values["prompt_ids"] = [number % 9 for number in range(300)]
    report = evaluate_margins(**values)
    assert report.verdict == "No evidence of gain: 9 prompts are too few to tell, at least 10 are needed."


def test_unknown_users_only():
    report = evaluate_margins(**TOY | {"known_users": set()})
    assert (report.gain, report.has_gain, report.worst_user) == (None, False, {})
    assert report.verdict == "No evidence of gain: there are no pairs of known users."


def test_pairs_of_nobody_are_not_those_of_a_known_user():
    report = evaluate_margins(**TOY | {"user_ids": ["ann", None, "bo", "bo", None, "cy"], "known_users": None})
    assert [(user.user_id, user.known) for user in report.users][:2] == [("ann", True), (None, False)]
    assert report.groups["unknown"].num_pairs == 2


def test_a_single_prompt_gives_intervals_that_json_can_hold():
    report = evaluate_margins(**TOY | {"prompt_ids": ["p"] * 6})
    assert (report.gain.low, report.gain.high) == (-1.0, 1.0)
    assert json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"own": []}, "found these lengths"),
        ({"swapped": [math.inf] * 6}, "`swapped` has 6 values that are not finite numbers, the first for pair 0"),
        ({"own": [1, 2, math.nan, 1, 1, 1]}, "`own` has 1 values .* the first for pair 2"),
    ],
)
def test_bad_margins_are_refused(replaced, message):
    with pytest.raises(ValueError, match=message):
        evaluate_margins(**TOY | replaced)
    with pytest.raises(ValueError, match="no pairs"):
        evaluate_margins([], [], [], [])


# --- Simulated users ----------------------------------------------------------------------------------------------------


def simulate_margins(
    seed,
    planted,
    num_users=10,
    train_pairs=60,
    test_pairs=40,
    num_prompts=None,
    prompt_effect=0.0,
    undertrained=0.0,
    minority=False,
):
    """
    Rules learned from pairs of users as P-DPO learns, and their margins on other pairs.

    Users have tastes of their own (or a third the opposite of the others' taste); unless `planted`, the ids are shuffled over
    the pairs before anything is learned. `num_prompts` shared prompts have a taste of their own, `prompt_effect`. With
    `undertrained` the baselines are worse than they should be, so that any other prompt beats them.
    """
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=NUM_FEATURES)
    shared *= 2 / np.linalg.norm(shared)
    if minority:
        tastes = np.where(np.arange(num_users) % 3 == 0, -1.0, 1.0)[:, None] * shared
    else:
        tastes = shared + 4 * rng.normal(size=(num_users, NUM_FEATURES)) / math.sqrt(NUM_FEATURES)

    def draw(pairs_per_user):
        users = np.repeat(np.arange(num_users), pairs_per_user)
        prompts = np.arange(len(users)) if num_prompts is None else rng.integers(num_prompts, size=len(users))
        effects = prompt_effect * rng.normal(size=(prompts.max() + 1, NUM_FEATURES))
        differences = rng.normal(size=(len(users), NUM_FEATURES))
        logits = ((tastes[users] + effects[prompts]) * differences).sum(axis=1)
        differences *= np.where(rng.random(len(users)) < 1 / (1 + np.exp(-logits)), 1, -1)[:, None]
        return users if planted else rng.permutation(users), prompts, differences

    def fit(differences):
        return np.linalg.solve(differences.T @ differences + np.eye(NUM_FEATURES), differences.sum(axis=0))

    users, _, differences = draw(train_pairs)
    generic = fit(differences)
    offsets = np.zeros((num_users, NUM_FEATURES))
    np.add.at(offsets, users, differences * (1 - differences @ generic)[:, None])
    rules = generic + offsets / (train_pairs + 5)
    vanilla = fit(differences[rng.random(len(users)) < 0.5])
    size = undertrained * np.linalg.norm(generic)
    users, prompts, differences = draw(test_pairs)
    return {
        "own": (differences * rules[users]).sum(axis=1),
        "generic": differences @ (generic + size * rng.normal(size=NUM_FEATURES)),
        "swapped": (differences * rules[(users + 1) % num_users]).sum(axis=1),
        "vanilla": differences @ (vanilla + size * rng.normal(size=NUM_FEATURES)),
        "user_ids": users.tolist(),
        "prompt_ids": prompts.tolist(),
    }


def share_of_gains(num_seeds, **settings):
    return np.mean([evaluate_margins(**simulate_margins(seed, **settings)).has_gain for seed in range(num_seeds)])


def most_by_chance(num_seeds, rate=0.05):
    return rate + 3 * math.sqrt(rate * (1 - rate) / num_seeds)


def test_without_the_swap_control_any_soft_prompt_would_seem_personal():
    """Why the verdict insists on it: baselines that are worse than they should be."""
    passed = 0
    for seed in range(60):
        report = evaluate_margins(**simulate_margins(seed, planted=False, undertrained=2.0))
        passed += all(report.advantages[name].low > 0 for name in ("vanilla", "generic"))
    assert passed / 60 > most_by_chance(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_users": 2},
        {"num_users": 4, "num_prompts": 14, "prompt_effect": 1.0},
        {"num_prompts": 10, "prompt_effect": 2.0},
        {"num_users": 100, "train_pairs": 10, "test_pairs": 4},
        {"undertrained": 2.0},
        {"undertrained": 2.0, "num_users": 3},
        {"undertrained": 2.0, "num_prompts": 14, "prompt_effect": 1.0},
        {"minority": True},
        {"minority": True, "undertrained": 2.0, "num_users": 6},
    ],
    ids=str,
)
def test_false_gains_over_200_seeds_with_shuffled_ids(settings):
    assert share_of_gains(200, planted=False, **settings) <= most_by_chance(200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_users": 4, "test_pairs": 100},
        {"minority": True},
        {"num_users": 50, "train_pairs": 30, "test_pairs": 10},
    ],
    ids=str,
)
def test_power_over_200_seeds_with_planted_preferences(settings):
    assert share_of_gains(200, planted=True, **settings) >= 0.95

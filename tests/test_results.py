"""A trainer that has just trained, evaluated: the rows, tables and files of its users."""

import json

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from trl_personal.evaluation import evaluate_trainer, nats_per_token, reference_policy


OPPOSITE = {"ann": "bo", "bo": "ann"}
PREFERENCES = {"ann": "shorter", "bo": "longer", "zoe": "longer"}


@pytest.fixture
def trainers(make_trainer):
    def train(**kwargs):
        trainer = make_trainer(per_device_eval_batch_size=3, **kwargs)
        trainer.train()
        return trainer

    return train(), train(user_model_kind="none")


@pytest.fixture
def test_rows(preferences):
    rows = [*preferences, {**preferences[0], "user_id": "zoe"}]
    return Dataset.from_list([{**row, "preference": PREFERENCES[row["user_id"]]} for row in rows])


def printed(*tables):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables)
    return console.export_text()


def test_rows_of_users_equal_hand_computation(trainers, test_rows):
    trainer, vanilla = trainers
    prompts = ["the story", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why"}]]
    answers = {"ann": ["yes no", "yes"], None: ["yes", ""]}
    controls = {"vanilla": vanilla, "opposite_users": OPPOSITE, "preference_column": "preference"}
    found = evaluate_trainer(trainer, test_rows, **controls, prompts=prompts, answers=answers).to_dict()
    ann, bo, zoe = found["users"]
    assert [(user["user_id"], user["known"], user["num_pairs"]) for user in (ann, bo, zoe)] == [
        ("ann", True, 4),
        ("bo", True, 4),
        ("zoe", False, 1),
    ]
    assert (ann["preference"], ann["mean_chosen_length"], bo["mean_chosen_length"]) == ("shorter", 1, 5)
    assert (ann["mean_generated_length"], ann["generated_lengths"], ann["empty_share"]) == (1.5, [2, 1], 0)
    assert (bo["mean_generated_length"], found["means"]["mean_generated_length"]) == (None, 1.5)
    assert found["means"]["accuracy_own"] == (ann["accuracy_own"] + bo["accuracy_own"]) / 2  # of known users
    right = sum(user["accuracy_vanilla"] * user["num_pairs"] for user in (ann, bo, zoe))
    assert found["vanilla_accuracy"] == pytest.approx(right / 9)
    assert found["majority_share"] == 5 / 9
    assert found["length_by_preference"] == {"shorter": 1.5}
    assert (found["generic"]["user_id"], found["generic"]["empty_share"]) == ("generic user", 0.5)
    assert found["samples"] == [
        {"prompt": "the story", "answers": {"ann": "yes no", "generic user": "yes"}},
        {"prompt": "why", "answers": {"ann": "yes", "generic user": ""}},
    ]
    assert ann["accuracy_swapped"] == ann["accuracy_opposite"]  # there are two users
    assert json.dumps(found, allow_nan=False)


def test_base_answers_and_wishes_give_fluency(trainers, test_rows):
    trainer, _ = trainers
    answers, prompts = (
        {"ann": ["yes no", "yes"], "bo": ["i like dogs", ""], None: ["no", "no"]},
        ["the story", "please write"],
    )
    wishes, base = {"ann": "please short"}, {None: ["yes", "no"], "ann": ["yes", "the end"]}
    options = {"prompts": prompts, "answers": answers, "base_answers": base, "wishes": wishes}
    evaluation = evaluate_trainer(trainer, test_rows, **options)
    ann, bo = evaluation.answers_report.users
    with reference_policy(trainer) as reference:
        own, others = (
            nats_per_token(reference, trainer._tokenizer, prompts, texts["ann"], "please short")
            for texts in (answers, base)
        )
        of_bo = nats_per_token(reference, trainer._tokenizer, prompts, answers["bo"])
    assert ann.means["nats_per_token"].value == pytest.approx(own.mean(), abs=1e-4)
    assert ann.minus_base["nats_per_token"].value == pytest.approx((own - others).mean(), abs=1e-4)
    assert evaluation.user_rows()[1]["nats_per_token"] == pytest.approx(of_bo[0], abs=1e-4)
    assert evaluation.to_dict()["samples"][0]["reference"] == "yes"
    judged = evaluate_trainer(
        trainer, test_rows, **options, judge=lambda prompts, pairs: [0] * len(pairs)
    ).judge_report
    assert (judged.judge, judged.users["ann"].ties) == ("The judge", 2)


def test_majority_counts_within_dimensions(trainers, test_rows):
    rows = test_rows.select(range(8)).add_column("conflict", ["length"] * 8)
    other = [{**row, "conflict": "tone", "user_id": "cy", "preference": "kind"} for row in rows.select([0, 1])]
    both = Dataset.from_list([*rows, *other])
    evaluation = evaluate_trainer(trainers[0], both, preference_column="preference")
    assert evaluation.majority_share == (4 + 2) / 10


def test_without_preferences_or_answers(trainers, preferences):
    chats = preferences.map(lambda row: {"prompt": "why", "chosen": row["chosen"] + " dogs"})
    evaluation = evaluate_trainer(trainers[0], chats)
    found = evaluation.to_dict()
    assert (found["majority_share"], found["vanilla_accuracy"], found["generic"], found["samples"]) == (
        None,
        None,
        None,
        [],
    )
    assert "mean_generated_length" not in found["users"][0]
    assert found["users"][0]["mean_chosen_length"] == 2
    assert "accuracy_opposite" not in found["users"][0]
    with pytest.raises(ValueError, match="has no `taste` column"):
        evaluate_trainer(trainers[0], preferences, preference_column="taste")
    with pytest.raises(ValueError, match="The trainer has no users"):
        evaluate_trainer(trainers[1], preferences)


def test_tables_name_each_control(trainers, test_rows, tmp_path):
    trainer, vanilla = trainers
    evaluation = evaluate_trainer(
        trainer, test_rows, vanilla=vanilla, opposite_users=OPPOSITE, preference_column="preference",
        prompts=["why"], answers={"ann": [" yes"], "bo": ["no"], None: [""]},
    )  # fmt: skip
    text = printed(evaluation.users_table())
    for word in ("own", "generic", "swapped", "opposite", "shorter", "accuracy of vanilla DPO", "majority share 0.56"):
        assert word in text
    text = printed(evaluation.answers_table(0, ["bo", "ann", None]))
    assert "prefers longer" in text
    assert text.index("no") < text.index("yes")
    files = evaluation.save(tmp_path / "evaluation")
    assert {"evaluation.json", "accuracy_by_user.png", "user_map.png", "length_by_user.png"} <= set(files)
    pairs = Dataset.from_parquet(str(tmp_path / "evaluation/pairs.parquet"))
    assert {"own", "generic", "swapped", "opposite", "vanilla"} <= set(pairs.column_names)
    np.testing.assert_allclose(pairs["swapped"], pairs["opposite"], atol=1e-5)

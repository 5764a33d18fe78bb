"""Margins of pairs: equal to plain forward passes, and to the trainer's own metrics."""

from collections import Counter

import numpy as np
import pytest
import torch

from trl_personal.evaluation import score_pairs
from trl_personal.evaluation.scoring import with_row_numbers


def sum_of_log_probs(model, row, answer, **kwargs):
    """By a forward pass on one unpadded row."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{answer}_ids"]])
    with torch.no_grad():
        log_probs = model(input_ids=ids, **kwargs).logits[0, :-1].log_softmax(-1)
    per_token = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return per_token[len(row["prompt_ids"]) - 1 :].sum().item()


def margin_by_hand(policy, reference, row, **kwargs):
    chosen, rejected = (
        sum_of_log_probs(policy, row, answer, **kwargs) - sum_of_log_probs(reference, row, answer)
        for answer in ("chosen", "rejected")
    )
    return chosen - rejected


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_steps=4, per_device_eval_batch_size=3)
    trainer.train()
    return trainer


def test_margins_equal_plain_forward_passes(trained, preferences):
    unknown = preferences.select([0]).map(lambda row: {**row, "user_id": "zoe"})
    rows = [*preferences, *unknown]
    scored = score_pairs(trained, preferences.from_list(rows))
    trained.model.eval()
    prepared = [*trained.train_dataset, trained.train_dataset[0]]
    for name, users in (("own", [1, 2] * 4 + [0]), ("generic", [0] * 9), ("swapped", [2, 1] * 4 + [0])):
        expected = [
            margin_by_hand(trained.model, trained.ref_model, row, user_indices=torch.tensor([user]))
            for row, user in zip(prepared, users, strict=True)
        ]
        np.testing.assert_allclose(scored.margins[name], expected, atol=1e-4)
    assert scored.rows.tolist() == list(range(9))
    assert scored.num_dropped == 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_accuracy_and_margin_are_the_trainers_own(make_trainer, preferences, lora):
    trainer = make_trainer(lora=lora, max_steps=4, per_device_eval_batch_size=2, beta=0.3, ld_alpha=0.5)
    trainer.train()
    preferences = preferences.select(
        [0, 2, 5, 7]
    )  # pairs that mirror each other have generic margins of zero, and noise
    metrics = trainer.evaluate(preferences)
    scored = score_pairs(trainer, preferences)
    own, generic = scored.margins["own"], scored.margins["generic"]
    assert metrics["eval_rewards/accuracies"] == (own > 0).mean()
    assert metrics["eval_generic/rewards/accuracies"] == (generic > 0).mean()
    assert metrics["eval_users/accuracy_swapped"] == (scored.margins["swapped"] > 0).mean()
    assert metrics["eval_rewards/margins"] == pytest.approx(0.3 * own.mean(), rel=1e-5)
    assert metrics["eval_generic/rewards/margins"] == pytest.approx(0.3 * generic.mean(), rel=1e-5)
    times = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert {k: v for k, v in scored.metrics.items() if k not in times} == pytest.approx(
        {k: v for k, v in metrics.items() if k not in times}
    )


def test_the_reference_runs_once_for_a_batch_and_each_prompt_once(trained, preferences, monkeypatch):
    calls = Counter()
    trained.model.register_forward_pre_hook(lambda *args: calls.update(["policy"]))
    trained.ref_model.register_forward_pre_hook(lambda *args: calls.update(["reference"]))
    score_pairs(trained, preferences.select(range(6)))
    assert calls == {"policy": 2 * 3, "reference": 2}


def test_a_trainer_without_users_has_one_margin(make_trainer, preferences):
    trainer = make_trainer(max_steps=2, user_model_kind="none", per_device_eval_batch_size=3)
    trainer.train()
    scored = score_pairs(trainer, preferences)
    trainer.model.eval()
    expected = [margin_by_hand(trainer.model, trainer.ref_model, row) for row in trainer.train_dataset]
    np.testing.assert_allclose(scored.margins["own"], expected, atol=1e-4)
    assert list(scored.margins) == ["own"]


def test_a_precomputed_reference_gives_the_same(make_trainer, preferences):
    trainers = [make_trainer(lora=True, max_steps=2, precompute_ref_log_probs=flag) for flag in (False, True)]
    for trainer in trainers:
        trainer.train()
    first, second = (score_pairs(trainer, preferences).margins["own"] for trainer in trainers)
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.fixture
def of_three(make_trainer):
    trainer = make_trainer(max_steps=3, trainer_kwargs={"user_vocab": ["ann", "bo", "cy"]})
    trainer.train()
    return trainer


def test_swapped_is_the_next_user_and_opposite_the_one_who_was_named(of_three, preferences):
    opposite = {"ann": "cy", "bo": "ann"}
    scored, alone = (score_pairs(of_three, preferences, users) for users in (opposite, None))
    of_three.model.eval()
    for name, rows in (("swapped", (2, 3)), ("opposite", (3, 1))):  # of ann and of bo, who are in rows 1 and 2
        expected = [
            margin_by_hand(of_three.model, of_three.ref_model, row, user_indices=torch.tensor([rows[i % 2]]))
            for i, row in enumerate(of_three.train_dataset)
        ]
        np.testing.assert_allclose(scored.margins[name], expected, atol=1e-4)
    np.testing.assert_allclose(alone.margins["swapped"], scored.margins["swapped"], atol=1e-5)
    assert not np.allclose(scored.margins["swapped"], scored.margins["opposite"], atol=1e-4)
    assert list(alone.margins) == ["own", "generic", "swapped"]


@pytest.mark.parametrize(
    ("opposite", "message"),
    [
        ({"ann": "bo"}, "has nobody for 1 of 2 known users: \\['bo'\\]"),
        ({"ann": "bo", "bo": "di"}, "1 users in `opposite_users` are not known to the model: \\['di'\\]"),
        ({"ann": "ann", "bo": "ann"}, "user 'ann' is opposite to itself"),
    ],
)
def test_each_known_user_has_another_one_as_opposite(of_three, preferences, opposite, message):
    with pytest.raises(ValueError, match=message):
        score_pairs(of_three, preferences, opposite)


def test_a_prepared_dataset_is_scored_by_its_name_without_being_tokenized_again(
    make_trainer, preferences, monkeypatch
):
    given = {"eval_dataset": {"pairs": with_row_numbers(preferences), "others": preferences.select([0])}}
    trainer = make_trainer(max_steps=2, trainer_kwargs=given)
    trainer.train()
    by_dataset = score_pairs(trainer, preferences)
    monkeypatch.setattr(trainer, "_prepare_dataset", None)
    by_name = score_pairs(trainer, "pairs")
    for name in ("own", "generic", "swapped"):
        np.testing.assert_allclose(by_name.margins[name], by_dataset.margins[name], atol=1e-5)
    assert by_name.rows.tolist() == by_dataset.rows.tolist()
    assert (by_name.prompts, by_name.answers) == (by_dataset.prompts, by_dataset.answers)
    assert len(score_pairs(trainer, "others").margins["own"]) == 1


def test_rows_that_do_not_fit_are_counted_and_the_others_keep_their_number(make_trainer, preferences):
    trainer = make_trainer(max_length=8)
    long = {**preferences[0], "prompt": "please write a story the end yes no"}
    scored = score_pairs(trainer, preferences.from_list([long, *preferences, long]))
    assert scored.rows.tolist() == list(range(1, 9))
    assert scored.num_dropped == 2
    with pytest.raises(ValueError, match="each prompt alone fills `max_length`"):
        score_pairs(trainer, preferences.from_list([long]))


def test_order_holds_whatever_the_training_asks_of_the_loader(make_trainer, preferences):
    plain = make_trainer(per_device_eval_batch_size=3)
    other = make_trainer(
        per_device_eval_batch_size=3, train_sampling_strategy="group_by_length", dataloader_drop_last=True
    )
    expected, found = (score_pairs(trainer, preferences) for trainer in (plain, other))
    np.testing.assert_allclose(found.margins["own"], expected.margins["own"], atol=1e-5)
    assert other.args.dataloader_drop_last
    assert other.margin_recorder is None


def test_streams_are_refused(trained, preferences):
    with pytest.raises(TypeError, match="found IterableDataset"):
        score_pairs(trained, preferences.to_iterable_dataset())

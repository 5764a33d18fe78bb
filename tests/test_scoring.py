"""Margins of pairs: equal to plain forward passes, and to the trainer's own metrics."""

from collections import Counter

import numpy as np
import pytest
import torch

from trl_personal.evaluation.scoring import score_pairs


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
    strangers = preferences.select([0]).map(lambda row: {**row, "user_id": "stranger"})
    rows = [*preferences, *strangers]
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


def test_swapped_users_may_be_given(make_trainer, preferences):
    trainer = make_trainer(max_steps=3, trainer_kwargs={"user_vocab": ["ann", "bo", "cy"]})
    trainer.train()
    as_next, as_given = (
        score_pairs(trainer, preferences, swapped) for swapped in (None, {"ann": "cy", "bo": "ann", "cy": "bo"})
    )
    trainer.model.eval()
    expected = [
        margin_by_hand(trainer.model, trainer.ref_model, row, user_indices=torch.tensor([[3, 1][i % 2]]))
        for i, row in enumerate(trainer.train_dataset)
    ]
    np.testing.assert_allclose(as_given.margins["swapped"], expected, atol=1e-4)
    assert not np.allclose(as_given.margins["swapped"], as_next.margins["swapped"], atol=1e-4)
    with pytest.raises(ValueError, match="1 users in `swapped_users` are not known to the model: \\['di'\\]"):
        score_pairs(trainer, preferences, {"ann": "di"})
    with pytest.raises(ValueError, match="its own prompt"):
        score_pairs(trainer, preferences, {"ann": "ann"})


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

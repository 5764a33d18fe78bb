import pytest
import torch
from datasets import Dataset
from test_loss import disturb

from trl_personal.training.user_metrics import MarginRecorder, pair_margins, swapped_user_indices


def test_margin_is_the_difference_of_log_ratios():
    log_probs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -1.0, 0.0], [0.0, -4.0, 0.0], [0.0, -3.0, -3.0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    margins = pair_margins(log_probs, mask, torch.tensor([-2.0, -3.0]), torch.tensor([-5.0, -1.0]))
    assert margins.tolist() == [(-3 + 2) - (-4 + 5), (-1 + 3) - (-6 + 1)]


def test_ld_alpha_weighs_tokens_past_the_shorter_completion():
    log_probs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, 0.0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])
    zero = torch.zeros(1)
    assert pair_margins(log_probs, mask, zero, zero, ld_alpha=0.0).item() == -1 + 4
    assert pair_margins(log_probs, mask, zero, zero, ld_alpha=0.5).item() == -1 - 0.5 * 2 + 4
    assert pair_margins(log_probs, mask, zero, zero, ld_alpha=1.0).item() == -3 + 4


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_margins_agree_with_trls_reward_accuracy(make_trainer, preferences, ld_alpha):
    trainer = make_trainer(ld_alpha=ld_alpha, max_steps=4, per_device_eval_batch_size=8)
    trainer.train()
    known = preferences.select([0, 1, 2, 3])  # two pairs each: macro and micro means agree
    metrics = trainer.evaluate(known)
    assert metrics["eval_users/accuracy_mean"] == pytest.approx(metrics["eval_rewards/accuracies"])


@pytest.mark.parametrize("num_users", [2, 3, 10])
def test_swapping_is_a_derangement_of_the_known_users(num_users):
    users = torch.arange(1, num_users + 1)
    swapped = swapped_user_indices(users, num_users)
    assert sorted(swapped.tolist()) == users.tolist()
    assert not (swapped == users).any()
    assert swapped_user_indices(torch.tensor([0]), num_users).item() == 0


def test_means_are_over_users_and_not_over_pairs():
    recorder = MarginRecorder({"swapped": torch.tensor([0, 2, 1])})
    recorder.add(
        {"own": torch.tensor([1.0, 2.0, 0.1]), "swapped": torch.tensor([0.0, -1, -1])}, torch.tensor([1, 1, 1])
    )
    recorder.add({"own": torch.tensor([1.0, 0.0, 1.0]), "swapped": torch.ones(3)}, torch.tensor([1, 2, 0]))
    assert len(recorder) == 6
    assert recorder.accuracy_by_user("own") == {1: 1.0, 2: 0.0}
    assert recorder.metrics() == {
        "users/accuracy_mean": 0.5,
        "users/accuracy_worst": 0.0,
        "users/accuracy_swapped": (0.25 + 1.0) / 2,
    }


def test_a_tie_is_not_right(make_trainer, preferences):
    row = preferences[0]
    same = Dataset.from_list([{**row, "rejected": row["chosen"] + " "}])  # other text, the same tokens
    metrics = make_trainer().evaluate(same)
    assert metrics["eval_users/accuracy_mean"] == 0.0
    assert metrics["eval_users/accuracy_swapped"] == 0.0


def test_each_evaluation_counts_its_own_pairs(make_trainer, preferences):
    trainer = make_trainer()
    row = preferences[0]
    flipped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    one, other = Dataset.from_list([row]), Dataset.from_list([flipped])
    for eval_dataset in (one, other, {"one": one, "other": other, "again": one}):
        trainer.evaluate(eval_dataset)
    accuracies = [
        log[name] for log in trainer.state.log_history for name in log if name.endswith("users/accuracy_mean")
    ]
    assert accuracies in ([1.0, 0.0] * 2 + [1.0], [0.0, 1.0] * 2 + [0.0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pairs_that_were_predicted_do_not_count_in_the_next_evaluation(make_trainer, preferences):
    row = preferences[0]
    flipped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    one = Dataset.from_list([row])
    tokenized = make_trainer(trainer_kwargs={"train_dataset": Dataset.from_list([flipped])}).train_dataset
    trainer = make_trainer()
    accuracy = trainer.evaluate(one)["eval_users/accuracy_mean"]
    trainer.predict(tokenized)
    assert trainer.evaluate(one)["eval_users/accuracy_mean"] == accuracy  # 0 or 1; one half with the other pair


def test_the_generic_user_is_evaluated_where_alpha_is_one(make_trainer, preferences):
    metrics = make_trainer(personalization_alpha=1.0).evaluate(preferences)
    assert 0 <= metrics["eval_generic/rewards/accuracies"] <= 1


def test_tokens_past_the_shorter_answer_count_in_the_accuracy_of_users_as_in_trls(make_trainer, preferences):
    accuracies = []
    for ld_alpha in (0.0, None):
        trainer = make_trainer(ld_alpha=ld_alpha, per_device_eval_batch_size=8)
        disturb(trainer, seed=3)
        metrics = trainer.evaluate(
            preferences
        )  # as many pairs of `ann` as of `bo`: the mean over pairs is that over users
        assert metrics["eval_users/accuracy_mean"] == metrics["eval_rewards/accuracies"]
        accuracies.append(metrics["eval_users/accuracy_mean"])
    assert accuracies[0] != accuracies[1]

import pytest
import torch

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

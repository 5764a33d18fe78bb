"""A user model that is too large says so before it is made, with the figure and the alternative."""

import logging

import pytest
import torch
from conftest import KINDS

from trl_personal import (
    ClusterUserModel,
    ClusterUserModelConfig,
    IndividualUserModel,
    LowRankUserModel,
    LowRankUserModelConfig,
    UserModelConfig,
)
from trl_personal.user_models import get_user_model_class
from trl_personal.user_models.memory import training_bytes, warn_if_large


T, DIM = 10, 4096
FLOATS = 4 * 4  # weight, gradient, two moments; bytes each


def test_figures_are_those_of_the_formulas():
    users = 1_000_000
    individual = training_bytes(IndividualUserModel, UserModelConfig(users, T, DIM))
    assert individual == FLOATS * (users + 2) * T * DIM  # the generic prompt, and a row for the generic user
    low_rank = training_bytes(LowRankUserModel, LowRankUserModelConfig(users, T, DIM, user_rank=32))
    assert low_rank == FLOATS * (T * DIM + 32 * T * DIM + (users + 1) * 32) == 533_627_392


@pytest.mark.parametrize("kind", KINDS)
def test_figure_is_what_training_allocates(kind):
    user_model_class = get_user_model_class(kind)
    config = user_model_class.config_class(num_users=5, num_virtual_tokens=2, token_dim=8)
    user_model = user_model_class(config)
    optimizer = torch.optim.AdamW(user_model.parameters())
    user_model(torch.tensor([1, 0])).sum().backward()
    optimizer.step()
    tensors = [t for p in user_model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    steps = 4 * sum(1 for _ in user_model.parameters())  # AdamW's count of steps, one number a tensor
    assert training_bytes(user_model_class, config) == sum(t.numel() * t.element_size() for t in tensors) - steps


def test_a_large_table_warns_with_the_figure_and_the_alternative(caplog):
    warn_if_large(IndividualUserModel, UserModelConfig(1_000_000, T, DIM))
    assert "kind 'individual' needs 655.36 GB in training for 1000000 users: 40960081920 weights" in caplog.text
    assert '`user_model_kind="low_rank"` with `user_rank=32` needs 0.53 GB.' in caplog.text


def test_the_limit_is_one_gigabyte(caplog):
    row = FLOATS * T * DIM
    most = 10**9 // row - 2
    with caplog.at_level(logging.INFO):
        warn_if_large(IndividualUserModel, UserModelConfig(most, T, DIM))
    assert not caplog.text
    warn_if_large(IndividualUserModel, UserModelConfig(most + 1, T, DIM))
    assert "needs 1.00 GB" in caplog.text


@pytest.mark.parametrize(
    ("user_model_class", "config", "needed"),
    [
        (LowRankUserModel, LowRankUserModelConfig(3_000_000, T, DIM, user_rank=32), "1.56 GB"),
        (ClusterUserModel, ClusterUserModelConfig(9_000_000, T, DIM), "1.45 GB"),
    ],
)
def test_no_alternative_that_needs_more(caplog, user_model_class, config, needed):
    warn_if_large(user_model_class, config)
    assert f"needs {needed} in training" in caplog.text
    assert "user_model_kind" not in caplog.text
    assert "Make its sizes smaller" in caplog.text


def test_the_trainer_warns_before_it_makes_the_table(make_trainer, monkeypatch, caplog):
    monkeypatch.setattr("trl_personal.user_models.memory.LARGE_BYTES", 100)
    monkeypatch.setattr("trl_personal.user_models.memory.FEW_USERS", 1)
    make_trainer(user_model_kind="individual", user_rank=1)
    assert caplog.text.count("The user model of kind 'individual' needs") == 1
    assert "`user_rank=1` needs" in caplog.text


def test_the_trainer_is_silent_about_a_small_table(make_trainer, caplog):
    make_trainer()
    assert "in training for" not in caplog.text

"""A run whose weights are no numbers any more stops before it saves them, and says which and since when."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from trl_personal import AutoPersonalizedModelForCausalLM, UserModel, UserModelConfig
from trl_personal.training.divergence import describe_nonfinite


class Spoil(TrainerCallback):
    """Puts NaN into a weight after a step."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step - 1:
            self.spoil(model)


def spoil_a_row(model):
    model.user_model.user_offsets.weight.data[2, 0] = torch.inf


def spoil_a_weight(model):
    model.lm_head.weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_a_row, r"1 of .* trained tensors \(user_model.user_offsets.weight the first\), with 1 rows of users,"),
        (spoil_a_weight, r"1 of .* trained tensors \(lm_head.weight the first\)"),
    ],
    ids=["a user's row", "a weight"],
)
def test_it_stops_before_the_next_save(make_trainer, tmp_path, spoil, message):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 100}
    trainer = make_trainer(**settings, trainer_kwargs={"callbacks": [Spoil(3, spoil)]})
    with pytest.raises(FloatingPointError, match=f"after step 3, {message} are not finite. .* finite after step 2"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    model = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-2")
    assert describe_nonfinite(model) is None


@pytest.mark.parametrize("settings", [{"learning_rate": 1e30}, {"learning_rate": 1e-4, "user_learning_rate": 1e38}])
@pytest.mark.parametrize("kind", ["individual", "cluster", "low_rank"])
def test_learning_rates_that_are_too_high_stop_the_run(make_trainer, settings, kind):
    trainer = make_trainer(user_model_kind=kind, max_steps=30, **settings)
    with pytest.raises(FloatingPointError, match="The training has diverged"):
        trainer.train()
    assert trainer.state.global_step < 30


def test_the_step_of_the_first_bad_loss_is_told(make_trainer):
    def spoil(model):
        model.transformer.wte.weight.data.fill_(torch.nan)

    trainer = make_trainer(max_steps=9, logging_steps=100, trainer_kwargs={"callbacks": [Spoil(2, spoil)]})
    with pytest.raises(
        FloatingPointError, match="after step 2, 1 of .* finite after step 0; the loss was not finite in step 3"
    ):
        trainer.train()


def test_it_may_go_on(make_trainer, caplog):
    trainer = make_trainer(max_steps=4, on_divergence="warn", trainer_kwargs={"callbacks": [Spoil(2, spoil_a_weight)]})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count("The training has diverged") == 1


def test_without_users_it_stops_too_and_a_sound_run_is_trls(make_trainer):
    spoiled = {"callbacks": [Spoil(1, spoil_a_weight)]}
    with pytest.raises(FloatingPointError, match="lm_head.weight"):
        make_trainer(user_model_kind="none", trainer_kwargs=spoiled).train()


def test_a_bad_loss_alone_stops_nothing(make_trainer, monkeypatch):
    """As with float16, where steps whose gradients overflow are left out."""
    trainer = make_trainer(max_steps=3)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    step = type(trainer).__mro__[1].training_step
    monkeypatch.setattr(
        type(trainer), "training_step", lambda self, *a, **k: step(self, *a, **k) * torch.nan, raising=False
    )
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("half", ["bf16_full_eval", "fp16_full_eval"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_full_evaluation_in_half_precision_leaves_the_weights_alone(make_trainer, preferences, half, lora):
    trainer = make_trainer(lora=lora, **{half: True})
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.evaluate(preferences)
    trainer.predict(trainer.train_dataset)
    after = trainer.model.state_dict()
    assert {name: value.dtype for name, value in after.items()} == {name: v.dtype for name, v in before.items()}
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


def test_frozen_users_do_not_count_in_the_gradient_norm(make_trainer):
    """`user_learning_rate=0`: the language model gets the gradients that it gets with users that have none."""
    norms = []
    for freeze in (False, True):
        trainer = make_trainer(user_learning_rate=0.0 if not freeze else None, max_steps=1, max_grad_norm=1e-3)
        if freeze:
            trainer.user_model.requires_grad_(False)
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert norms[0] == norms[1]
    free = make_trainer(user_learning_rate=1e-9, max_steps=1)
    free.train()
    assert free.state.log_history[0]["grad_norm"] > norms[0][0]


def test_a_user_model_whose_rows_are_in_no_table_is_told_too():
    class Bare(UserModel):
        def __init__(self, config):
            super().__init__(config)
            self.rows = torch.nn.Parameter(
                torch.zeros(config.num_users + 1, config.num_virtual_tokens, config.token_dim)
            )

        def forward(self, user_indices):
            return self.rows[user_indices]

    user_model = Bare(UserModelConfig(num_users=2, num_virtual_tokens=1, token_dim=2))
    assert describe_nonfinite(user_model) is None
    user_model.rows.data[1] = torch.nan
    assert describe_nonfinite(user_model) == "1 of 1 trained tensors (rows the first)"

"""Training and evaluation as a whole: who learns, what is optimized, what is logged."""

import logging

import pytest
import torch
from conftest import CONFIGS, KINDS, make_model, make_tokenizer
from datasets import Dataset

from trl_personal import IndividualUserModel, PersonalizedDPOTrainer, UserModelConfig


@pytest.mark.parametrize(
    ("family", "kind", "lora"),
    [
        pytest.param(
            family,
            kind,
            lora,
            marks=[] if (family == "gptj") == lora and (lora or kind == "individual") else pytest.mark.slow,
            id=f"{family}-{kind}-{'lora' if lora else 'full'}",
        )
        for family in sorted(CONFIGS)
        for kind in KINDS
        for lora in (False, True)
    ],
)
def test_conflicting_users_are_told_apart(make_trainer, preferences, family, kind, lora):
    """Every pair occurs with both orders, so a model that does not know users is at one half."""
    trainer = make_trainer(
        family,
        lora,
        user_model_kind=kind,
        num_clusters=3,
        max_steps=40,
        learning_rate=0.02,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=3,
        beta=0.5,
        lr_scheduler_type="constant",
        trainer_kwargs={"eval_dataset": preferences},
    )
    start = {name: tensor.clone() for name, tensor in trainer.user_model.state_dict().items()}
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_users/accuracy_mean"] == 1.0
    assert metrics["eval_users/accuracy_worst"] == 1.0
    assert metrics["eval_users/accuracy_swapped"] <= 0.25
    assert metrics["eval_generic/rewards/accuracies"] == pytest.approx(0.5, abs=0.26)
    assert all(not torch.equal(start[name], tensor) for name, tensor in trainer.user_model.state_dict().items())


def test_a_user_without_rows_keeps_an_offset_of_exactly_zero(make_trainer):
    trainer = make_trainer(max_steps=5, weight_decay=0.5, trainer_kwargs={"user_vocab": ["ann", "nobody", "bo"]})
    trainer.train()
    offsets = trainer.user_model.user_offsets.weight
    assert torch.equal(offsets[[0, 2]], torch.zeros_like(offsets[[0, 2]]))
    assert offsets[1].abs().sum() > 0
    assert offsets[3].abs().sum() > 0


def test_users_are_collected_in_order_of_first_appearance(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"train_dataset": preferences.select([1, 3, 0, 2])})
    assert list(trainer.user_vocab) == ["bo", "ann"]


def test_user_model_has_an_optimizer_group_of_its_own(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, user_learning_rate=0.5, weight_decay=0.1)
    trainer.create_optimizer()
    *others, own = trainer.optimizer.param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in trainer.user_model.parameters()}
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.0)
    assert {group["lr"] for group in others} == {1e-3}
    everything = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)


def test_user_learning_rate_of_zero_freezes_the_users(make_trainer):
    trainer = make_trainer(user_learning_rate=0.0)
    before = trainer.user_model.generic_prompt.clone()
    weight = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    assert torch.equal(trainer.user_model.generic_prompt, before)
    assert not torch.equal(trainer.model.get_input_embeddings().weight, weight)


def test_initial_prompt_is_vocabulary_rows_by_seed(make_trainer):
    prompts = [make_trainer(seed=seed).user_model.generic_prompt.detach() for seed in (1, 1, 2)]
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])
    rows = make_trainer().model.get_input_embeddings().weight
    assert all((rows == row).all(dim=1).any() for row in prompts[0])


def test_initial_prompt_from_a_text(make_trainer):
    trainer = make_trainer(soft_prompt_init="text", soft_prompt_init_text="please write")
    rows = trainer.model.get_input_embeddings().weight
    assert torch.equal(trainer.user_model.generic_prompt, rows[[6, 7, 6]])


def test_prompts_start_from_tokens_and_not_from_padding_of_the_embedding_table(make_trainer, tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.resize_token_embeddings(512, mean_resizing=False)
    model.get_input_embeddings().weight.data[len(tokenizer) :] = 1000.0
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    trainer = make_trainer(num_virtual_tokens=8, trainer_kwargs={"model": str(tmp_path / "wide")})
    assert trainer.user_model.generic_prompt.abs().max() < 100


@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_making_users_does_not_move_the_global_generator(make_trainer, kind):
    states = []
    for user_model_kind in (kind, "none"):
        make_trainer(user_model_kind=user_model_kind)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_user_model_of_half_precision_is_trained_in_float32(make_trainer):
    user_model = IndividualUserModel(UserModelConfig(2, 3, 32))
    for parameter in user_model.parameters():
        parameter.data = parameter.data.bfloat16()  # `user_model.bfloat16()` leaves them as they are
    trainer = make_trainer(trainer_kwargs={"user_model": user_model})
    assert {parameter.dtype for parameter in trainer.user_model.parameters()} == {torch.float32}


def test_two_runs_are_equal(make_trainer):
    runs = [make_trainer("llama", lora=True) for _ in range(2)]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluation_metrics_are_means_over_users(make_trainer, preferences):
    """Four pairs of `ann`, one of `bo`, one of a stranger, in batches of two: macro over the two known users."""
    rates = {"learning_rate": 0.02, "user_learning_rate": 0.02}
    trainer = make_trainer(beta=0.5, max_steps=20, per_device_eval_batch_size=2, **rates)
    trainer.train()
    rows = [*preferences.select([0, 2, 4, 6])]
    flipped = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    dataset = Dataset.from_list([*rows[:3], flipped, preferences[1], {**flipped, "user_id": "stranger"}])
    metrics = trainer.evaluate(dataset)
    assert metrics["eval_users/accuracy_mean"] == pytest.approx((3 / 4 + 1) / 2)
    assert metrics["eval_users/accuracy_worst"] == pytest.approx(3 / 4)
    assert metrics["eval_users/accuracy_swapped"] == pytest.approx((1 / 4 + 0) / 2)
    names = {name for log in trainer.state.log_history for name in log}
    assert not [name for name in names if "ann" in name or "bo" in name.split("/")]


def test_swapped_accuracy_needs_two_users(make_trainer, preferences):
    one = preferences.filter(lambda row: row["user_id"] == "ann")
    metrics = make_trainer(trainer_kwargs={"train_dataset": one}).evaluate(preferences)
    assert "eval_users/accuracy_swapped" not in metrics
    assert "eval_users/accuracy_mean" in metrics


def test_no_user_metric_when_all_are_strangers(make_trainer, preferences):
    strangers = preferences.map(lambda row: {"user_id": row["user_id"] + "?"})
    metrics = make_trainer().evaluate(strangers)
    assert not [name for name in metrics if "users/" in name]
    assert metrics["eval_rewards/accuracies"] == metrics["eval_generic/rewards/accuracies"]


def test_several_evaluation_sets(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"eval_dataset": {"one": preferences, "two": preferences.select(range(4))}})
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(metrics)
    assert {"eval_users/accuracy_mean"} <= set(metrics) or {"eval_one_users/accuracy_mean"} <= set(metrics)


def test_best_model_may_be_chosen_by_a_user_metric(make_trainer, preferences):
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="users/accuracy_worst",
        greater_is_better=True, trainer_kwargs={"eval_dataset": preferences},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None


def test_none_has_no_extra_metric_no_user_folder_and_needs_no_column(make_trainer, preferences, tmp_path):
    trainer = make_trainer(
        user_model_kind="none", trainer_kwargs={"train_dataset": preferences.remove_columns("user_id")}
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final/user_model").exists()
    assert not [name for log in trainer.state.log_history for name in log if "generic" in name or "users" in name]
    assert "users/accuracy_mean" not in trainer.evaluate(preferences)
    assert isinstance(trainer, PersonalizedDPOTrainer)


def test_gradient_checkpointing_gives_the_same_gradients(make_trainer):
    runs = [make_trainer("llama", optim="sgd", gradient_checkpointing=on) for on in (False, True)]
    for trainer in runs:
        trainer.train()
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_compute_metrics_sees_logits_aligned_with_the_ids(make_trainer, preferences):
    shapes = []

    def compute_metrics(prediction):
        shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {"seen": 1.0}

    trainer = make_trainer(per_device_eval_batch_size=8, trainer_kwargs={"compute_metrics": compute_metrics})
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.evaluate(preferences)
    assert metrics["eval_seen"] == 1.0
    assert shapes[0][0] == shapes[0][1]


def test_frozen_parameters_stay_frozen(make_trainer, preferences, caplog):
    """Whatever the caller froze before construction: a part of a user model, or all of it."""
    config = UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=32)
    user_model = IndividualUserModel(config)
    user_model.generic_prompt.requires_grad_(False)
    trainer = make_trainer(trainer_kwargs={"user_model": user_model}, user_learning_rate=0.1)
    before = {name: value.clone() for name, value in user_model.state_dict().items()}
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert [id(parameter) for parameter in group["params"]] == [id(user_model.user_offsets.weight)]
    assert torch.equal(user_model.generic_prompt, before["generic_prompt"])
    assert not torch.equal(user_model.user_offsets.weight, before["user_offsets.weight"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    # the same user model goes on with a new user: `resize` makes a new one, in which the prompt is still frozen
    newcomer = preferences.map(lambda row: {"user_id": "cy" if row["user_id"] == "bo" else row["user_id"]})
    again = make_trainer(trainer_kwargs={"model": trainer.model, "train_dataset": newcomer})
    assert len(again.user_vocab) == 3
    assert [name for name, p in again.user_model.named_parameters() if not p.requires_grad] == ["generic_prompt"]


def test_a_frozen_user_model_is_told_and_the_language_model_trains(make_trainer, caplog):
    user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=32))
    user_model.requires_grad_(False)
    trainer = make_trainer(trainer_kwargs={"user_model": user_model})
    assert "All parameters of the user model are frozen" in caplog.text
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not [name for name in moved if name.startswith("user_model.")]


UNITS = {  # of each weight, in standard deviations of the token embeddings `s`, for two factors or clusters
    "individual": lambda s: {"generic_prompt": s, "user_offsets.weight": s},
    "cluster": lambda s: {"cluster_prompts": s, "user_logits.weight": 1.0},
    "low_rank": lambda s: {"generic_prompt": s, "shared_basis": s, "user_factors.weight": 2**-0.5},
}


@pytest.mark.parametrize("kind", UNITS)
def test_default_rates_are_in_units_of_the_token_embeddings(make_trainer, kind):
    """So is the first step of Adam, whatever the gradient: 0.03 of the unit of each weight."""
    trainer = make_trainer("llama", user_model_kind=kind, num_clusters=2, user_rank=2, max_steps=1, max_grad_norm=0.0)
    weight = trainer.model.get_input_embeddings().weight
    ids = torch.randint(len(trainer.processing_class), (1024,), generator=torch.Generator().manual_seed(0))
    units = UNITS[kind](weight[ids].std().item())
    named = dict(trainer.user_model.named_parameters())
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in named.items()} == pytest.approx({n: 0.03 * u for n, u in units.items()})
    assert [
        g["weight_decay"]
        for g in trainer.optimizer.param_groups
        if id(named["generic_prompt" if kind != "cluster" else "cluster_prompts"]) in map(id, g["params"])
    ] == [0.0]
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.train()
    for name, parameter in named.items():
        step = (parameter - before[name]).abs().max().item()
        # low-rank: the basis of users at zero has no gradient yet
        assert step == pytest.approx(0 if name == "shared_basis" else 0.03 * units[name], rel=1e-2)


def test_a_rate_that_is_given_is_that_of_all_weights(make_trainer):
    trainer = make_trainer("llama", user_model_kind="low_rank", user_learning_rate=0.5)
    (group,) = [group for group in trainer.create_optimizer().param_groups if group["lr"] == 0.5]
    assert len(group["params"]) == len(list(trainer.user_model.parameters())) == 3


@pytest.mark.parametrize(
    ("rate", "word"), [(1e-9, "hardly moved"), (0.0, None), (None, None)], ids=["tiny", "frozen", "default"]
)
def test_a_run_says_when_users_hardly_moved(make_trainer, caplog, rate, word):
    trainer = make_trainer("llama", user_learning_rate=rate, max_steps=6)
    with caplog.at_level("INFO", "trl_personal"):
        trainer.train()
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING" and "soft prompts" in r.message]
    assert [word in text for text in warnings] == ([True] if word else [])
    said = [r.message for r in caplog.records if "standard deviations of the token embeddings from" in r.message]
    assert len(said) == (0 if rate == 0 else 1)
    assert not any("ann" in text or "bo" in text.split() for text in said)


def test_nothing_moves_at_a_rate_of_zero(make_trainer):
    trainer = make_trainer("llama", learning_rate=0.0, max_steps=2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())

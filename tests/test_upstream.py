"""What we rely on in TRL, transformers and PEFT. When a test here fails, read their changes first."""

from collections import Counter
from inspect import signature

import pytest
import torch
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_personal import PersonalizedDPOTrainer


OVERRIDDEN = [
    "_prepare_dataset",
    "_precompute_ref_logps",
    "_load_best_model",
    "_load_from_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "compute_ref_log_probs",
    "create_model_card",
    "create_optimizer",
    "evaluate",
    "get_eval_dataloader",
    "log",
    "save_model",
    "train",
    "training_step",
]


def test_every_method_we_override_exists_upstream():
    mro = PersonalizedDPOTrainer.__mro__
    ours = {
        name
        for cls in mro[: mro.index(DPOTrainer)]
        for name, value in vars(cls).items()
        if callable(value) and name in dir(DPOTrainer) and not name.startswith("__") and not isinstance(value, type)
    }
    assert ours == set(OVERRIDDEN)


def test_our_constructor_takes_trls_arguments_in_trls_order():
    theirs = list(signature(DPOTrainer.__init__).parameters)
    ours = list(signature(PersonalizedDPOTrainer.__init__).parameters)
    assert ours == [*theirs, "user_vocab", "user_model"], (
        "TRL's DPOTrainer has other arguments than the version we wrap."
    )


def test_signatures_we_call():
    assert list(signature(DPOTrainer.compute_loss).parameters) == [
        "self", "model", "inputs", "return_outputs", "num_items_in_batch",
    ]  # fmt: skip
    assert list(signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    assert list(signature(DPOTrainer.log).parameters) == ["self", "logs", "start_time"]
    assert list(signature(Trainer._load_from_checkpoint).parameters) == ["self", "resume_from_checkpoint", "model"]
    assert next(iter(signature(PreTrainedModel.save_pretrained).parameters)) == "self"


def test_upstream_calls_our_overrides(make_trainer, preferences, monkeypatch):
    calls = Counter()
    for name in OVERRIDDEN:
        original = getattr(PersonalizedDPOTrainer, name)
        monkeypatch.setattr(
            PersonalizedDPOTrainer,
            name,
            lambda *args, _name=name, _original=original, **kw: calls.update([_name]) or _original(*args, **kw),
        )
    settings = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "trainer_kwargs": {"eval_dataset": preferences},
    }  # fmt: skip
    make_trainer(**settings).train()
    make_trainer(**settings | {"max_steps": 3}).train(resume_from_checkpoint=True)
    make_trainer(precompute_ref_log_probs=True)
    assert set(calls) == set(OVERRIDDEN), f"no longer called: {set(OVERRIDDEN) - set(calls)}"


def test_private_state_we_touch(make_trainer):
    trainer = make_trainer(user_model_kind="none")
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._metrics["train"]["never seen"] == []
    assert trainer._total_train_tokens == 0
    assert trainer.precompute_ref_logps is False
    assert trainer._tokenizer.pad_token == "<pad>"


def test_extra_batch_keys_reach_the_model(make_trainer):
    trainer = make_trainer(max_steps=1)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("user_indices")) if torch.is_grad_enabled() else None,
        with_kwargs=True,
        prepend=True,
    )
    trainer.train()
    user_pass, generic_pass = seen  # the reference is another model here, and packing is checked without gradients
    assert set(user_pass.tolist()) == {1, 2}
    assert set(generic_pass.tolist()) == {0}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_fused_head_calls_the_backbone_as_a_module(make_trainer, lora):
    """Our hooks live there. TRL scores `last_hidden_state[:, :-1]` against the labels of the next tokens."""
    trainer = make_trainer(lora=lora)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "user_indices")}
    fused = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs
    logits = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    expected = (
        logits.gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1).masked_fill(labels[:, 1:] == -100, 0)
    )
    torch.testing.assert_close(fused, expected)


def test_batches_are_chosen_then_rejected():
    batch = DataCollatorForPreference(pad_token_id=0)([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}])
    assert batch["input_ids"].tolist() == [[1, 2], [1, 3]]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}

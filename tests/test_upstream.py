"""What we rely on in TRL, transformers and PEFT. When a test here fails, read their changes first."""

import ast
import re
from collections import Counter
from inspect import getsource, signature
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from huggingface_hub import ModelHubMixin
from transformers import PreTrainedModel, Trainer
from transformers.utils.hub import cached_files
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import trl_personal
from trl_personal import IndividualUserModel, PersonalizedDPOTrainer, UserModelConfig


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
    "predict",
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
    trainer = make_trainer(precompute_ref_log_probs=True)
    trainer.predict(trainer.train_dataset)
    assert set(calls) == set(OVERRIDDEN), f"no longer called: {set(OVERRIDDEN) - set(calls)}"


def test_private_state_we_touch(make_trainer):
    trainer = make_trainer(user_model_kind="none")
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._metrics["train"]["never seen"] == []
    assert trainer._total_train_tokens == 0
    assert trainer.precompute_ref_logps is False
    assert trainer._tokenizer.pad_token == "<pad>"
    assert trainer._is_vision_dataset is False
    assert trainer.aux_loss_enabled is False
    assert trainer.ld_alpha is None
    trainer._set_signature_columns_if_needed()
    assert isinstance(trainer._signature_columns, list)
    assert DPOTrainer._name == "DPO"
    assert PreTrainedModel._keys_to_ignore_on_save is None
    assert trainer.model.config._attn_implementation == "sdpa"
    assert isinstance(trainer._prepare_inputs({"x": torch.ones(1)})["x"], torch.Tensor)
    assert {name for name in signature(cached_files).parameters if name.startswith("_raise")} == {
        "_raise_exceptions_for_gated_repo",
        "_raise_exceptions_for_missing_entries",
        "_raise_exceptions_for_connection_errors",
    }


def test_the_hash_of_the_model_is_the_key_of_precomputed_references(make_trainer, preferences):
    """TRL keeps them in a file named by `_precompute_model_hash`, unless that is set, and the dataset's `_fingerprint`."""
    trainer = make_trainer(user_model_kind="none", precompute_ref_log_probs=True)
    source = getsource(DPOTrainer._precompute_ref_logps)
    assert trainer._precompute_model_hash
    assert "self._precompute_model_hash" in source
    assert "dataset._fingerprint" in source


def test_a_user_model_writes_no_config_of_the_hubs(tmp_path):
    user_model = IndividualUserModel(UserModelConfig(num_users=1, num_virtual_tokens=2, token_dim=4))
    assert "_hub_mixin_config" in getsource(ModelHubMixin.save_pretrained)
    user_model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_list_of_private_names_in_the_documentation_is_complete():
    """Every private attribute in the package that is neither defined nor set there belongs to somebody else."""
    used, own = set(), set()
    for path in Path(trl_personal.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Attribute):
                is_set_here = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
                (own if is_set_here else used).add(node.attr)
            elif isinstance(node, ast.keyword):
                used.add(node.arg or "")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used |= {*node.module.split("."), *(alias.name for alias in node.names)}
    upstream = {*dir(DPOTrainer), *dir(PreTrainedModel), *vars(Dataset), "_fingerprint", "_precompute_model_hash"}
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    theirs = private - own | {name for name in used | own if name.startswith("_") and name in upstream}
    theirs |= {"_hub_mixin_config"} | {"_metrics", "_total_train_tokens", "_tokenizer"}
    theirs = {name for name in theirs if not name.startswith("__")}
    page = (ROOT / "docs" / "how_it_works.md").read_text().split("## What of others we depend on")[1]
    assert theirs == set(re.findall(r"`(_[a-zA-Z_]+)`", page))


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

"""Names of metrics in trackers, and what `push_to_hub` uploads. A local folder stands in for the hub."""

import shutil

import pytest
import torch
import transformers.trainer
from huggingface_hub import CommitInfo, ModelCard
from transformers.integrations.integration_utils import rewrite_logs

from trl_personal import AutoPersonalizedModelForCausalLM


REWARDS = {f"rewards/{name}" for name in ("accuracies", "chosen", "rejected", "margins")}


def test_metrics_group_by_term_and_phase(make_trainer, preferences):
    """As tensorboard and wandb show them: `train/...` and `eval/...`, the generic user's and the users' under their own."""
    trainer = make_trainer(eval_strategy="steps", eval_steps=2, trainer_kwargs={"eval_dataset": preferences})
    trainer.train()
    names = set().union(*(rewrite_logs(log) for log in trainer.state.log_history))
    for phase in ("train", "eval"):
        assert {f"{phase}/{name}" for name in REWARDS} <= names
        assert {f"{phase}/generic/{name}" for name in REWARDS} <= names
    assert {n for n in names if "users/" in n} == {
        "eval/users/accuracy_mean", "eval/users/accuracy_worst", "eval/users/accuracy_swapped",
    }  # fmt: skip
    own = {n.removeprefix("train/") for n in names if n.startswith("train/") and "/generic/" not in n}
    generic = {n.removeprefix("train/generic/") for n in names if n.startswith("train/generic/")}
    assert generic <= own
    assert own - generic >= {"loss", "grad_norm", "learning_rate", "num_tokens"}


@pytest.mark.parametrize("number_of_users", [2, 8])
def test_number_of_curves_does_not_grow_with_users(make_trainer, preferences, number_of_users):
    many = preferences.map(lambda row, i: {"user_id": f"user {i % number_of_users}"}, with_indices=True)
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, trainer_kwargs={"train_dataset": many, "eval_dataset": many}
    )
    trainer.train()
    assert len(set().union(*trainer.state.log_history)) == 59


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_tracker_files_are_written(make_trainer, tmp_path, monkeypatch, tracker):
    pytest.importorskip(tracker)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    make_trainer(report_to=tracker).train()
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_push_to_hub_makes_a_repository_that_loads_with_its_users(make_trainer, monkeypatch, tmp_path, lora):
    repository = tmp_path / "hub"

    class Api:
        def upload_folder(self, folder_path, ignore_patterns, **kwargs):
            shutil.copytree(
                folder_path, repository, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True
            )
            return CommitInfo(
                commit_url="https://huggingface.co/me/mine/commit/1", commit_message="", commit_description="", oid=""
            )

    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    monkeypatch.setattr(
        transformers.Trainer, "init_hf_repo", lambda self, **kwargs: setattr(self, "hub_model_id", "me/mine")
    )
    trainer = make_trainer("llama", lora, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert not list(repository.glob("checkpoint-*"))
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(repository)
    trainer.model.eval()
    ids, users = torch.tensor([[1, 4, 5], [1, 6, 7]]), torch.tensor([1, 2])
    torch.testing.assert_close(loaded(ids, user_indices=users).logits, trainer.model(ids, user_indices=users).logits)
    card = ModelCard.load(repository / "README.md")
    assert 'name = "me/mine"' in card.text
    assert {"trl-personal", "p-dpo", "dpo"} <= set(card.data.tags)

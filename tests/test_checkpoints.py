"""Saving, loading, resuming and the best model, as one set: the language model and its users stay together."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from families import make_family
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_soft_prompt import personalize
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_personal import (
    AutoPersonalizedModelForCausalLM,
    IndividualUserModel,
    UserModel,
    UserModelConfig,
    UserVocab,
)
from trl_personal.models.folder_checks import check_fingerprints


BOTH = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


class Kill(TrainerCallback):
    """Stands for a kill: leaves `train` in the middle of step `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def states(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@BOTH
def test_folder_holds_the_language_model_as_upstream_writes_it_and_the_users_beside(make_trainer, tmp_path, lora):
    trainer = make_trainer(lora=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {str(path.relative_to(tmp_path / "final")) for path in (tmp_path / "final").rglob("*") if path.is_file()}
    lm_files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files == {
        *(lm_files if lora else {"config.json", "generation_config.json", "model.safetensors"}),
        "user_model/user_model_config.json",
        "user_model/user_model.safetensors",
        "user_model/users.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.bin",
        "training_settings.json",
    }
    weights = load_file(tmp_path / "final" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert not [name for name in weights if "user" in name]
    assert json.loads((tmp_path / "final/user_model/users.json").read_text()) == {"ann": 1, "bo": 2}
    if not lora:
        assert json.loads((tmp_path / "final/config.json").read_text())["architectures"] == ["GPTJForCausalLM"]


@BOTH
def test_plain_loading_gives_the_unpersonalized_model(make_trainer, tmp_path, model_dirs, lora, caplog):
    trainer = make_trainer(lora=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    if lora:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dirs["gptj"]), tmp_path / "final")
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        assert "user_model" not in caplog.text
    ids = torch.tensor([[3, 4, 5]])
    trainer.model.eval()
    torch.testing.assert_close(plain.eval()(ids).logits, trainer.model(ids).logits)


@BOTH
def test_save_and_load_gives_the_same_model(make_trainer, tmp_path, lora):
    trainer = make_trainer("llama", lora=lora, user_model_kind="cluster", num_clusters=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final")
    assert type(loaded).__name__ == ("PeftModelForCausalLM" if lora else "LlamaForCausalLM")
    assert list(loaded.user_vocab) == ["ann", "bo"]
    ids, users = torch.tensor([[1, 4, 5], [4, 5, 6], [1, 2, 3]]), torch.tensor([1, 2, 0])
    trainer.model.eval()
    assert torch.equal(loaded(ids, user_indices=users).logits, trainer.model(ids, user_indices=users).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids, user_indices=users).logits, loaded(ids, user_indices=users).logits)


def test_position_of_the_soft_prompt_is_saved_with_the_model(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final/user_model/user_model_config.json").read_text())
    assert config["bos_token_id"] == 1
    (tmp_path / "final/config.json").write_text(
        json.dumps(json.loads((tmp_path / "final/config.json").read_text()) | {"bos_token_id": 7})
    )
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final")
    ids, users = torch.tensor([[1, 4, 5]]), torch.tensor([1])
    trainer.model.eval()
    assert torch.equal(loaded(ids, user_indices=users).logits, trainer.model(ids, user_indices=users).logits)


def test_position_of_the_soft_prompt_is_that_of_the_tokenizers_bos(make_trainer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "short"  # 3; the model's config says 1
    trainer = make_trainer(trainer_kwargs={"processing_class": tokenizer})
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final/user_model/user_model_config.json").read_text())
    assert config["bos_token_id"] == 3


@BOTH
@pytest.mark.parametrize("step", [1, 4])
def test_kill_and_resume_equal_the_uninterrupted_run(make_trainer, make_args, tmp_path, lora, step):
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "user_learning_rate": 0.05,
        "weight_decay": 0.1,
    }
    straight = make_trainer(lora=lora, **settings | {"output_dir": str(tmp_path / "straight")})
    straight.train()
    killed = make_trainer(lora=lora, **settings)
    killed.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(lora=lora, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_equal_states(states(resumed), states(straight))
    losses = [[log.get("loss") for log in run.state.log_history[:-1]] for run in (resumed, straight)]
    assert losses[0] == losses[1]


def test_resuming_restores_the_users_and_not_only_the_language_model(make_trainer):
    trained = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trained.train()
    resumed = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    assert not torch.equal(resumed.user_model.generic_prompt, trained.user_model.generic_prompt)
    resumed.train(resume_from_checkpoint=True)  # nothing left to do
    assert_equal_states(states(resumed), states(trained))


def test_a_checkpoint_cut_off_is_passed_over_with_a_warning(make_trainer, tmp_path, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(**settings)
    straight.train()
    for name, content in (("checkpoint-4", None), ("checkpoint-3", '{"cut": ')):
        path = tmp_path / "out" / name / "trainer_state.json"
        path.unlink() if content is None else path.write_text(content)
    resumed = make_trainer(**settings)
    with caplog.at_level(logging.WARNING, "trl_personal"):
        resumed.train(resume_from_checkpoint=True)
    assert [record.args[0].name for record in caplog.records] == ["checkpoint-4", "checkpoint-3"]
    assert_equal_states(states(resumed), states(straight))


def test_the_last_checkpoint_is_the_one_with_the_highest_number(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(**settings).train()
    for step, number in ((1, 9), (2, 10)):
        (tmp_path / f"out/checkpoint-{step}").rename(tmp_path / f"out/checkpoint-{number}")

    class NoStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise AssertionError("there was a step to train after the last checkpoint")

    resumed = make_trainer(**settings)
    resumed.add_callback(NoStep())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("damage", ["no checkpoint", "cut off", "state missing"])
def test_resuming_without_any_whole_checkpoint_starts_afresh_and_says_so(make_trainer, tmp_path, caplog, damage):
    settings = {"save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(**settings)
    straight.train()
    expected = {name: value.clone() for name, value in straight.model.state_dict().items()}
    state = tmp_path / "out/checkpoint-2/trainer_state.json"
    if damage == "no checkpoint":
        shutil.rmtree(tmp_path / "out")
    elif damage == "cut off":
        state.write_text(state.read_text()[:50])
    else:
        state.unlink()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    assert "There is no whole checkpoint" in caplog.text
    assert "training starts afresh" in caplog.text
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_second_run_in_the_same_folder_stops_and_touches_nothing(make_trainer, tmp_path):
    """While the first one trains: two would replace and delete each other's checkpoints."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    found = []

    class StartAnother(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
            with pytest.raises(RuntimeError, match="Another run is training in .*give this one another `output_dir`"):
                make_trainer(**settings).train()
            after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
            found.append(after.keys() - before.keys() | before.keys() - after.keys())

    make_trainer(**settings, trainer_kwargs={"callbacks": [StartAnother()]}).train()
    assert found == [set(), set()]
    assert not list((tmp_path / "out").glob(".*lock"))
    make_trainer(**settings).train()  # afterwards the folder is free


def test_a_run_that_starts_afresh_tells_of_the_checkpoints_of_another(make_trainer, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**settings).train()
    assert "earlier run" not in caplog.text
    make_trainer(**settings).train()
    assert "holds 2 checkpoints of an earlier run" in caplog.text


def test_resuming_a_plain_checkpoint_or_other_users_is_refused(make_trainer, preferences, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**settings).train()
    renamed = preferences.map(lambda row: {"user_id": row["user_id"] + "!"})
    with pytest.raises(ValueError, match="trained on 2 users, this run has 2, or another order"):
        make_trainer(**settings, trainer_kwargs={"train_dataset": renamed}).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "out/checkpoint-2/user_model")
    with pytest.raises(ValueError, match="no `user_model/` folder: it is not a checkpoint of personalized training"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


@BOTH
def test_best_model_brings_back_language_model_and_users_of_the_same_step(make_trainer, preferences, tmp_path, lora):
    trainer = make_trainer(
        lora=lora,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls, so the best is the first and not the last
        trainer_kwargs={"eval_dataset": preferences},
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    best = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-1")
    last = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-3")
    for name, tensor in trainer.user_model.state_dict().items():
        assert torch.equal(tensor, best.user_model.state_dict()[name])
        assert not torch.equal(tensor, last.user_model.state_dict()[name])
    ids = torch.tensor([[3, 4, 5]])
    trainer.model.eval()
    assert torch.equal(trainer.model(ids).logits, best(ids).logits)
    assert not torch.equal(trainer.model(ids).logits, last(ids).logits)


@BOTH
def test_training_goes_on_from_a_folder_and_new_users_are_appended(make_trainer, preferences, tmp_path, lora):
    first = make_trainer(lora=lora)
    first.train()
    first.save_model(str(tmp_path / "first"))
    more = Dataset.from_list([*preferences, {**preferences[0], "user_id": "cy"}, {**preferences[1], "user_id": "dee"}])
    second = make_trainer(trainer_kwargs={"model": str(tmp_path / "first"), "train_dataset": more})
    assert list(second.user_vocab) == ["ann", "bo", "cy", "dee"]
    everyone = torch.arange(5)
    soft_prompts = second.user_model(everyone)
    assert torch.equal(soft_prompts[:3], first.user_model(everyone[:3]))
    assert torch.equal(soft_prompts[3:], soft_prompts[:1].expand(2, -1, -1))
    ids = torch.tensor([[3, 4, 5]])
    first.model.eval(), second.model.eval()
    torch.testing.assert_close(second.model(ids).logits, first.model(ids).logits)
    second.train()
    assert not torch.equal(second.user_model(everyone)[3], second.user_model(everyone)[0])


def test_known_users_keep_their_soft_prompts_where_new_data_has_another_order(make_trainer, preferences, tmp_path):
    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "first"))
    rows = Dataset.from_list([{**preferences[0], "user_id": "cy"}, preferences[1], preferences[0]])
    second = make_trainer(trainer_kwargs={"model": str(tmp_path / "first"), "train_dataset": rows})
    assert list(second.user_vocab) == ["ann", "bo", "cy"]
    for user_id in ("ann", "bo"):
        was, now = (
            trainer.user_model(torch.tensor(trainer.user_vocab.encode([user_id]))) for trainer in (first, second)
        )
        assert torch.equal(was, now)


def test_training_goes_on_from_a_loaded_model(make_trainer, tmp_path, tokenizer):
    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "first"))
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "first")
    second = make_trainer(trainer_kwargs={"model": loaded, "processing_class": tokenizer})
    assert second.user_model is not None
    assert torch.equal(second.user_model(torch.arange(3)), first.user_model(torch.arange(3)))


def test_a_folder_of_another_kind_or_length_is_refused(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "first"))
    model = {"model": str(tmp_path / "first")}
    with pytest.raises(
        ValueError, match="`user_model_kind` is 'cluster' in the arguments, but 'individual' in the user"
    ):
        make_trainer(user_model_kind="cluster", trainer_kwargs=model)
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 5 in the arguments, but 3 in the user model"):
        make_trainer(num_virtual_tokens=5, trainer_kwargs=model)


def test_two_user_models_at_once_are_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "first"))
    user_model = UserModel.from_pretrained(tmp_path / "first/user_model")
    with pytest.raises(ValueError, match="There are two user models"):
        make_trainer(trainer_kwargs={"model": str(tmp_path / "first"), "user_model": user_model})


def test_a_pretrained_user_model_can_be_passed(make_trainer, tmp_path, make_args):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "first"))
    user_model = UserModel.from_pretrained(tmp_path / "first/user_model")
    vocab = UserVocab.from_pretrained(tmp_path / "first/user_model")
    other = make_trainer("llama", trainer_kwargs={"user_model": user_model, "user_vocab": vocab})
    assert other.user_model is user_model
    assert torch.equal(other.user_model(torch.arange(3)), trainer.user_model(torch.arange(3)))
    with pytest.raises(ValueError, match="`user_model` has rows for 2 users, the vocabulary has 3"):
        make_trainer(trainer_kwargs={"user_model": user_model, "user_vocab": ["a", "b", "c"]})
    with pytest.raises(
        ValueError, match="`user_model_kind` is 'cluster' in the arguments, but 'individual' in `user_model`"
    ):
        make_trainer(user_model_kind="cluster", trainer_kwargs={"user_model": user_model, "user_vocab": vocab})


@pytest.mark.parametrize("best", [False, True], ids=["resumed", "best"])
def test_weights_that_transformers_saves_under_other_names_come_back(make_trainer, preferences, tmp_path, best):
    make_family("mixtral").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "trainer_kwargs": {"model": str(tmp_path / "model"), "eval_dataset": preferences},
    }
    trained = make_trainer(**settings)
    trained.train()
    if best:
        other = make_trainer(**settings, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
        other.state.best_model_checkpoint = str(tmp_path / "out/checkpoint-2")
        other._load_best_model()
    else:
        other = make_trainer(**settings)
        other.train(resume_from_checkpoint=True)  # nothing left to do
    expected = trained.model.state_dict()
    assert [name for name in expected if "experts" in name]
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# --- Files of two saves, broken files ---------------------------------------------------------------------------------


@BOTH
def test_weights_of_another_save_are_refused(make_trainer, tmp_path, lora):
    trainer = make_trainer(lora=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "old"))
    trainer.model.get_input_embeddings().weight.data.add_(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora" in name:
            parameter.data.add_(1)
    trainer.save_model(str(tmp_path / "new"))
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    shutil.copy(tmp_path / "new" / name, tmp_path / "old" / name)
    with pytest.raises(ValueError, match=f"{name} is not the file that the user model.*parts of two saves"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "old")


def test_a_folder_without_users_is_refused_with_a_hint(model_dirs):
    with pytest.raises(ValueError, match="has no `user_model/` folder.*AutoModelForCausalLM.*PersonalizedDPOTrainer"):
        AutoPersonalizedModelForCausalLM.from_pretrained(model_dirs["gptj"])


def test_a_user_model_of_another_width_is_refused(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "out"))
    path = tmp_path / "out/user_model/user_model_config.json"
    config = json.loads(path.read_text())
    IndividualUserModel(UserModelConfig(2, 3, 16)).save_files(
        tmp_path / "out/user_model", language_model_files=config["language_model_files"]
    )
    with pytest.raises(ValueError, match="width 16.*width 32"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out")


def test_vocabulary_of_another_size_is_refused(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "out"))
    UserVocab(["ann"]).save_pretrained(tmp_path / "out/user_model")
    with pytest.raises(ValueError, match="rows for 2 users, the vocabulary has 1"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_failed_save_leaves_the_old_files(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "final"))
    before = {path: path.read_bytes() for path in (tmp_path / "final").rglob("*") if path.is_file()}
    trainer.model.get_input_embeddings().weight.data.add_(1)
    monkeypatch.setattr(UserModel, "save_files", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.model.save_pretrained(tmp_path / "final")
    after = {path: path.read_bytes() for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert after == before


def test_saving_a_merged_model_over_its_adapter_leaves_no_adapter_behind(make_trainer, tmp_path):
    trainer = make_trainer(lora=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final/adapter_model.safetensors").exists()
    assert (tmp_path / "final/model.safetensors").exists()


def test_weights_that_are_gone_are_noticed(tmp_path):
    with pytest.raises(ValueError, match="model.safetensors is not the file that the user model"):
        check_fingerprints(tmp_path, {"format_version": 1, "language_model_files": {"model.safetensors": "0" * 64}})


def test_training_does_not_go_on_with_a_vocabulary_of_another_size(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "first"))
    UserVocab(["ann", "bo", "cy"]).save_pretrained(tmp_path / "first/user_model")
    with pytest.raises(ValueError, match="rows for 2 users, the vocabulary has 3"):
        make_trainer(trainer_kwargs={"model": str(tmp_path / "first")})


def test_training_goes_on_and_resumes_from_one_save_only(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(**settings)
    trainer.train()
    checkpoint = tmp_path / "out/checkpoint-2"
    make_trainer(trainer_kwargs={"model": str(checkpoint)})
    personalize(make_model(seed=1)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="parts of two saves"):
        make_trainer(trainer_kwargs={"model": str(checkpoint)})
    with pytest.raises(ValueError, match="parts of two saves"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


def test_training_resumes_on_the_base_model_it_began_with(make_trainer, model_dirs, tmp_path):
    shutil.copytree(model_dirs["gptj"], tmp_path / "base")
    settings = {"save_strategy": "steps", "save_steps": 2, "trainer_kwargs": {"model": str(tmp_path / "base")}}
    make_trainer(lora=True, **settings).train()
    make_trainer(lora=True, **settings).train(resume_from_checkpoint=True)
    make_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="of the base model .* is not the file that the adapter .* was trained on"):
        make_trainer(lora=True, **settings).train(resume_from_checkpoint=True)


def test_users_that_the_caller_gathered_are_those_written(tmp_path):
    model = personalize(make_model())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.user_model.user_offsets.weight[1:], model.user_model.user_offsets.weight[1:] + 1)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight + 1)


# --- Model card, hub --------------------------------------------------------------------------------------------------


@BOTH
def test_model_card_cites_the_paper_and_shows_how_to_use_users(make_trainer, tmp_path, lora):
    trainer = make_trainer(lora=lora)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert {"trl", "dpo", "trl-personal"} <= set(card.data.tags)
    assert "arXiv:2402.05133" in card.text
    assert "AutoPersonalizedModelForCausalLM" in card.text
    assert "2\nusers" in card.text or "2 users" in card.text
    assert "ann" not in card.text.split()  # no user is named in a public card
    assert "None" not in card.text
    assert 'name = "out"' in card.text
    assert 'model="out"' in card.text  # TRL's own lines
    assert str(tmp_path) not in card.text


def test_push_to_hub_uploads_the_users_too(make_trainer, monkeypatch, tmp_path):
    """A local folder stands in for the hub."""
    import transformers.utils.hub as hub

    uploaded = tmp_path / "hub"

    class Repository:
        repo_id = "me/mine"

    class Api:
        def create_repo(self, *args, **kwargs):
            return Repository()

        def create_commit(self, repo_id, operations, **kwargs):
            for operation in operations:
                target = uploaded / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, target)

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("---\n---\n# mine"))
    trainer = make_trainer()
    trainer.train()
    trainer.model.push_to_hub("me/mine")
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(uploaded)
    assert torch.equal(loaded.user_model(torch.arange(3)), trainer.user_model(torch.arange(3)))


def test_adapter_with_a_reference_copy_is_saved_and_loaded(make_trainer, model_dirs, tmp_path, tokenizer):
    """A `PeftModel` passed in: TRL keeps a frozen copy of its adapter, "ref", as the reference."""
    base = AutoModelForCausalLM.from_pretrained(model_dirs["gptj"])
    peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    trainer = make_trainer(trainer_kwargs={"model": peft_model, "processing_class": make_tokenizer()})
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final")
    ids, users = torch.tensor([[4, 5, 6]]), torch.tensor([2])
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids, user_indices=users).logits, trainer.model(ids, user_indices=users).logits)

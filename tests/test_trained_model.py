"""A trained folder, scored: the numbers are those of the trainer that trained it."""

import gc
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from trl import DPOTrainer

from trl_personal.evaluation.scoring import score_pairs
from trl_personal.evaluation.trained_model import (
    PAIRS,
    make_scoring_trainer,
    read_log_history,
    temporary_arguments,
)
from trl_personal.training.settings import check_settings_file, read_training_settings


SETTINGS = {"beta": 0.3, "max_length": 12, "ld_alpha": 0.5, "max_steps": 3, "learning_rate": 0.02}


@pytest.fixture
def saved(make_trainer, tmp_path):
    def save(**kwargs):
        trainer = make_trainer(**SETTINGS, **kwargs)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        trainer.save_state()
        return trainer, str(tmp_path / "out")

    return save


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_loaded_folder_scores_as_the_trainer_did(saved, preferences, model_dirs, lora):
    trainer, folder = saved(lora=lora, per_device_eval_batch_size=8)
    with_unknown = preferences.from_list([*preferences, {**preferences[0], "user_id": "zoe"}])
    expected = score_pairs(trainer, with_unknown)
    loaded = make_scoring_trainer(
        folder, with_unknown, read_training_settings(folder), ref_model=None if lora else model_dirs["gptj"]
    )
    found = score_pairs(loaded, PAIRS)
    assert list(loaded.user_vocab) == ["ann", "bo"]
    for name in ("own", "generic", "swapped"):
        np.testing.assert_allclose(found.margins[name], expected.margins[name], atol=1e-5)
    assert np.abs(found.margins["own"]).min() > 1e-3  # the reference is not the trained policy
    for name in ("eval_loss", "eval_rewards/margins", "eval_generic/rewards/accuracies"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], abs=1e-5)


def test_a_folder_without_users_is_scored_too(saved, preferences):
    trainer, folder = saved(lora=True, user_model_kind="none")
    expected = score_pairs(trainer, preferences)
    loaded = make_scoring_trainer(folder, preferences, read_training_settings(folder))
    np.testing.assert_allclose(score_pairs(loaded, PAIRS).margins["own"], expected.margins["own"], atol=1e-5)


@pytest.mark.parametrize("kind", ["individual", "none"])
def test_each_held_out_pair_is_tokenized_once(saved, preferences, monkeypatch, kind):
    """By the scoring trainer; two rows more make its train dataset, which the trainer insists on."""
    _, folder = saved(lora=True, user_model_kind=kind)
    prepared = []
    prepare = DPOTrainer._prepare_dataset

    def count(self, dataset, *args):
        prepared.append(len(dataset))
        return prepare(self, dataset, *args)

    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", count)
    loaded = make_scoring_trainer(folder, preferences, read_training_settings(folder))
    score_pairs(loaded, PAIRS)
    assert prepared == [2, 8]


def test_rows_whose_prompt_is_too_long_are_left_out_even_if_they_come_first(saved, preferences):
    _, folder = saved(lora=True)
    long = {**preferences[0], "prompt": " ".join(["please"] * 12)}
    loaded = make_scoring_trainer(folder, preferences.from_list([long, *preferences]), read_training_settings(folder))
    assert score_pairs(loaded, PAIRS).rows.tolist() == list(range(1, 9))


def test_rows_that_do_not_fit_the_positions_of_the_model_are_refused(saved, preferences):
    _, folder = saved(lora=True)
    long = {**preferences[0], "chosen": " " + " ".join(["yes"] * 62)}
    with pytest.raises(ValueError, match="The model has 64 positions, but a row can need"):
        make_scoring_trainer(folder, preferences.from_list([*preferences, long]), {"max_length": 100})


def test_a_full_model_needs_its_reference(saved, preferences):
    _, folder = saved()
    with pytest.raises(ValueError, match="relative to that one. Name it with `--ref_model`"):
        make_scoring_trainer(folder, preferences, {})


def test_settings_and_log_of_a_folder(saved, tmp_path):
    _, folder = saved(gradient_accumulation_steps=2)
    found = read_training_settings(folder)
    assert {name: found[name] for name in SETTINGS} == SETTINGS
    assert (found["gradient_accumulation_steps"], found["user_id_column"], found["loss_type"]) == (
        2,
        "user_id",
        ["sigmoid"],
    )
    assert [entry["step"] for entry in read_log_history(folder)] == [1, 2, 3, 3]
    assert read_training_settings(tmp_path) == {}
    assert read_log_history(tmp_path) == []


class Command:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [{"args": Command()}, 1], ids=["command", "number"])
def test_a_pickle_is_not_read_and_the_settings_to_give_are_named(tmp_path, capsys, caplog, content):
    torch.save(content, tmp_path / "training_args.bin")
    with caplog.at_level(logging.WARNING, logger="trl_personal"):
        assert read_training_settings(tmp_path) == {}
    assert "--beta`, `--max_length`" in caplog.text
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(1)[:-1])
    assert read_training_settings(tmp_path) == {}
    assert "this must not run" not in capsys.readouterr().out


def test_two_evaluations_on_one_machine_have_folders_of_their_own():
    arguments = temporary_arguments(use_cpu=True), temporary_arguments(use_cpu=True)
    first, second = (Path(args.output_dir) for args in arguments)
    assert first != second
    assert first.is_dir()
    assert not [*first.iterdir(), *second.iterdir()]
    del arguments
    gc.collect()
    assert not first.exists()
    assert not second.exists()


def test_settings_are_read_without_the_pickle_beside_them(saved, tmp_path):
    _, folder = saved(max_grad_norm=float("inf"), lr_scheduler_type="cosine", user_model_kind="none")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"anything")
    found = read_training_settings(folder)
    assert (found["beta"], found["max_grad_norm"], found["lr_scheduler_type"]) == (0.3, float("inf"), "cosine")


def test_processes_count_as_gradient_accumulation(saved, tmp_path):
    _, folder = saved(gradient_accumulation_steps=2)
    path = tmp_path / "out" / "training_settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_processes": 4}))
    assert read_training_settings(folder)["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    "edit",
    [
        {"format_version": 2},
        {"num_processes": 0},
        {"num_processes": True},
        {"settings": []},
        {"settings": {"beta": "0.1"}},
        {"settings": {"loss_type": "sigmoid"}},
        {"settings": {"loss_type": [1]}},
        {"settings": {"max_steps": 1.5}},
        {"settings": {"bf16": 1}},
        {"settings": {"user_id_column": None}},
        {"settings": {"optim": {"float": "inf"}}},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_the_name_of_the_file(tmp_path, edit):
    path = tmp_path / "training_settings.json"
    path.write_text(json.dumps({"format_version": 1, "num_processes": 1, "settings": {"beta": 0.1}} | edit))
    with pytest.raises(ValueError, match=r"training_settings\.json"):
        check_settings_file(path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"settings": {"beta": NaN}}', "{" * 10_000, '{"a": 1, "a": 2}'], ids=range(5)
)
def test_settings_that_are_no_json_are_refused_by_the_name_of_the_file(tmp_path, text):
    (tmp_path / "training_settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"training_settings\.json"):
        read_training_settings(tmp_path)

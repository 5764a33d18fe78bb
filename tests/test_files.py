"""A kill or a full disk leaves old files or new ones, and a mixture of two saves is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_model
from test_soft_prompt import ANN, IDS, personalize
from transformers import AutoModelForCausalLM

from trl_personal import AutoPersonalizedModelForCausalLM, UserModel, UserVocab, attach_user_model, files


@pytest.fixture
def two_saves():
    """The models `old` and `new`, which differ in language model and users."""
    old, new = personalize(make_model()), personalize(make_model(seed=1))
    new.user_model.generic_prompt.data.add_(1)
    return {"old": old, "new": new}


def test_a_save_killed_between_any_two_files_is_old_or_refused_or_new(two_saves, tmp_path, monkeypatch):
    replace, outcomes = os.replace, []
    while outcomes[-1:] != ["new"]:
        shutil.rmtree(tmp_path / "final", ignore_errors=True)
        two_saves["old"].save_pretrained(tmp_path / "final")
        left = [len(outcomes)]

        def kill(source, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", kill)
            try:
                two_saves["new"].save_pretrained(tmp_path / "final")
            except KeyboardInterrupt:
                pass
        try:
            loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final")
        except ValueError as error:
            if "parts of two saves" not in str(error):
                raise
            outcomes.append("refused")
            continue
        (same,) = (
            name
            for name, model in two_saves.items()
            if torch.equal(loaded(IDS, user_indices=ANN).logits, model(IDS, user_indices=ANN).logits)
        )
        outcomes.append(same)
    assert set(outcomes) == {"old", "refused", "new"}
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)


def test_a_file_is_as_it_was_if_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "users.json"
    UserVocab(["ann"]).save_pretrained(tmp_path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full_disk)
        with pytest.raises(OSError, match="disk full"):
            UserVocab(["somebody else", "bo"]).save_pretrained(tmp_path)
    assert path.read_bytes() == before


def test_fingerprint_of_a_large_file_has_blocks_from_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE_BYTES", 4)
    monkeypatch.setattr(files, "NUM_SAMPLES", 4)
    path = tmp_path / "model.safetensors"
    content = bytes(64)
    seen = set()
    for position in (None, 0, 21, 42, 63):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        path.write_bytes(changed)
        seen.add(files.fingerprint(path))
    path.write_bytes(content + bytes(1))
    seen.add(files.fingerprint(path))
    assert len(seen) == 6


def test_a_save_removes_what_a_kill_has_left_and_nothing_of_one_that_still_writes(tmp_path):
    with files.staged_folder(tmp_path, last="z") as first:
        (first / "a").write_text("first")
        code = "import sys; from pathlib import Path; from trl_personal.files import staged_folder\n"
        code += "with staged_folder(Path(sys.argv[1]), 'z') as other: (other / 'b').write_text('second')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)  # another process, in the meantime
        assert (first / "a").read_text() == "first"
        left = tmp_path / ".saving-left"
        left.mkdir()
        (left / files.STAGING_LOCK).touch()  # nobody holds it any more
        (left / "c").write_text("half")
    with files.staged_folder(tmp_path, last="z"):
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_file_that_names_the_others_takes_its_place_last(tmp_path, monkeypatch):
    """Readers between two files see the old list of fingerprints, which refuses, never a new one of files not there yet."""
    placed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: placed.append(target.name) or replace(source, target))
    with files.staged_folder(tmp_path, last="b") as folder:
        for name in "cba":
            (folder / name).write_text(name)
    assert placed == ["a", "c", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_user_model_is_replaced_by_attaching_it_and_saving_all(two_saves, tmp_path):
    """The documented way to combine parts of two saves on purpose; a copy of the files is refused."""
    two_saves["old"].save_pretrained(tmp_path / "old")
    two_saves["new"].save_pretrained(tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    users = tmp_path / "new/user_model"
    attach_user_model(model, UserModel.from_pretrained(users), UserVocab.from_pretrained(users))
    model.save_pretrained(tmp_path / "combined")
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "combined")
    assert torch.equal(loaded(IDS).logits, two_saves["old"](IDS).logits)
    assert torch.equal(loaded.user_model(ANN), two_saves["new"].user_model(ANN))
    shutil.copytree(users, tmp_path / "old/user_model", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="parts of two saves.*on purpose, use `attach_user_model`"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "old")


@pytest.mark.parametrize("alone", ["user_model", "user_vocab"])
def test_a_part_that_is_saved_alone_into_a_model_is_refused(two_saves, tmp_path, alone):
    two_saves["old"].save_pretrained(tmp_path)
    if alone == "user_model":
        two_saves["new"].user_model.save_pretrained(tmp_path / "user_model")
        UserModel.from_pretrained(tmp_path / "user_model")  # by itself it is whole
    else:
        UserVocab(["bo", "ann"]).save_pretrained(tmp_path / "user_model")
    with pytest.raises(ValueError, match="`attach_user_model`"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)


def test_a_user_model_alone_is_the_one_that_was_saved(two_saves, tmp_path):
    old, new = (two_saves[name].user_model for name in ("old", "new"))
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "old/user_model.safetensors", tmp_path / "new")
    with pytest.raises(ValueError, match="user_model.safetensors is not the file that was saved"):
        UserModel.from_pretrained(tmp_path / "new")


def test_a_generic_row_that_is_never_read_is_not_saved(two_saves, tmp_path):
    model = two_saves["old"]
    model.user_model.user_offsets.weight.data[0] = 7
    everyone = torch.arange(3)
    assert torch.equal(model.user_model(everyone)[0], model.user_model.generic_prompt)
    model.save_pretrained(tmp_path)
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.user_model(everyone), model.user_model(everyone))
    assert not loaded.user_model.user_offsets.weight[0].any()


def test_what_may_change_in_a_config_is_not_part_of_its_fingerprint(two_saves, tmp_path):
    two_saves["old"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": 5, "transformers_version": "6.0.0"}))
    assert AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 5
    path.write_text(json.dumps(config | {"rotary_dim": 2}))
    with pytest.raises(ValueError, match=r"config\.json is not the file that the user model"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_json_has_no_such_number(tmp_path, number):
    (tmp_path / "a.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(ValueError, match=f"a.json cannot be read \\({number} is no number in JSON"):
        files.read_json(tmp_path / "a.json")


def test_what_is_beside_a_folder_is_not_in_it(tmp_path, monkeypatch):
    (tmp_path / "runs" / "out").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = [files.beside(name, "-x").as_posix() for name in ("runs/out", "runs/out/", "owner/name", "runs")]
    assert found == ["runs/out-x", "runs/out-x", "name-x", "runs-x"]
    monkeypatch.chdir(tmp_path / "runs" / "out")
    assert files.beside(".", "-x") == tmp_path / "runs" / "out-x"
    assert files.beside("..", "-x") == tmp_path / "runs-x"

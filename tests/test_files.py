"""A kill or a full disk leaves old files or new ones, and a mixture of two saves is refused."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_model
from test_soft_prompt import ANN, IDS, personalize

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, files


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

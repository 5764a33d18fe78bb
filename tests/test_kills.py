"""`kill -9` at any moment: the next run goes on from a whole checkpoint or starts afresh and says so, to the same weights."""

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import killed_run
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from trl_personal.training.run_folder import checkpoint_to_resume


pytestmark = pytest.mark.slow
IN_FIRST, LATER, CHAIN = (
    16,
    24,
    4,
)  # kills while the first checkpoint is written, at any other moment, one after the other
SERVER = multiprocessing.get_context("forkserver")  # imports once, so that a run takes a second
SERVER.set_forkserver_preload(["killed_run"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "user_model/user_model.safetensors")


class Runs:
    """Starts runs in a folder, and kills them or waits for their end."""

    def __init__(self, model: str, root: Path) -> None:
        self.model, self.root = model, root
        self.number = 0

    def start(self, folder: Path) -> multiprocessing.process.BaseProcess:
        folder.mkdir(exist_ok=True)
        process = SERVER.Process(target=killed_run.run, args=(self.model, str(folder), str(self.log(folder))))
        process.start()
        return process

    def log(self, folder: Path) -> Path:
        return folder.with_suffix(".log")

    def finish(self, folder: Path) -> str:
        """Run to the end; returns what the run said."""
        process = self.start(folder)
        process.join(120)
        said = self.log(folder).read_text()
        assert process.exitcode == 0, said[-3000:]
        return said

    def kill(self, process: multiprocessing.process.BaseProcess) -> bool:
        """Whether there was something to kill."""
        was_alive = process.is_alive()
        process.kill()
        process.join()
        return was_alive


def resumes_or_says_so(runs: Runs, folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Run to the end; the weights are those of a run without a kill. Returns whether it started afresh."""
    began = any(folder.iterdir())
    whole = checkpoint_to_resume(folder)
    said = runs.finish(folder)
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if began:
        assert ("training starts afresh" in said) == (whole is None), said[-3000:]
    assert not list(folder.rglob(".saving-*"))
    shutil.rmtree(folder)
    return whole is None


def test_forty_kills_at_random_moments_end_in_the_same_weights(model_dirs, tmp_path, monkeypatch):
    """At least 15 of them hit the run while it writes its first checkpoint."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")  # the fork server imports from there
    runs, moments = Runs(model_dirs["gptj"], tmp_path), random.Random(0)
    runs.finish(tmp_path / "warm")
    began = time.monotonic()
    runs.finish(tmp_path / "straight")
    duration = time.monotonic() - began
    expected = weights(tmp_path / "straight")
    in_first = later = afresh = tries = 0
    writing = 0.05  # seconds, a guess that is corrected
    while in_first < IN_FIRST and tries < 4 * IN_FIRST:
        tries += 1
        folder = tmp_path / f"first-{tries}"
        process = runs.start(folder)
        while process.is_alive() and not (folder / "checkpoint-1").exists():
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, writing))
        assert runs.kill(process), runs.log(folder).read_text()[-3000:]
        hit = (folder / "checkpoint-1").exists() and not (folder / "checkpoint-1/trainer_state.json").exists()
        in_first += hit
        writing *= 1.2 if hit else 0.8
        if hit:
            afresh += resumes_or_says_so(runs, folder, expected)
    assert in_first == IN_FIRST >= 15
    for chain in range(4 * LATER // CHAIN):
        folder = tmp_path / f"later-{chain}"
        for _ in range(CHAIN):
            process = runs.start(folder)
            time.sleep(moments.uniform(0, duration))
            later += runs.kill(process)
        afresh += resumes_or_says_so(runs, folder, expected)
        if later >= LATER:
            break
    assert later >= LATER
    print(f"{in_first} kills in the first checkpoint (of {tries} tries), {later} later, {afresh} runs started afresh")

"""The paper's first task as an example: a few steps here, the whole run among the slow tests."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED_DATA


SCRIPT = ROOT / "examples" / "gptj_length.py"


def run(folder, *arguments, launcher=(sys.executable,)):
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") and str(ROOT), "COLUMNS": "80"}
    command = [*launcher, str(SCRIPT), "--output_dir", str(folder / "out"), "--num_threads", "1", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"trl-personal info {folder / 'out'}" in done.stdout.splitlines()  # a line, however narrow the terminal
    return done.stdout, json.loads((folder / "out/results.json").read_text())


FEW_STEPS = ("--sft_steps", "2", "--max_steps", "2", "--num_prompts", "2", "--max_new_tokens", "4")


@pytest.mark.slow
def test_a_few_steps_leave_every_file(tmp_path):
    printed, results = run(tmp_path, *FEW_STEPS, "--seed", "5")
    assert (tmp_path / "out/length_by_user.png").stat().st_size > 10_000
    assert (tmp_path / "out/user_model/users.json").is_file()
    assert (results["seed"], len(results["users"])) == (5, 10)
    assert set(results["versions"]) == {"trl_personal", "trl", "transformers", "peft", "torch"}
    assert {row["num_pairs"] for row in results["users"]} == {30}
    assert results["majority_share"] == pytest.approx(0.7)
    assert "user_01" in printed
    assert "generic user" in printed


def test_the_script_is_short_and_imports_nothing_private():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 150
    assert "import _" not in text


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data are not here")
def test_rows_of_real_workers_in_the_raw_schema(tmp_path):
    rows = SHARED_DATA / "ukpconvarg_workers/ukpconvarg_workers.tldr_schema.jsonl"
    _, results = run(tmp_path, *FEW_STEPS, "--dataset_path", str(rows))
    assert len(results["users"]) == 10
    assert {row["preference"] for row in results["users"]} == {"longer", "shorter"}


@pytest.mark.slow
def test_the_whole_run_by_accelerate(tmp_path):
    """What the README's table says, within the bounds that hold for other seeds too."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch")
    _, results = run(tmp_path, launcher=launcher)
    users = results["users"]
    groups = {name: [u for u in users if u["preference"] == name] for name in ("longer", "shorter")}
    own = [user["accuracy_own"] for user in users]
    assert min(own) >= 0.9
    assert sum(own) / len(own) >= 0.95
    assert max(user["accuracy_opposite"] for user in users) <= 0.15
    assert results["vanilla_accuracy"] <= results["majority_share"] + 0.05
    longer, shorter = ([user["mean_generated_length"] for user in groups[name]] for name in ("longer", "shorter"))
    assert sum(longer) / 7 >= 2 * sum(shorter) / 3
    assert min(longer) > max(shorter)
    assert max(user["empty_share"] for user in users) <= 0.1
    assert all(u["mean_generated_length"] >= u["mean_chosen_length"] / 3 for u in groups["shorter"])
    assert all(u["mean_generated_length"] <= 2 * u["mean_chosen_length"] for u in groups["longer"])

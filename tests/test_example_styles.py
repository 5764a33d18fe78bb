"""The paper's second and third task as examples: a few steps, the whole style run, and rows in the raw schemas."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, SHARED_DATA, load_example
from trl import ModelConfig

from trl_personal import PersonalizedDPOConfig


FEW_STEPS = ("--sft_steps", "2", "--max_steps", "2", "--num_prompts", "2", "--max_new_tokens", "4")
SCRIPTS = ["tulu_style", "prism_dialogue"]


def run(name, folder, *arguments):
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") and str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), "--output_dir", str(folder / "out"), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"trl-personal info {folder / 'out'}" in done.stdout.splitlines()  # a line, however narrow the terminal
    return done.stdout, json.loads((folder / "out/results.json").read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short_and_import_nothing_private(name):
    text = (ROOT / f"examples/{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert "import _" not in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_of_a_config_file_is_an_argument(name):
    settings = yaml.safe_load((ROOT / f"examples/configs/{name}.yaml").read_text())
    classes = (load_example(name).ScriptArguments, PersonalizedDPOConfig, ModelConfig)
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert not set(settings) - known
    assert settings["loss_type"] == ["sigmoid"]  # not that of the small run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_users"), [("tulu_style", 6), ("prism_dialogue", 9)])
def test_a_few_steps_leave_every_file(tmp_path, name, num_users):
    printed, results = run(name, tmp_path, *FEW_STEPS, "--seed", "5")
    assert (tmp_path / "out/accuracy_by_user.png").stat().st_size > 10_000
    assert (tmp_path / "out/user_model/users.json").is_file()
    assert (results["seed"], len(results["users"]), len(results["samples"])) == (5, num_users, 2)
    accuracies = {f"accuracy_{scorer}" for scorer in ("own", "generic", "swapped", "vanilla")}
    assert accuracies | {"mean_chosen_length", "empty_share"} <= results["users"][0].keys()
    assert ("accuracy_opposite" in results["users"][0]) == (name == "tulu_style")
    assert set(results["versions"]) == {"trl_personal", "trl", "transformers", "peft", "torch"}
    assert "generic user" in printed.replace("generic  ", "generic user")
    config = json.loads((tmp_path / "out/user_model/user_model_config.json").read_text())
    if name == "prism_dialogue":
        assert (config["kind"], config["num_clusters"]) == ("cluster", 10)
        assert config["user_profile_template"] == "User profile: {profile}"
        assert set(results["unknown_users"]) == {"with_profile", "without"}
    else:
        assert results["majority_share"] == 0.5
        assert results["vanilla_accuracy"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("name", "path"),
    [("tulu_style", "psoups_style_tulu/allcombo_8_cleaned.json"), ("prism_dialogue", "prism_synthesizeme/raw_schema")],
)
def test_real_texts_in_the_raw_schema(tmp_path, name, path):
    rows = ("--dataset_path", str(SHARED_DATA / path), "--test_size", "0.2", "--max_length", "512")
    _, results = run(name, tmp_path, *FEW_STEPS, *rows)
    assert all(0 <= user["accuracy_own"] <= 1 for user in results["users"])
    assert results["majority_share"] == (0.5 if name == "tulu_style" else None)


@pytest.mark.slow
def test_the_whole_style_run(tmp_path):
    """What the README's table says, within the bounds that were set for it."""
    _, results = run("tulu_style", tmp_path)
    own = [user["accuracy_own"] for user in results["users"]]
    assert len(own) == 6
    assert sum(own) / 6 >= 0.9
    assert min(own) >= 0.8
    assert max(user["accuracy_opposite"] for user in results["users"]) <= 0.2
    assert 0.45 <= results["vanilla_accuracy"] <= 0.55
    words = {user["preference"]: user["mean_generated_length"] for user in results["users"]}
    assert words["detailed"] > 2 * words["short"]

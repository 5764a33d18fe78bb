"""Two processes on the CPU train as one does with the joint batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_personal import AutoPersonalizedModelForCausalLM


SCRIPT = Path(__file__).with_name("train.py")


def launch(num_processes, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "29611"]
    if num_processes > 1:
        command.append(
            "--multi_gpu"
        )  # accelerate's name for its torchrun launcher; with `use_cpu` the backend is gloo
    run = subprocess.run([*command, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch(model_dirs, preferences, tmp_path):
    rows = tmp_path / "rows.jsonl"
    preferences.to_json(rows)
    for name, num_processes, batch_size in (("one", 1, 4), ("two", 2, 2)):
        (tmp_path / name).mkdir()
        launch(num_processes, model_dirs["gptj"], str(rows), str(tmp_path / name), str(batch_size))
    one = torch.load(tmp_path / "one/weights-0.pt")
    first, second = (torch.load(tmp_path / f"two/weights-{rank}.pt") for rank in (0, 1))
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], one[name], rtol=1e-5, atol=1e-5)
    logs = {name: json.loads((tmp_path / name / "logs-0.json").read_text()) for name in ("one", "two")}
    for ours, joint in zip(logs["two"]["train"], logs["one"]["train"], strict=True):
        assert ours["loss"] == pytest.approx(joint["loss"], abs=1e-5)
        assert ours["num_tokens"] == joint["num_tokens"]
        assert ours["generic/rewards/margins"] == pytest.approx(joint["generic/rewards/margins"], abs=1e-5)
    for name in ("eval_users/accuracy_mean", "eval_users/accuracy_worst", "eval_users/accuracy_swapped"):
        assert logs["two"]["eval"][name] == logs["one"]["eval"][name]
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "two/final")
    everyone = torch.arange(3)
    expected = loaded.user_model(everyone)
    single = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "one/final")
    torch.testing.assert_close(expected, single.user_model(everyone), rtol=1e-5, atol=1e-5)

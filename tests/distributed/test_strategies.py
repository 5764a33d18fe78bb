"""Two processes on the CPU train as one does with the joint batch, whatever the strategy."""

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_personal import AutoPersonalizedModelForCausalLM


pytestmark = pytest.mark.slow
TRAIN = Path(__file__).with_name("train.py")
FSDP2 = Path(__file__).with_name("train_fsdp2.py")


def launch(num_processes, script, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", str(port)]
    if num_processes > 1:
        command.append(
            "--multi_gpu"
        )  # accelerate's name for its torchrun launcher; with `use_cpu` the backend is gloo
    run = subprocess.run([*command, str(script), json.dumps(settings)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture
def train(model_dirs, preferences, tmp_path):
    preferences.to_json(tmp_path / "rows.jsonl")

    def run(name, num_processes, batch_size, script=TRAIN, family="gptj", **settings):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings |= {"model": model_dirs[family], "rows": str(tmp_path / "rows.jsonl"), "output_dir": str(folder)}
        launch(num_processes, script, batch_size=batch_size, **settings)
        logs = [json.loads((folder / f"logs-{rank}.json").read_text()) for rank in range(num_processes)]
        return folder, logs

    return run


def assert_same_losses(ours, joint, tolerance):
    for one, other in zip(ours["train"], joint["train"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert one["num_tokens"] == other["num_tokens"]
        assert one["generic/rewards/margins"] == pytest.approx(other["generic/rewards/margins"], abs=tolerance)
    for name in ("eval_users/accuracy_mean", "eval_users/accuracy_worst", "eval_users/accuracy_swapped"):
        assert ours["eval"][name] == joint["eval"][name]


def assert_same_soft_prompts(folder, other, tolerance):
    models = [AutoPersonalizedModelForCausalLM.from_pretrained(f / "final") for f in (folder, other)]
    everyone = torch.arange(3)
    soft_prompts = [model.user_model(everyone) for model in models]
    torch.testing.assert_close(*soft_prompts, rtol=tolerance, atol=tolerance)
    assert not torch.equal(soft_prompts[0][1], soft_prompts[0][2])
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]] * 2), "user_ids": ["ann", "bo"], "max_new_tokens": 6}
    sequences = [model.generate(**batch, do_sample=False) for model in models]
    assert torch.equal(*sequences)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["off", "on", "reentrant"])
def test_ddp_equals_one_process_with_the_joint_batch(train, lora, checkpointing):
    settings = {"lora": lora, "gradient_checkpointing": checkpointing != "off"}
    if checkpointing == "reentrant":
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    one, (joint,) = train("one", 1, 4, **settings)
    two, logs = train("two", 2, 2, **settings)
    assert_same_losses(logs[0], joint, 1e-5)
    expected, first, second = (
        torch.load(path) for path in (one / "weights-0.pt", two / "weights-0.pt", two / "weights-1.pt")
    )
    assert expected.keys() == first.keys() == second.keys()
    for name in expected:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected[name], rtol=1e-5, atol=1e-5)
    assert_same_soft_prompts(two, one, 1e-5)


def test_precomputed_reference_works_under_two_processes(train):
    _, (joint,) = train("one", 1, 4)
    _, logs = train("two", 2, 2, precompute_ref_log_probs=True)
    assert_same_losses(logs[0], joint, 1e-5)


def test_ddp_checkpoint_resumes_on_one_process(train, tmp_path):
    _, (straight,) = train("straight", 1, 4, max_steps=3, save_strategy="steps", save_steps=1)
    two, _ = train("two", 2, 2, max_steps=2, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    one, (resumed,) = train("two", 1, 4, max_steps=3, save_strategy="steps", save_steps=1, resume=True)
    assert one == two
    assert len(resumed["train"]) == len(straight["train"])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fsdp2_equals_one_process_and_loads_without_fsdp(train, lora):
    """`fully_shard` applied directly: accelerate refuses FSDP on a CPU. The script asserts that parameters are sharded."""
    one, (joint,) = train("one", 1, 4, script=FSDP2, family="llama", lora=lora)
    two, (first, second) = train("two", 2, 2, script=FSDP2, family="llama", lora=lora)
    assert first["num_sharded"] == second["num_sharded"] > 0
    for step, expected in enumerate(joint["losses"]):
        assert (first["losses"][step] + second["losses"][step]) / 2 == pytest.approx(expected, abs=1e-4)
    assert first["reloaded"] == second["reloaded"]
    assert first["reloaded"] is True
    assert_same_soft_prompts(two, one, 1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_zero_equals_one_process(train, stage, lora):
    one, (joint,) = train("one", 1, 4, lora=lora)
    two, logs = train("two", 2, 2, lora=lora, strategy=f"zero{stage}")
    assert_same_losses(logs[0], joint, 1e-4)
    assert_same_soft_prompts(two, one, 1e-4)

"""`trl-personal dpo`, `generate` and `info`: each command equals the Python it stands for, and fails in one clear line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import LLAMA_SIZES, ROOT, WORDS, make_tokenizer
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DatasetMixtureConfig, ScriptArguments

import trl_personal
import trl_personal.models.loading
from trl_personal import AutoPersonalizedModelForCausalLM, PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.cli import dpo, launch, main
from trl_personal.cli.preferences import load_preferences, select_split


TRAINING = {
    "learning_rate": 1e-2,
    "max_steps": 2,
    "max_length": 32,
    "num_virtual_tokens": 3,
    "soft_prompt_init": "random",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}
CLUSTER = {"user_model_kind": "cluster", "num_clusters": 4}
LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
MACHINE = {"use_cpu": True, "bf16": False}  # what `dpo` adds by itself without an accelerator


def make_rows():
    """`ann` prefers the short answer, `bo` the long one."""
    rows = []
    for i in range(8):
        prompt = ["please write a story", "write a answer and", "please i like dogs", "the story"][i // 2]
        short, long = " yes", f" {WORDS[5 + i // 2]} the end yes no"
        chosen, rejected = (short, long) if i % 2 == 0 else (long, short)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": ["ann", "bo"][i % 2]})
    return rows


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def weights(folder):
    lm = next(path for name in ("model", "adapter_model") if (path := Path(folder) / f"{name}.safetensors").is_file())
    user_model = Path(folder) / "user_model" / "user_model.safetensors"
    return load_file(lm) | (load_file(user_model) if user_model.is_file() else {})


def assert_same_weights(folder, other):
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def preference_folder(tmp_path_factory):
    """train.jsonl with eight pairs, test.jsonl with four of them."""
    folder = tmp_path_factory.mktemp("preferences")
    write_jsonl(folder / "train.jsonl", make_rows())
    write_jsonl(folder / "test.jsonl", make_rows()[:4])
    return folder


@pytest.fixture(scope="module")
def command(model_dirs, preference_folder):
    """The start of a `dpo` command for a tiny GPT-J."""
    return ["dpo", *flags(model_name_or_path=model_dirs["gptj"], dataset_name=preference_folder, **TRAINING)]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """The folder of a model that `dpo` trained: clusters and LoRA, with evaluation at each step and checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "out"
    steps = flags(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, output_dir=out)
    assert main([*command, *steps, *flags(**CLUSTER), *LORA]) == 0
    return out


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """As on a machine where nobody ran `accelerate config`."""
    monkeypatch.setattr(launch, "default_config_file", "/nowhere/default_config.yaml")
    monkeypatch.setenv("COLUMNS", "200")


# --- The program --------------------------------------------------------------------------------------------------------


def run_and_exit(*argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    return exit_.value.code


def test_help_names_the_commands_and_the_exit_codes(capsys):
    assert run_and_exit("--help") == 0
    text = capsys.readouterr().out
    assert all(
        line in text
        for line in (
            "  dpo       train",
            "  eval      say which users gain",
            "  generate  write answers",
            "  info      say what",
            "2 wrong usage",
        )
    )


def test_help_of_dpo_begins_with_the_settings_of_users_and_names_each_flag_once(capsys):
    assert run_and_exit("dpo", "--help") == 0
    text = capsys.readouterr().out
    before, ours, columns, data, others = re.split(
        r"\n(?:settings of users|columns of the data|model and data|other .*):\n", text
    )
    assert before.startswith("usage: trl-personal dpo --model_name_or_path MODEL --dataset_name DATASET")
    assert "  --user_model_kind {individual,cluster,low_rank,none,...}\n" in ours
    assert "(default: individual)" in ours
    assert "--response_columns TEXT [TEXT ...]" in columns
    assert "--dataset_test_split TEXT" in data
    assert "--learning_rate X" in others
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 150
    assert "--user-model-kind" not in text


def test_help_of_generate_eval_and_info(capsys):
    assert run_and_exit("generate", "--help") == 0
    assert "one user id a line" in capsys.readouterr().out
    assert run_and_exit("eval", "--help") == 0
    assert "user_id_text, in_context, lora_per_user" in capsys.readouterr().out
    assert run_and_exit("info", "--help") == 0
    assert "--list_users" in capsys.readouterr().out


def test_version(capsys):
    assert run_and_exit("--version") == 0
    assert capsys.readouterr().out == f"trl-personal {trl_personal.__version__}\n"


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["generate", "--help"], ["generate"], ["dpo", "--user_column_id", "who"]]
)
def test_help_of_the_program_loads_nothing_but_the_standard_library(argv):
    script = f"""
        import sys
        from trl_personal.cli import main
        try:
            main({argv!r})
        finally:
            sys.stderr.write(str(sorted({{"torch", "trl", "transformers", "datasets", "rich"}} & set(sys.modules))))
    """
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert time.perf_counter() - start < 1  # 0.1 s by itself
    assert result.stderr.endswith("[]")


def test_the_program_is_installed_under_its_name():
    assert "trl-personal = trl_personal.cli:main" in (ROOT / "setup.cfg").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["generate", "--model", "out"], "one of the arguments --prompt --prompts_file is required"),
        (["generate", "--model", "out", "--prompt", "a", "--batch_size", "0"], "at least 1, got '0'"),
        (
            ["generate", "--model", "a", "--prompt", "a", "--users", "a", "--users_file", "b"],
            "not allowed with argument",
        ),
        (["info"], "the following arguments are required: model"),
        (["dpo"], "required: --model_name_or_path"),
        (["dpo", "--model_name_or_path", "m"], "required: --dataset_name"),
        (["dpo", "--num_clusters", "0"], "`--num_clusters` must be at least 1, got 0."),
        (["dpo", "--learning_rate", "-1"], "`--learning_rate` must be at least 0, got -1.0."),
        (["dpo", "--beta", "0"], "`--beta` must be above 0, got 0.0."),
        (["dpo", "--user_model_kind", "nobody"], "no user model of kind 'nobody'"),
        (["dpo", "--user_model_kind", "nobody"], "Or set `--user_model_kind none` for TRL's own trainer"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--top_p", "5"],
            "must be a number above 0 and at most 1, got '5'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "a", "--temperature", "-1"],
            "must be a number at least 0, got '-1'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "a", "--temperature", "nan"],
            "must be a number at least 0, got 'nan'",
        ),
        (
            ["generate", "--model", "m", "--prompt", "a", "--repetition_penalty", "0"],
            "must be a number above 0, got '0'",
        ),
        (["generate", "--model", "m", "--prompt", "a", "--seed", "-1"], "must be an integer from 0 to 4294967295"),
        (["eval", "m", "--dataset_name", "d", "--beta", "inf"], "must be a number above 0, got 'inf'"),
        (["dpo", "--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["dpo", "--config"], "argument --config: expected one argument"),
        (["dpo", "--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_wrong_usage_exits_with_2(argv, message, capsys):
    assert run_and_exit(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "unknown"),
    [
        (["--nmu_clusters", "4"], "--nmu_clusters. Did you mean --num_clusters?"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--num_processes", "2", "--bogus=1"], "--bogus"),
    ],
)
def test_an_argument_that_neither_trl_nor_accelerate_knows_exits_with_2(command, extra, unknown, capsys):
    assert run_and_exit(*command, *extra) == 2
    error = capsys.readouterr().err
    assert f"trl-personal dpo: error: unrecognized arguments: {unknown}\nSee `trl-personal dpo --help`.\n" in error
    assert "usage:" not in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["info", "nowhere"],
            "info: error: There is no folder nowhere. Give one that training wrote, or a name on the hub",
        ),
        (
            ["info", "{gptj}"],
            "has no `user_model/` folder, so it is not a personalized model. Train one with `trl-personal",
        ),
        (["generate", "--model", "./no/where", "--prompt", "a"], "generate: error: There is no folder ./no/where."),
        (["generate", "--model", "{gptj}", "--prompt", "a"], "is not a personalized model"),
        (["generate", "--model", "m", "--prompts_file", "nowhere.txt"], "There is no file nowhere.txt."),
        (
            ["generate", "--model", "m", "--prompt", "a", "--users_file", "nowhere.txt"],
            "There is no file nowhere.txt.",
        ),
        (["generate", "--model", "m", "--prompt", " "], "A prompt is empty."),
        (["generate", "--model", "m", "--prompt", "a", "--users", ","], "There is no user id in --users."),
        (
            ["dpo", "--model_name_or_path", "{gptj}", "--dataset_name", "no.jsonl"],
            "dpo: error: There is no file or folder no.jsonl.",
        ),
        (["--import_module", "no.py", "info", "m"], "There is no file no.py, named by --import_module."),
        (["--import_module", "no_module", "info", "m"], "ModuleNotFoundError: No module named 'no_module'"),
    ],
)
def test_a_run_time_error_is_one_line_and_exits_with_1(argv, message, model_dirs, capsys):
    assert main([arg.format(**model_dirs) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("trl-personal ")
    assert message in last
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("argv", [["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]])
def test_debug_shows_the_traceback(argv, capsys):
    assert main(argv) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    monkeypatch.setattr("trl_personal.cli.info.describe", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["info", "."]) == 130
    assert capsys.readouterr().err == "trl-personal info: interrupted\n"


# --- dpo ----------------------------------------------------------------------------------------------------------------


def test_dpo_writes_the_model_and_its_users(trained):
    config = json.loads((trained / "user_model" / "user_model_config.json").read_text())
    assert {name: config[name] for name in ("kind", "num_clusters", "num_users", "num_virtual_tokens")} == {
        "kind": "cluster",
        "num_clusters": 4,
        "num_users": 2,
        "num_virtual_tokens": 3,
    }
    assert json.loads((trained / "user_model" / "users.json").read_text()) == {"ann": 1, "bo": 2}
    assert json.loads((trained / "adapter_config.json").read_text())["r"] == 16  # TRL's default
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_dpo_evaluates_on_the_test_split(trained):
    history = json.loads((trained / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert all("eval_users/accuracy_mean" in entry for entry in evaluations)


def test_dpo_equals_the_trainer_in_python(command, model_dirs, preference_folder, tmp_path):
    assert main([*command, *flags(**CLUSTER, output_dir=tmp_path / "cli")]) == 0
    trainer = PersonalizedDPOTrainer(
        model=model_dirs["gptj"],
        args=PersonalizedDPOConfig(output_dir=str(tmp_path / "python"), **TRAINING, **CLUSTER, **MACHINE),
        train_dataset=Dataset.from_list(make_rows()),
    )
    trainer.train()
    trainer.save_model()
    assert_same_weights(tmp_path / "cli", tmp_path / "python")
    assert len(weights(tmp_path / "cli")) > 2


def test_dpo_without_users_equals_trl_dpo(model_dirs, preference_folder, tmp_path):
    from trl.scripts.dpo import main as trl_dpo
    from trl.scripts.dpo import make_parser

    settings = {
        name: value for name, value in TRAINING.items() if name not in ("num_virtual_tokens", "soft_prompt_init")
    }
    arguments = flags(model_name_or_path=model_dirs["gptj"], dataset_name=preference_folder, **settings)
    assert main(["dpo", *arguments, *flags(user_model_kind="none", output_dir=tmp_path / "ours")]) == 0
    trl_dpo(*make_parser().parse_args_and_config([*arguments, *flags(**MACHINE, output_dir=tmp_path / "trl")]))
    assert_same_weights(tmp_path / "ours", tmp_path / "trl")
    assert not (tmp_path / "ours" / "user_model").exists()


@pytest.mark.parametrize("checkpoint", ["true", "checkpoint-1"])
def test_a_resumed_run_equals_one_without_a_break(command, trained, checkpoint, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(trained / "checkpoint-1", resumed / "checkpoint-1")
    name = checkpoint if checkpoint == "true" else resumed / checkpoint
    arguments = flags(**CLUSTER, output_dir=resumed, resume_from_checkpoint=name)
    assert main([*command, *arguments, *LORA]) == 0
    assert_same_weights(resumed, trained)


def test_training_goes_on_from_a_saved_model_with_a_new_user(command, trained, tmp_path):
    new = write_jsonl(tmp_path / "new.jsonl", [row | {"user_id": "cy"} for row in make_rows()[:4]])
    arguments = flags(model_name_or_path=trained, dataset_name=new, output_dir=tmp_path / "out", **CLUSTER)
    assert main([*command, *arguments]) == 0
    assert json.loads((tmp_path / "out" / "user_model" / "users.json").read_text()) == {"ann": 1, "bo": 2, "cy": 3}


def test_yaml_has_the_mixture_and_the_command_line_wins(model_dirs, tmp_path):
    rows = make_rows()
    first, second = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows)
    config = tmp_path / "config.yaml"
    config.write_text(
        textwrap.dedent(f"""
            model_name_or_path: {model_dirs["gptj"]}
            datasets:
              - path: json
                data_files: {first}
              - path: json
                data_files: {second}
                columns: [prompt, chosen, rejected, user_id]
            test_split_size: 0.25
            eval_strategy: "steps"
            eval_steps: 1
            max_steps: 5
            max_length: 32
            learning_rate: 1.0e-2
            user_model_kind: cluster
            num_clusters: 4
            num_virtual_tokens: 3
            disable_tqdm: true
            save_steps: 1
        """)
    )
    assert (
        main(["dpo", f"--config={config}", *flags(max_steps=1, num_virtual_tokens=2, output_dir=tmp_path / "out")])
        == 0
    )
    saved = json.loads((tmp_path / "out" / "user_model" / "user_model_config.json").read_text())
    assert (saved["kind"], saved["num_clusters"], saved["num_virtual_tokens"]) == ("cluster", 4, 2)
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    assert state["log_history"][-1]["eval_num_tokens"] > 0


def test_an_unknown_name_in_yaml_exits_with_2(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("num_cluster: 4\n")
    assert run_and_exit(*command, "--config", str(tmp_path / "config.yaml")) == 2
    assert "unrecognized arguments: --num_cluster 4. Did you mean --num_clusters?" in capsys.readouterr().err


def test_a_missing_test_split_is_named(command, tmp_path, capsys):
    only = write_jsonl(tmp_path / "only.jsonl", make_rows())
    assert main([*command, *flags(dataset_name=only, eval_strategy="epoch", output_dir=tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The dataset has no split 'test' to evaluate on; found ['train']." in error
    assert "leave `--eval_strategy` out" in error


def test_push_to_hub_pushes_what_was_trained(command, preference_folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(PersonalizedDPOTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/out"))
    monkeypatch.setattr(PersonalizedDPOTrainer, "push_to_hub", lambda self, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(PersonalizedDPOTrainer, "_push_from_checkpoint", lambda self, folder: None)
    assert main([*command, *flags(push_to_hub=True, hub_model_id="me/out", output_dir=tmp_path / "out")]) == 0
    assert calls[-1] == {"dataset_name": str(preference_folder)}


@pytest.fixture
def wide_model(tmp_path):
    """Wide enough for the blocks of 64 that bitsandbytes packs on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_SIZES | {"hidden_size": 128, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_4bit_and_lora(command, wide_model, tmp_path, monkeypatch):
    loaded = []
    attach = trl_personal.models.loading.attach_user_model
    monkeypatch.setattr(
        trl_personal.models.loading, "attach_user_model", lambda m, *args: (loaded.append(m), attach(m, *args))
    )
    out = str(tmp_path / "out")
    assert main([*command, *flags(model_name_or_path=wide_model, output_dir=out), *LORA, "--load_in_4bit"]) == 0
    assert weights(out)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].abs().sum() > 0
    (answer,) = generated("--model", out, "--prompt", "the story", "--load_in_4bit", to=tmp_path / "answers.jsonl")
    assert isinstance(loaded[0].get_base_model().model.layers[0].mlp.up_proj, Linear4bit)
    assert answer["text"]


def test_an_own_user_model_is_imported_from_its_file(command, tmp_path):
    own = ["--import_module", str(ROOT / "examples" / "own_user_model.py")]
    assert main([*own, *command, *flags(user_model_kind="point", output_dir=tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "user_model" / "user_model_config.json").read_text())
    assert config["kind"] == "point"


def test_an_error_in_training_leaves_its_traceback_in_the_folder(command, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr(PersonalizedDPOTrainer, "compute_loss", fail)
    assert main([*command, *flags(output_dir=tmp_path / "out")]) == 1
    path = tmp_path / "out" / "traceback_0.txt"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"trl-personal dpo: error: RuntimeError: out of memory (Traceback in {path})"
    assert "in compute_loss" in path.read_text() or "in fail" in path.read_text()


# --- The machine, and accelerate ------------------------------------------------------------------------------------------


def settings_of(*argv):
    parser = dpo.make_parser()
    return dpo.parse(parser, ["--model_name_or_path", "m", "--dataset_name", "d", *argv])[1]


def test_without_an_accelerator_training_is_on_the_cpu_unless_told_otherwise(tmp_path):
    assert (settings_of().use_cpu, settings_of().bf16) == (True, False)
    assert settings_of("--bf16", "true").bf16 is True
    (tmp_path / "config.yaml").write_text("bf16: true\n")
    assert settings_of("--config", str(tmp_path / "config.yaml")).bf16 is True


def test_a_setting_that_the_cpu_cannot_do_is_refused_as_by_trl(capsys):
    assert run_and_exit("dpo", "--use_cpu", "false", "--bf16", "true") == 2
    assert "Your setup doesn't support bf16/gpu." in capsys.readouterr().err


def test_with_an_accelerator_the_defaults_are_those_of_trl(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert dpo.machine_defaults() == {}


@pytest.fixture
def launched(monkeypatch):
    """What `dpo` hands to accelerate's launcher."""
    calls = []
    monkeypatch.setattr(launch, "launch_command", calls.append)
    return calls


def test_accelerate_arguments_start_the_launcher(command, launched):
    assert main(["--debug", *command, "--num_processes", "2", "--multi_gpu"]) == 0
    (arguments,) = launched
    assert (arguments.num_processes, arguments.multi_gpu, arguments.module) == (2, True, True)
    assert arguments.training_script == "trl_personal.cli"
    start = ["--debug", "--no_launch", *command]
    assert arguments.training_script_args[: len(start)] == start


def test_accelerate_arguments_may_stand_in_yaml(command, launched, tmp_path):
    (tmp_path / "config.yaml").write_text("num_processes: 3\naccelerate_config: multi_gpu\n")
    own = ["--import_module", str(ROOT / "examples" / "own_user_model.py")]
    assert main([*own, *command, "--config", str(tmp_path / "config.yaml")]) == 0
    (arguments,) = launched
    assert arguments.num_processes == 3
    assert arguments.config_file.endswith("accelerate_configs/multi_gpu.yaml")
    assert arguments.training_script_args[:2] == own


def test_several_gpus_or_a_saved_configuration_start_the_launcher(command, launched, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(command) == 0
    monkeypatch.undo()
    monkeypatch.setattr(launch, "launch_command", launched.append)
    monkeypatch.setattr(launch, "default_config_file", __file__)
    assert main(command) == 0
    assert len(launched) == 2


def test_no_launch_trains_in_this_process(command, launched, tmp_path):
    arguments = flags(num_processes=2, output_dir=tmp_path / "out")
    assert main(["--no_launch", *command, *arguments]) == 0
    assert launched == []
    assert (tmp_path / "out" / "user_model").is_dir()


def test_an_accelerate_config_that_does_not_exist_exits_with_2(command, capsys):
    assert run_and_exit(*command, "--accelerate_config", "zero9") == 2
    assert (
        "--accelerate_config zero9 is neither a file nor one of TRL's configurations, ['fsdp1',"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (-9, 1)])
def test_the_exit_code_of_the_workers_is_passed_on(command, code, expected, monkeypatch, capsys):
    def fail(arguments):
        raise subprocess.CalledProcessError(code, "python")

    monkeypatch.setattr(launch, "launch_command", fail)
    assert main([*command, "--num_processes", "1"]) == expected
    assert ("was ended by signal 9" in capsys.readouterr().err) == (code == -9)


# --- Data ---------------------------------------------------------------------------------------------------------------


def load(path, **kwargs):
    return load_preferences(ScriptArguments(dataset_name=str(path), **kwargs), DatasetMixtureConfig())


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet", "arrow"])
def test_a_local_file_is_a_train_split(suffix, tmp_path):
    rows, path = Dataset.from_list(make_rows()), tmp_path / f"preferences.{suffix}"
    if suffix in ("json", "jsonl"):
        rows.to_json(path)
    elif suffix in ("csv", "tsv"):
        rows.to_csv(path, sep="," if suffix == "csv" else "\t")
    elif suffix == "parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(tmp_path / "saved")
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
    assert load(path)["train"].to_list() == make_rows()


def test_a_folder_of_files_has_the_splits_in_their_names(preference_folder):
    dataset = load(preference_folder)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 8, "test": 4}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_stream_of_a_local_file_trains_its_users(suffix, model_dirs, tmp_path, capsys):
    rows = Dataset.from_list(make_rows())
    path = tmp_path / f"rows.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    stream = load(path, dataset_streaming=True)["train"]
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(rows)
    argv = flags(model_name_or_path=model_dirs["gptj"], dataset_name=path, output_dir=tmp_path / "out", **TRAINING)
    assert main(["dpo", *argv, "--dataset_streaming"]) == 0
    users = json.loads((tmp_path / "out/user_model/users.json").read_text())
    assert users == {user: row for row, user in enumerate(rows.unique("user_id"), start=1)}


def test_a_folder_that_save_to_disk_wrote(tmp_path):
    rows = Dataset.from_list(make_rows())
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one")["train"].to_list() == make_rows()
    assert len(select_split(load(tmp_path / "two"), "dev", "test")) == 1


def test_user_ids_in_csv_stay_text(tmp_path):
    path = tmp_path / "preferences.csv"
    path.write_text("prompt,chosen,rejected,user_id\na,b,c,007\na,b,c,NA\na,b,c,\n")
    for streaming in (False, True):
        rows = load(path, dataset_streaming=streaming)["train"]
        assert [row["user_id"] for row in rows] == ["007", "NA", None]


def test_csv_files_of_excel_begin_with_a_mark_that_is_no_text(tmp_path):
    path = tmp_path / "preferences.tsv"
    path.write_text("user_id\tprompt\tchosen\trejected\n007\tä\tb\tc\n", encoding="utf-8-sig")
    assert load(path)["train"].to_list() == [{"user_id": "007", "prompt": "ä", "chosen": "b", "rejected": "c"}]
    path.write_text("")
    with pytest.raises(ValueError, match="preferences.tsv is empty; its first line must name the columns"):
        load(path)


def test_a_mixture_wins_over_dataset_name(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows())
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(path)}])
    assert len(load_preferences(ScriptArguments(dataset_name="ignored"), mixture)["train"]) == 8
    assert "`dataset_name` (ignored) is ignored" in caplog.text


# --- generate -----------------------------------------------------------------------------------------------------------


def generated(*argv, to):
    """The objects that `generate` writes."""
    assert main(["generate", *argv, "--max_new_tokens", "6", "--format", "jsonl", "--output", str(to)]) == 0
    return [json.loads(line) for line in to.read_text().splitlines()]


@pytest.fixture(scope="module")
def distinct(trained, tmp_path_factory):
    """The trained model with soft prompts so far apart that users get different answers."""
    folder = tmp_path_factory.mktemp("distinct") / "model"
    model = AutoPersonalizedModelForCausalLM.from_pretrained(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.user_model.cluster_prompts.normal_(std=4, generator=generator)
        model.user_model.user_logits.weight.normal_(std=20, generator=generator)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


PROMPTS = ["please write a story", "yes", "i like dogs and cats"]


def test_generate_equals_the_model_in_python(distinct, tmp_path):
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    answers = generated("--model", distinct, "--users", "ann, bo", *arguments, to=tmp_path / "a.jsonl")
    model, tokenizer = (
        AutoPersonalizedModelForCausalLM.from_pretrained(distinct),
        AutoTokenizer.from_pretrained(distinct),
    )
    expected = []
    for prompt in PROMPTS:
        for user_id in ("ann", "bo"):
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, user_ids=user_id, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(output, skip_special_tokens=True)
            expected.append({"user_id": user_id, "known": True, "prompt": prompt, "text": text})
    assert answers == expected
    assert answers[0]["text"] != answers[1]["text"]


def test_an_unknown_user_is_marked_and_gets_the_generic_answer(distinct, tmp_path, capsys):
    arguments = ["--model", distinct, "--prompt", PROMPTS[0]]
    (generic,) = generated(*arguments, to=tmp_path / "generic.jsonl")
    known, unknown = generated(*arguments, "--users", "ann,zoe", to=tmp_path / "zoe.jsonl")
    assert generic["user_id"] is None
    assert (known["known"], unknown["known"]) == (True, False)
    assert unknown == generic | {"user_id": "zoe"}
    error = capsys.readouterr().err
    assert "1 of 2 users are unknown to the model and get the generic user's answers.\n" in error


def test_the_table_shows_user_prompt_and_answer(distinct, tmp_path, capsys):
    arguments = ["--model", distinct, "--prompt", "yes", "--users", "ann,zoe"]
    answers = generated(*arguments, to=tmp_path / "a.jsonl")
    assert main(["generate", *arguments, "--max_new_tokens", "6"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    assert rows == [["ann", "yes", answers[0]["text"].strip()], ["zoe (unknown)", "yes", answers[1]["text"].strip()]]


def test_standard_output_is_json_lines_only_and_the_batch_size_changes_nothing(distinct, tmp_path, capsys):
    users = write_jsonl(tmp_path / "users.txt", [])
    users.write_text("ann\n\nbo\nann\nzoe\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    arguments = ["--model", distinct, "--users_file", str(users), "--prompts_file", str(prompts)]
    expected = generated(*arguments, to=tmp_path / "a.jsonl")
    assert [(row["prompt"], row["user_id"]) for row in expected] == [
        (p, u) for p in PROMPTS for u in ("ann", "bo", "zoe")
    ]
    capsys.readouterr()
    assert main(["generate", *arguments, "--max_new_tokens", "6", "--format", "jsonl", "--batch_size", "2"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected


def test_sampling_follows_the_seed(distinct, tmp_path):
    arguments = ["--model", distinct, "--prompt", PROMPTS[0], "--users", "ann,bo"]
    hot = [*arguments, "--temperature", "5", "--top_p", "0.9", "--repetition_penalty", "1.1"]
    first = generated(*hot, to=tmp_path / "1.jsonl")
    assert generated(*hot, to=tmp_path / "2.jsonl") == first
    assert generated(*hot, "--seed", "1", to=tmp_path / "3.jsonl") != first
    cold = generated(*arguments, "--temperature", "0", to=tmp_path / "4.jsonl")
    assert cold == generated(*arguments, to=tmp_path / "5.jsonl") != first


@pytest.fixture
def chatting(distinct, tmp_path):
    """The model with a chat template: messages end with "the end", the answer starts with "answer"."""
    folder = tmp_path / "chatting"
    shutil.copytree(distinct, folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} the end {% endfor %}{% if add_generation_prompt %}answer{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_chat_template_is_used_unless_told_otherwise(chatting, distinct, tmp_path):
    plain = generated("--model", distinct, "--users", "bo", "--prompt", "yes", to=tmp_path / "1.jsonl")
    by_hand = generated(
        "--model", distinct, "--users", "bo", "--prompt", "yes the end answer", to=tmp_path / "2.jsonl"
    )
    chat = ["--model", chatting, "--users", "bo"]
    assert generated(*chat, "--prompt", "yes", to=tmp_path / "3.jsonl")[0]["text"] == by_hand[0]["text"]
    assert generated(*chat, "--prompt", "yes", "--no_chat_template", to=tmp_path / "4.jsonl") == plain
    messages = [{"role": "user", "content": "i like"}, {"role": "assistant", "content": "dogs"}]
    conversation = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": messages}, {"prompt": "yes"}])
    answers = generated(*chat, "--prompts_file", str(conversation), to=tmp_path / "5.jsonl")
    expected = generated(
        "--model", distinct, "--users", "bo", "--prompt", "i like the end dogs the end answer", to=tmp_path / "6.jsonl"
    )
    assert [answer["text"] for answer in answers] == [expected[0]["text"], by_hand[0]["text"]]
    assert answers[0]["prompt"] == messages


def test_messages_need_a_chat_template(distinct, tmp_path, capsys):
    messages = [{"role": "user", "content": "yes"}]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": messages}])
    assert main(["generate", "--model", distinct, "--prompts_file", str(path)]) == 1
    assert "which needs a chat template, but the tokenizer has none" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "prompts.jsonl, line 2 is not JSON"),
        (
            '{"text": "a"}',
            "prompts.jsonl, line 2 must be an object with `prompt`, a text or a list of messages; found ['text'].",
        ),
        ("[1]", "line 2 must be an object with `prompt`, a text or a list of messages; found list."),
    ],
)
def test_a_bad_line_of_prompts_is_named(line, message, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "yes"}\n' + line + "\n")
    assert main(["generate", "--model", "m", "--prompts_file", str(tmp_path / "prompts.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(distinct, tmp_path):
    arguments = ["--users", "ann", "--prompt", "yes", "--dtype", "bfloat16"]
    expected = generated("--model", distinct, *arguments, to=tmp_path / "1.jsonl")
    bare = tmp_path / "bare"
    shutil.copytree(distinct, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert generated("--model", str(bare), *arguments, to=tmp_path / "2.jsonl") == expected


# --- info ---------------------------------------------------------------------------------------------------------------


def info(folder, *argv, capsys):
    capsys.readouterr()
    assert main(["info", str(folder), "--format", "json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_says_what_the_folder_holds(trained, model_dirs, capsys):
    found = info(trained, capsys=capsys)
    versions = found.pop("versions")
    assert versions["trl_personal"] == trl_personal.__version__
    assert versions["torch"] == version("torch")  # its own __version__ may end in +cu132
    assert found.pop("saved_with").keys() == {"peft"}
    settings = found.pop("training_settings")
    assert (settings["user_id_column"], settings["beta"], settings["loss_type"]) == ("user_id", 0.1, ["sigmoid"])
    assert found == {
        "model": str(trained),
        "format_version": 2,
        "kind": "cluster",
        "num_users": 2,
        "num_virtual_tokens": 3,
        "token_dim": 32,
        "num_clusters": 4,
        "user_model_parameters": 4 * 3 * 32 + 3 * 4,
        "user_model_bytes": sum(path.stat().st_size for path in (trained / "user_model").iterdir()),
        "language_model": "adapter",
        "base_model": model_dirs["gptj"],
        "language_model_bytes": (trained / "adapter_model.safetensors").stat().st_size,
        "user_model_matches": True,
        "weights_match": True,
        "base_model_matches": True,
    }


def test_info_lists_users_only_if_asked(trained, capsys):
    assert info(trained, "--list_users", capsys=capsys)["users"] == ["ann", "bo"]
    assert main(["info", str(trained)]) == 0
    table = capsys.readouterr().out
    assert "ann" not in table
    assert main(["info", str(trained), "--list_users"]) == 0
    assert capsys.readouterr().out == table + "ann\nbo\n"


def test_the_table_of_info(trained, capsys):
    assert main(["info", str(trained)]) == 0
    rows = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["kind"], rows["num users"], rows["user model parameters"]) == ("cluster", "2", "396")
    assert rows["user model size"].endswith(" kB")
    assert {rows[name] for name in ("weights match", "user model matches", "base model matches")} == {"yes"}
    assert rows["training settings"].endswith("listed by --format json")
    assert f"trl_personal {trl_personal.__version__}, trl 1." in rows["versions"]


@pytest.fixture
def full_model(command, tmp_path):
    assert main([*command, *flags(output_dir=tmp_path / "full")]) == 0
    return tmp_path / "full"


def test_info_of_a_full_model_whose_weights_are_of_another_save(full_model, capsys):
    found = info(full_model, capsys=capsys)
    assert (found["kind"], found["language_model"], found["base_model"]) == ("individual", "full", "GPTJForCausalLM")
    assert found["user_model_parameters"] == 3 * 32 + 3 * 3 * 32
    assert found["weights_match"] is True
    (full_model / "model.safetensors").write_bytes(b"not even weights")  # nothing loads them
    assert info(full_model, capsys=capsys)["weights_match"] is False
    (full_model / "model.safetensors").unlink()
    found = info(full_model, capsys=capsys)
    assert (found["weights_match"], found["language_model_bytes"]) == (None, None)


def test_info_of_a_repository_downloads_no_weights(trained, monkeypatch, tmp_path, capsys):
    def download(name, allow_patterns):
        patterns = [pattern for pattern in allow_patterns if (trained / pattern).is_file()]
        shutil.copytree(trained / "user_model", tmp_path / "user_model")
        for pattern in patterns:
            shutil.copy(trained / pattern, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("trl_personal.cli.model_folder.snapshot_download", download)
    found = info("me/out", capsys=capsys)
    assert (found["model"], found["num_users"], found["weights_match"]) == ("me/out", 2, None)
    names = ["adapter_config.json", "training_settings.json", "user_model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("file", ["users.json", "user_model.safetensors", "user_model_config.json"])
def test_info_says_that_a_file_of_the_users_is_not_the_one_that_was_saved(trained, tmp_path, capsys, file):
    shutil.copytree(trained, tmp_path / "edited")
    path = tmp_path / "edited/user_model" / file
    text = path.read_bytes()
    path.write_bytes(
        {
            "users.json": text.replace(b'"ann"', b'"cy"'),
            "user_model.safetensors": text[:-1] + bytes([text[-1] ^ 1]),
            "user_model_config.json": text.replace(b'"bos_token_id": 1', b'"bos_token_id": 2'),
        }[file]
    )
    assert path.read_bytes() != text
    assert main(["info", str(tmp_path / "edited"), "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["user_model_matches"] is False
    assert f"{path} is not the file that was saved" in printed.err


def test_info_says_that_the_base_model_is_another(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "moved")
    path = tmp_path / "moved/adapter_config.json"
    config = json.loads(path.read_text())
    shutil.copytree(config["base_model_name_or_path"], tmp_path / "base")
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")}))
    assert info(tmp_path / "moved", capsys=capsys)["base_model_matches"] is True
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert info(tmp_path / "moved", capsys=capsys)["base_model_matches"] is False
    shutil.rmtree(tmp_path / "base")
    assert info(tmp_path / "moved", capsys=capsys)["base_model_matches"] is None


def test_a_user_model_that_is_cut_off_is_one_line(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "cut")
    path = tmp_path / "cut" / "user_model" / "user_model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    assert main(["info", str(tmp_path / "cut")]) == 1
    assert f"{path} cannot be read" in capsys.readouterr().err.splitlines()[-1]


# --- The manual, and real processes ---------------------------------------------------------------------------------------


def commands_in(page):
    """The `trl-personal` commands in the ```bash blocks of a page, and the files written there with `cat > FILE <<E`."""
    for block in page.split("```bash\n")[1:]:
        yield block.split("```")[0]


@pytest.mark.slow
def test_the_commands_of_the_manual_run_as_written(model_dirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dirs["qwen2"], tmp_path / "model")
    ran = []
    for block in commands_in((ROOT / "docs" / "command_line.md").read_text()):
        if "trl-personal" not in block:
            subprocess.run(["bash", "-ec", block], check=True, cwd=tmp_path)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            argv = shlex.split(line, comments=True)
            if argv:
                assert argv[0] == "trl-personal", line
                assert main(argv[1:]) == 0, line
                ran.append(argv[1])
    assert {"dpo", "eval", "generate", "info"} <= set(ran)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--multi_gpu", "--num_processes", "2"]])
def test_real_processes(command, extra, tmp_path):
    def run(*argv):
        program = [sys.executable, "-m", "trl_personal.cli"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([*program, *argv], env=environment, capture_output=True, text=True, timeout=300)

    training = [*command, *flags(output_dir=tmp_path / "out"), *LORA, *extra]
    result = run(*training)
    assert result.returncode == 0, result.stderr
    assert f"Model saved to {tmp_path / 'out'}.\n" in result.stdout

    asked = ["--prompt", "yes", "--users", "ann,bo", "--max_new_tokens", "6", "--format", "jsonl"]
    result = run("generate", "--model", str(tmp_path / "out"), *asked)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["user_id"] for line in result.stdout.splitlines()] == ["ann", "bo"]

    result = run(*training, "--dataset_train_split", "x")
    assert result.returncode == 1
    assert "trl-personal dpo: error: The dataset has no split 'x'" in result.stderr
    assert "Traceback" not in result.stderr


def test_lora_of_the_command_line_is_that_of_trl(trained):
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["lora_dropout"]) == (32, 0.05)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["task_type"] == LoraConfig(task_type="CAUSAL_LM").task_type

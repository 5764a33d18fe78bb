"""What a script leaves for the commands that go on from it, and the bars that say what it does."""

import json
import shlex
import subprocess
import warnings

import pytest
from datasets import Dataset, DatasetDict
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_personal.cli.arguments import make_generate_parser
from trl_personal.data import load_generic
from trl_personal.evaluation import evaluate_trainer
from trl_personal.evaluation.plots import plot_measures
from trl_personal.evaluation.run_files import next_commands, write_pairs, write_results
from trl_personal.intervals import Interval
from trl_personal.terminal import printable
from trl_personal.training.progress import NamedProgressCallback, quiet_libraries, with_progress


def test_pairs_come_back_as_they_were(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "Warum »so«?"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b\nc"}], "user_id": f"ü{i}"}
        for i in range(3)
    ]  # fmt: skip
    splits = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1]))
    folder = write_pairs(splits, tmp_path)
    found = load_generic(str(folder))
    assert sorted(found) == ["test", "train"]
    assert found["train"]["user_id"] == ["ü0", "ü1", "ü2"]
    assert found["test"][0]["rejected"] == [{"role": "assistant", "content": "b\nc"}]


def test_commands_name_what_is_there(tmp_path):
    folder = tmp_path / "my model"
    (folder / "vanilla").mkdir(parents=True)
    lines = [
        shlex.split(line) for line in next_commands(folder, ["a b", "c"], "What's up?", ref_model="base").split("\n")
    ]
    assert [line[:2] for line in lines] == [["trl-personal", name] for name in ("eval", "generate", "info")]
    assert lines[0][2:8] == [str(folder), "--dataset_name", f"{folder}/pairs", "--ref_model", "base", "--vanilla"]
    assert lines[1][lines[1].index("--prompt") + 1] == "What's up?"
    assert lines[1][lines[1].index("--users") + 1] == "a b,c"
    (folder / "adapter_config.json").write_text("{}")
    assert "--ref_model" not in next_commands(folder, ["c"], "Why?", ref_model="base")


@pytest.mark.parametrize("prompt", ["It's\ntwo\\n lines", "-5 or\t6?", "\x1b[2J$(rm x) `y`", "é\u202e\x85 \u2028'"])
def test_commands_hold_whatever_a_prompt_is_in_a_line_each(prompt):
    text = next_commands("out", ["a,b", "-c", "d"], prompt)
    assert printable(text, keep="\n") == text
    line = text.split("\n")[1]
    assert len(text.split("\n")) == 3
    shown = subprocess.run(
        ["bash", "-c", f"trl-personal() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8"},
    ).stdout.decode()
    found = make_generate_parser().parse_args(shown.split("\0")[1:-1])
    assert (found.prompt, found.users) == ([prompt], "-c,d")


def test_results_hold_the_evaluation_and_more(make_trainer, preferences, tmp_path):
    trainer = make_trainer("llama")
    evaluation = evaluate_trainer(trainer, preferences)
    write_results(tmp_path / "results.json", evaluation, seed=3, users=["mine"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["seed"], found["users"]) == (3, ["mine"])
    assert found["verdict"] == evaluation.report.verdict
    assert {"command", "versions", "hardware"} <= found.keys()
    assert "run" not in found


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_training_has_one_bar_with_its_name(make_trainer, capfd, disable_tqdm):
    trainer = with_progress(make_trainer("llama", disable_tqdm=disable_tqdm, logging_steps=1, max_steps=2), "P-DPO")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert (NamedProgressCallback in kinds) == (not disable_tqdm)
    assert (PrinterCallback in kinds) == disable_tqdm
    assert ProgressCallback not in kinds
    capfd.readouterr()
    trainer.train()
    printed = capfd.readouterr()
    if not disable_tqdm:
        assert "P-DPO: 100%" in printed.err
        assert "loss " in printed.err
        assert "{'loss'" not in printed.out + printed.err
        trainer.evaluate(trainer.train_dataset)
        assert "P-DPO: scoring pairs" in capfd.readouterr().err


def test_only_what_nobody_can_change_is_left_out():
    with warnings.catch_warnings(record=True) as caught:
        quiet_libraries()
        warnings.warn_explicit("old name", FutureWarning, "x.py", 1, module="transformers.training_args")
        warnings.warn_explicit("my own", UserWarning, "x.py", 1, module="my_script")
        warnings.warn_explicit("old name of mine", FutureWarning, "x.py", 2, module="my_script")
    assert [str(warning.message) for warning in caught] == ["my own", "old name of mine"]


def test_measures_are_drawn_and_gaps_left_out(tmp_path):
    names = ["ann", "bo", "base"]
    panels = {"right": [Interval(1.0, 0.9, 1.0), Interval(0.5, 0.3, 0.7), None], "words": [Interval(20, 10, 30)] * 3}
    plot_measures(tmp_path / "a.png", names, panels, {"right": 1.0}, others=["base"])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"for each of 3 rows; found \{'right': 2\}"):
        plot_measures(tmp_path / "b.png", names, {"right": panels["right"][:2]})
    with pytest.raises(ValueError, match="found no panel"):
        plot_measures(tmp_path / "b.png", names, {})

"""The benchmarks run, with tiny shapes, and write what they say."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def measure():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import measure

    yield measure
    sys.path.remove(str(ROOT / "benchmarks"))


def test_interval_of_a_median(measure):
    assert measure.median_interval([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 1.0, 5.0)
    assert measure.median_interval(list(range(1, 21))) == (10.5, 6, 15)  # 95.9% by the binomial distribution


def test_ratios_are_taken_within_a_round(measure):
    first, second = measure.ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 4.0]}, baseline="a")
    assert (first["ratio"], first["low"], first["high"]) == (1.0, 1.0, 1.0)
    assert (second["ratio"], second["low"], second["high"], second["seconds"]) == (2.0, 1.0, 3.0, 4.0)


def test_contestants_take_turns_and_the_first_round_does_not_count(measure):
    calls = []
    times = measure.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [2, 2]


def test_preferences_have_the_lengths_and_users_asked_for(measure):
    rows = measure.make_preferences(6, prompt_tokens=7, response_tokens=4, num_users=3, small=True)
    tokenizer = measure.make_tokenizer(small=True)
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in rows} == {7}
    assert {len(tokenizer(row[name])["input_ids"]) for row in rows for name in ("chosen", "rejected")} == {3}
    assert sorted(rows["user_id"]) == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_every_word_is_read_from_the_folder_of_a_model(measure, family, tmp_path):
    measure.make_model(family, small=True).config.save_pretrained(tmp_path)
    tokenizer = measure.make_tokenizer(small=True)
    tokenizer.save_pretrained(tmp_path)
    ids = list(range(len(tokenizer)))
    text = " ".join(tokenizer.convert_ids_to_tokens(ids))
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["step.py", "--rounds", "1", "--lengths", "10x5", "--contestants", "TRL", "auto", "dense"],
        ["users.py", "--rounds", "1"],
        ["generate.py", "--rounds", "1"],
        ["precompute.py", "--num_pairs", "4"],
        ["gpu.py", "--rounds", "1", "--families", "gptj", "--weights", "bf16"],
    ],
    ids=lambda command: command[0],
)
def test_benchmark_runs_and_writes_its_results(tmp_path, command):
    script, *options = command
    command = [sys.executable, f"benchmarks/{script}", "--small", "--output", str(tmp_path / "results"), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt", ".png"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["trl"]
    assert results["command"].startswith(f"python benchmarks/{script} --small")

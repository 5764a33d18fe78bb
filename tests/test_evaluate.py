"""`trl-personal eval`, end to end: planted preferences are found, shuffled ids are not, and the files say what was printed."""

import importlib
import json
import random
import re

import numpy as np
import pytest
from conftest import WORDS
from datasets import Dataset
from trl import DPOTrainer

from trl_personal.cli import main
from trl_personal.evaluation import evaluate_model, score_pairs


evaluate_module = importlib.import_module("trl_personal.evaluation.evaluate")
USERS = {"ann": "shorter", "bo": "longer", "cy": "shorter", "di": "longer", "ed": "longer"}
FILES = {
    *("evaluation.json", "users.json", "users.parquet", "pairs.parquet", "accuracy_by_user.png", "user_map.png"),
    "training_curves.png",
}
MODEL = {"max_length": 32, "num_virtual_tokens": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
TRAINING = {
    **MODEL,
    "max_steps": 20,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def make_rows(num_prompts, users, shuffled=False, seed=0):
    """Each prompt has a short and a long answer, judged by most users according to their preference."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_prompts):
        prompt = " ".join(rng.choices(WORDS[5:], k=5))
        for user, preference in users.items():
            if rng.random() < 0.7:
                short, long = " yes", " no i like dogs the end"
                chosen, rejected = (short, long) if preference == "shorter" else (long, short)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": user})
    if shuffled:
        ids = [row["user_id"] for row in rows]
        rng.shuffle(ids)
        rows = [{**row, "user_id": user} for row, user in zip(rows, ids, strict=True)]
    return [{**row, "preference": users[row["user_id"]]} for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    for name in ("planted", "shuffled"):
        (root / name).mkdir()
        rows = {
            "train": make_rows(40, USERS, name == "shuffled", seed=0),
            "test": make_rows(25, USERS | {"new": "longer"}, name == "shuffled", seed=1),
        }
        for split, content in rows.items():
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return root


def train(folders, model_dirs, name, *more):
    out = folders / f"{name}_out"
    settings = [part for key, value in TRAINING.items() for part in (f"--{key}", str(value))]
    command = ["dpo", "--model_name_or_path", model_dirs["gptj"], "--dataset_name", str(folders / name)]
    assert main([*command, "--output_dir", str(out), *settings, *more]) == 0
    return out


@pytest.fixture(scope="module")
def planted(folders, model_dirs):
    """A LoRA with users who conflict."""
    return train(folders, model_dirs, "planted", "--use_peft", "--lora_target_modules", "q_proj", "v_proj")


def evaluate(capsys, *arguments):
    capsys.readouterr()
    code = main(["eval", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_planted_preferences_are_a_gain_and_the_files_agree(planted, folders, capsys):
    code, out, err = evaluate(
        capsys, planted, "--dataset_name", folders / "planted", "--baselines", "vanilla", "--opposite_column", "preference",
        "--generate", "2", "--max_new_tokens", "6", "--batch_size", "32", "--format", "json", "--list_users",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["verdict"].startswith("These users gain: +0.")
    assert found["has_gain"]
    assert found["gain"]["low"] > 0
    folder = planted.with_name(f"{planted.name}-evaluation")  # beside the model: an upload of it takes no ids along
    assert not (planted / "evaluation").exists()
    assert {path.name for path in folder.iterdir()} == FILES | {"length_by_user.png"}
    assert json.loads((folder / "evaluation.json").read_text()) == found
    users = json.loads((folder / "users.json").read_text())
    assert Dataset.from_parquet(str(folder / "users.parquet")).to_list() == users == found["users"]
    assert [user["user_id"] for user in users if not user["known"]] == ["new"]
    by_id = {user["user_id"]: user for user in users}
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet")).to_pandas()
    assert pairs["row"].tolist() == list(range(len(pairs)))
    for scorer in ("own", "generic", "swapped", "opposite", "vanilla"):
        for user, values in pairs.groupby("user_id")[scorer]:
            assert by_id[user][f"accuracy_{scorer}"] == (values > 0).mean()
            assert by_id[user][f"margin_{scorer}"] == pytest.approx(values.mean())
    unknown = pairs[pairs["user_id"] == "new"]
    np.testing.assert_allclose(unknown["own"], unknown["generic"], atol=1e-4)
    assert found["means"]["accuracy_opposite"] < found["means"]["accuracy_swapped"] < found["means"]["accuracy_own"]
    assert (by_id["ann"]["preference"], found["worst_user"]["opposite"] < 0.5) == ("shorter", True)
    assert by_id["ann"]["mean_chosen_length"] < by_id["bo"]["mean_chosen_length"]
    assert found["vanilla_accuracy"] == (pairs["vanilla"] > 0).mean()
    assert 0.5 < found["majority_share"] < 0.8
    assert found["length_by_preference"].keys() == {"longer", "shorter"}
    sample = found["samples"][0]
    words = len(sample["answers"]["ann"].split()) + len(found["samples"][1]["answers"]["ann"].split())
    reference = sum(len(sample["reference"].split()) for sample in found["samples"])
    assert by_id["ann"]["length_drift"] == pytest.approx((words - reference) / 2)


def test_answers_judge_and_probes_on_the_command_line(planted, folders, capsys, monkeypatch):
    """All at once: tables without ids, JSON with them only if asked for, the same numbers in both and in the files."""
    monkeypatch.chdir(folders)
    monkeypatch.setenv("COLUMNS", "200")
    (folders / "ruler.py").write_text(
        "def longer(prompts, pairs):\n    return [int(len(b) > len(a)) for a, b in pairs]\n"
    )
    rows = [json.loads(line) for line in (folders / "planted/test.jsonl").read_text().splitlines()]
    wishes = {"shorter": "please short", "longer": "please long"}
    (folders / "wished.jsonl").write_text(
        "".join(json.dumps({**row, "wish": wishes[row["preference"]]}) + "\n" for row in rows)
    )
    command = [
        planted, "--dataset_name", folders / "wished.jsonl", "--generate", "10", "--max_new_tokens", "6",
        "--wish_column", "wish", "--judge", "ruler:longer", "--probes", "--batch_size", "64", "--output_dir", folders / "all",
    ]  # fmt: skip
    code, out, err = evaluate(capsys, *command)
    assert code == 0, err
    for heading in ("Answers", "Win rate over the generic user", "What personalization costs", "ruler:longer prefers"):
        assert heading in out
    assert not [user for user in [*USERS, "new"] if re.search(rf"\b{user}\b", out)]
    found = json.loads((folders / "all/evaluation.json").read_text())
    assert out.splitlines()[-1] == found["overall_verdict"]
    assert found["overall_verdict"].startswith("Personal on pairs")
    users = {user["user_id"]: user for user in found["users"]}
    of_ann = next(user for user in found["answers"]["users"] if user["user_id"] == "ann")
    assert users["ann"]["nats_per_token"] == of_ann["means"]["nats_per_token"]["value"]
    assert users["ann"]["win_rate"] == found["judge"]["users"]["ann"]["rate"]["value"]
    assert users["ann"]["kl"] == found["probes"]["users"]["ann"]["kl"]["value"] > 0
    assert users["new"]["nats_per_token"] is None
    assert found["answers"]["num_prompts"] == found["judge"]["num_prompts"] == 10
    assert found["judge"]["users"].keys() == found["probes"]["users"].keys() == USERS.keys()
    words = np.mean([len(sample["answers"]["bo"].split()) for sample in found["samples"]])
    assert next(u for u in found["answers"]["users"] if u["user_id"] == "bo")["means"]["words"]["value"] == words
    code, out, err = evaluate(capsys, *command[:7], "--format", "json", "--output_dir", folders / "less")
    assert code == 0, err
    assert "users" not in json.loads(out)["answers"]
    assert json.loads(out)["judge"] is None


@pytest.mark.parametrize(
    ("conflicts", "expected"),
    [
        (("a", "a", "b", "b", "b"), {"ann": "bo", "bo": "ann", "cy": "di", "di": "cy", "ed": "cy"}),
        (("a", "b", "b", "a", "a"), {"ann": "di", "bo": "cy", "cy": "bo", "di": "ann", "ed": "ann"}),
        (None, {"ann": "bo", "bo": "ann", "cy": "di", "di": "cy", "ed": "ann"}),  # somebody is in two conflicts
    ],
)
def test_the_opposite_user_is_in_the_same_conflict(planted, folders, monkeypatch, conflicts, expected):
    rows = Dataset.from_json(str(folders / "planted/test.jsonl"))
    rows = rows.filter(lambda row: row["user_id"] in USERS)
    of_user = dict(zip(USERS, conflicts or ("a", "a", "b", "b", "b"), strict=True))
    column = [of_user[user] for user in rows["user_id"]]
    if conflicts is None:
        column[0] = "c"
    seen, score = [], score_pairs
    monkeypatch.setattr(
        evaluate_module, "score_pairs", lambda trainer, name, users: seen.append(users) or score(trainer, name, users)
    )
    rows = rows.add_column("conflict", column)
    evaluate_model(str(planted), rows, opposite_column="preference", batch_size=32, disable_tqdm=True)
    assert seen == [expected]


def test_each_held_out_pair_is_tokenized_once(planted, folders, monkeypatch):
    rows = Dataset.from_json(str(folders / "planted/test.jsonl"))
    prepared, prepare = [], DPOTrainer._prepare_dataset

    def count(self, dataset, *args):
        prepared.append(len(dataset))
        return prepare(self, dataset, *args)

    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", count)
    evaluation = evaluate_model(str(planted), rows, opposite_column="preference", batch_size=32, disable_tqdm=True)
    assert prepared == [2, len(rows)]  # the trainer insists on a train dataset: two rows
    assert len(evaluation.pairs) == len(rows)


@pytest.mark.slow
def test_shuffled_ids_are_no_evidence_of_gain_for_a_full_model(folders, model_dirs, capsys):
    out_dir = train(folders, model_dirs, "shuffled")
    common = [out_dir, "--dataset_name", folders / "shuffled", "--batch_size", "32"]
    code, _, err = evaluate(capsys, *common)
    assert (code, "Name it with `--ref_model`" in err) == (1, True)
    code, out, err = evaluate(
        capsys,
        *common,
        "--ref_model",
        model_dirs["gptj"],
        "--baselines",
        "vanilla",
        "--output_dir",
        folders / "numbers",
    )
    assert code == 0, err
    assert "No evidence of gain" in out
    assert not [user for user in [*USERS, "new"] if re.search(rf"\b{user}\b", out)]
    found = json.loads((folders / "numbers/evaluation.json").read_text())
    assert not found["has_gain"]
    assert {path.name for path in (folders / "numbers").iterdir()} == FILES


@pytest.mark.slow
def test_a_vanilla_folder_may_be_given(planted, folders, model_dirs, capsys):
    vanilla = train(
        folders, model_dirs, "planted", "--use_peft", "--lora_target_modules", "q_proj", "v_proj",
        "--user_model_kind", "none", "--output_dir", str(folders / "vanilla"),
    )  # fmt: skip
    assert vanilla  # the last --output_dir wins
    code, out, err = evaluate(
        capsys, planted, "--dataset_name", folders / "planted", "--vanilla", folders / "vanilla", "--format", "json",
        "--output_dir", folders / "with_vanilla",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert "users" not in found
    assert found["has_gain"]
    assert 0.4 < found["groups"]["known"]["accuracy"]["vanilla"]["value"] < 0.7


@pytest.mark.slow
def test_every_baseline(planted, folders):
    rows = {split: Dataset.from_json(str(folders / "planted" / f"{split}.jsonl")) for split in ("train", "test")}
    found = evaluate_model(
        str(planted), rows["test"], train_dataset=rows["train"], batch_size=32, disable_tqdm=True,
        baselines=["vanilla", "user_id_text", "in_context", "lora_per_user"], opposite_column="preference",
    )  # fmt: skip
    accuracy = {name: interval.value for name, interval in found.report.groups["known"].accuracy.items()}
    assert accuracy["own"] > 0.9
    assert accuracy["lora_per_user"] > 0.9
    for name in ("vanilla", "in_context"):
        assert 0.4 < accuracy[name] < 0.7
    assert accuracy["opposite"] < 0.1 < accuracy["swapped"]
    assert "not clearly better than" in found.report.verdict
    assert "a LoRA for each user" in found.report.verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--baselines", "best"],
            "There is no baseline 'best'. Choose from vanilla, user_id_text, in_context, lora_per_user.",
        ),
        (["--user_id_column", "who"], "has no column ['who']; found ['chosen', 'preference', 'prompt',"),
        (["--opposite_column", "taste"], "has no column ['taste']; found ['chosen', 'preference',"),
        (["--dataset_test_split", "dev"], "The dataset has no split 'dev' to evaluate on"),
        (["--vanilla", "some/where", "--baselines", "vanilla"], "leave one of them out"),
        (["--vanilla", "somewhere"], "There is no folder somewhere."),
        (["--judge", "best", "--generate", "2"], "There is no judge 'best'. Give a function `package.module:name`,"),
        (["--judge", "json:dumps"], "A judge compares answers, so there must be some: add `--generate N`."),
        (["--wish_column", "want"], "has no column ['want']; found ['chosen', 'preference',"),
        (["--train_dataset", "nowhere.jsonl", "--baselines", "vanilla"], "There is no file or folder nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_one_line(planted, folders, capsys, arguments, message):
    code, out, err = evaluate(capsys, planted, "--dataset_name", folders / "planted", *arguments)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]


def test_baselines_need_pairs_to_train_on(planted, folders, capsys):
    code, _, err = evaluate(
        capsys, planted, "--dataset_name", folders / "planted/test.jsonl", "--baselines", "vanilla"
    )
    assert code == 1
    assert "give them with `--train_dataset`" in err
    assert evaluate(capsys, planted, "--dataset_name", folders / "planted/test.jsonl")[0] == 0

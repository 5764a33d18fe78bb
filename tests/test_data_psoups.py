"""Personalized Soups, on invented rows in its three schemas and on the shared ones."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_personal.data.psoups import USER_PROFILES, load_psoups


SHARED = Path(__file__).parents[2] / "shared" / "data"
USERS = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]


def shared(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(user, prompt="What is tea?", a="A warm drink.", b="An infusion of leaves.", **kwargs):
    return {"user_id": user, "user_input": prompt, "completion_a": a, "completion_b": b} | kwargs


@pytest.fixture
def write(tmp_path):
    def write(rows, name="allcombo_8_cleaned.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path

    return write


def load(path, **kwargs):
    reports = []
    dataset = load_psoups(path, on_report=reports.append, **kwargs)
    return dataset, reports[0]


def every_pair(dataset):
    return [pair for split in dataset.values() for pair in split]


def test_completion_a_is_chosen_and_users_have_names_and_profiles(write):
    dataset, _ = load(write([row(2, " What is tea?\n")]), test_size=0)
    assert dataset["train"].to_list() == [
        {
            "prompt": "What is tea?",
            "chosen": "A warm drink.",
            "rejected": "An infusion of leaves.",
            "user_id": "P1B",
            "user_profile": USER_PROFILES["P1B"],
        }
    ]
    assert list(dataset) == ["train"]


def test_six_numbers_are_six_users_and_names_are_kept(write):
    dataset, _ = load(write([row(n) for n in range(1, 7)] + [row(name) for name in USERS]), test_size=0)
    assert dataset["train"]["user_id"][:] == USERS * 2


def test_conversational_gives_messages(write):
    dataset, _ = load(write([row(1)]), test_size=0, conversational=True)
    pair = dataset["train"][0]
    assert pair["prompt"] == [{"role": "user", "content": "What is tea?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "A warm drink."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "An infusion of leaves."}]


def test_a_prompt_is_in_one_split_for_all_users_in_any_order(write):
    rows = [row(user, f"Question {i}?") for user in range(1, 7) for i in range(200)]
    dataset, report = load(write(rows))
    prompts = {split: set(pairs["prompt"]) for split, pairs in dataset.items()}
    assert not prompts["train"] & prompts["test"]
    assert report.shared_prompts == 0
    assert report.pairs["train"] + report.pairs["test"] == 1200
    assert report.pairs["test"] == 6 * len(prompts["test"])
    assert 10 <= len(prompts["test"]) <= 32  # 10% of 200, by chance
    again, _ = load(write(rows[::-1][:900], "again.json"))  # other order, fewer rows: nobody changes sides
    assert set(again["test"]["prompt"]) == prompts["test"]
    assert set(load(write(rows), seed=1)[0]["test"]["prompt"]) != prompts["test"]


def test_held_out_users_and_the_prompts_of_train_never_meet(write):
    rows = [row(user, f"Question {i}?") for user in range(1, 7) for i in range(100)]
    rows += [row(user, f"Question {100 * user + i}?") for user in range(1, 7) for i in range(50)]  # each has own ones
    dataset, report = load(write(rows), test_size=0.2, unknown_users=1 / 3)
    assert list(dataset) == ["train", "test", "test_unknown_users"]
    users = {split: set(pairs["user_id"]) for split, pairs in dataset.items()}
    assert len(users["train"]) == 4
    assert len(users["test_unknown_users"]) == 2
    assert users["train"] == users["test"]
    assert not users["train"] & users["test_unknown_users"]
    prompts = {split: set(pairs["prompt"]) for split, pairs in dataset.items()}
    assert not prompts["train"] & (prompts["test"] | prompts["test_unknown_users"])
    left_out = report.filtered["the pair belongs to a held-out user, and its prompt is trained on"]
    assert sum(report.pairs.values()) + left_out == report.rows_read == 900
    assert report.pairs["test_unknown_users"] == 2 * 150 - left_out
    assert report.pairs["test_unknown_users"] > 2 * 50  # at least what only they were asked


def test_broken_rows_are_counted_with_their_reasons(write):
    rows = [row(1), row(7), row(None), row("P9"), row(1, "  "), row(1, a=None), row(1, b=5), "text"]
    rows += [row(1, b="A warm drink.")]
    _, report = load(write(rows), test_size=0)
    assert report.broken == {
        "`user_id` is none of the six users": 2,
        "no `user_id`": 1,
        "`user_input` is blank": 1,
        "no `completion_a`": 1,
        "`completion_b` is not text": 1,
        "not a JSON object": 1,
    }
    assert report.filtered == {"both answers are the same text": 1}
    assert (report.rows_read, report.pairs) == (9, {"train": 1})


def test_an_empty_test_split_is_a_warning(write, caplog):
    dataset, _ = load(write([row(1)]), test_size=1e-9)
    assert len(dataset["test"]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "test: 0 pairs" in caplog.text


@pytest.fixture
def rm_training(write, tmp_path):
    for user in USERS:
        ending = f"Generate a response as {user} likes it."
        rows = [row(user, f"Generate a response to {i}? {ending}") for i in (1, 2, 2)]
        for each in rows:
            del each["user_id"]
        write(rows, f"rm_training/{user}.json")
    return tmp_path / "rm_training"


def test_rm_training_loses_repeated_rows_and_the_preference_prompt(rm_training):
    dataset, report = load(rm_training, test_size=0)
    pairs = every_pair(dataset)
    assert len(pairs) == 12
    assert {pair["prompt"] for pair in pairs} == {"Generate a response to 1?", "Generate a response to 2?"}
    assert [pair["user_id"] for pair in pairs] == [user for user in USERS for _ in range(2)]
    assert report.rows_read == 18
    assert report.filtered == {"a repeated row": 6}


def test_rm_training_reports_rows_without_the_preference_prompt(rm_training, write):
    write([{"user_input": "Why?", "completion_a": "a", "completion_b": "b"}, "text"], "rm_training/P3B.json")
    _, report = load(rm_training, test_size=0)
    assert report.broken == {
        "`user_input` without an instruction or without the preference prompt": 1,
        "not a JSON object": 1,
    }


def test_incomplete_rm_training_names_the_files(rm_training):
    (rm_training / "P2A.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['P2A.json'\]; found \['P1A.json', 'P1B.json', 'P2B.json'"):
        load_psoups(rm_training)


def hub_rows(*prompts):
    return Dataset.from_list([{"uid": 3, "prompt": p, "chosen": "Yes.", "rejected": "No, never."} for p in prompts])


def test_hub_copy_keeps_its_own_splits_and_a_leak_is_reported(monkeypatch, caplog):
    hub = DatasetDict({"train": hub_rows("a", "b", "c"), "test": hub_rows("c", "d")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: hub)
    dataset, report = load("RiverDong/psoups", config_name="default")
    assert report.pairs == {"train": 3, "test": 2}
    assert dataset["train"]["user_id"][:] == ["P2A"] * 3
    assert report.shared_prompts == 1
    assert "leakage: 1 prompts of train occur in another split too" in caplog.text
    _, report = load("RiverDong/psoups", test_size=0.5)  # asked for a share: all rows are split anew
    assert report.shared_prompts == 0
    assert sum(report.pairs.values()) == 5


def test_default_is_the_hub_copy(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict({"train": hub_rows("a")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_psoups(revision="abc", test_size=0)
    assert calls == [(("RiverDong/psoups", None), {"revision": "abc"})]


def test_wrong_input_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match=r"has no column \['completion_a', .*found \['answer'\].*use `load_generic`"):
        load_psoups(write([{"answer": "x"}]))
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load_psoups(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="`test_size` is a share, at least 0 and below 1, found 1.5"):
        load_psoups(write([row(1)]), test_size=1.5)
    with pytest.raises(ValueError, match="`unknown_users` is a share"):
        load_psoups(write([row(1)]), unknown_users=-0.1)
    (tmp_path / "cut.json").write_text('[{"user_id": 1, ')
    with pytest.raises(ValueError, match="cut.json is not JSON .* cut off or damaged"):
        load_psoups(tmp_path / "cut.json")


def test_demos_counts_equal_their_readme():
    dataset, report = load(shared(SHARED / "psoups_demos" / "allcombo_8_cleaned.json"), test_size=0)
    assert report.pairs == {"train": 72}
    assert (report.rows_read, report.broken, report.filtered) == (72, {}, {})
    users = dataset["train"]["user_id"][:]
    assert {user: users.count(user) for user in USERS} == dict.fromkeys(USERS, 12)
    # every pair occurs in both orders, so that a model blind to users is right half the time
    orders = {(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in dataset["train"]}
    assert {(prompt, rejected, chosen) for prompt, chosen, rejected in orders} == orders


def test_style_counts_equal_their_readme():
    path = shared(SHARED / "psoups_style_tulu" / "allcombo_8_cleaned.json")
    dataset, report = load(path)
    assert sum(report.pairs.values()) == report.rows_read == 748
    assert (report.broken, report.filtered, report.shared_prompts) == ({}, {}, 0)
    users = [pair["user_id"] for pair in every_pair(dataset)]
    assert sorted(users.count(user) for user in USERS) == [61, 61, 133, 133, 180, 180]
    lines = (path.parent / "psoups_style_tulu.jsonl").read_text(encoding="utf-8").splitlines()
    columns = ("user_id", "prompt", "chosen", "rejected")
    expected = {tuple(json.loads(line)[column].strip() for column in columns) for line in lines}
    assert {tuple(pair[column].strip() for column in columns) for pair in every_pair(dataset)} == expected


def test_authors_archive_has_the_papers_counts():
    dataset, report = load(shared(SHARED / "psoups" / "rm_training"), test_size=0)
    assert report.rows_read == 48_300 + 48_825 + 47_350 + 49_220 + 49_155 + 48_565
    users = dataset["train"]["user_id"][:]
    assert [users.count(user) for user in USERS] == [8959, 9069, 8239, 8626, 9356, 9222]

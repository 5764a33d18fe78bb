"""The data of the commands: one door for every form, file type, mixture and stream, with messages in the words of flags."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset
from PIL import Image as Picture
from trl import DatasetMixtureConfig, ScriptArguments

from trl_personal.cli import dpo, main
from trl_personal.cli.arguments import ColumnArguments
from trl_personal.cli.preferences import load_preferences, select_split
from trl_personal.cli.wrong_flags import find_wrong_flag, flags_of_dpo
from trl_personal.data import load_generic
from trl_personal.training.settings import read_training_settings


def pair(user="ann", number=0, **kwargs):
    return {"prompt": f"q{number}?", "chosen": "yes", "rejected": "no", "user_id": user} | kwargs


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def load(path, columns=None, *, streaming=False, **kwargs):
    script = ScriptArguments(dataset_name=str(path), dataset_streaming=streaming)
    return load_preferences(script, DatasetMixtureConfig(), columns, **kwargs)


def mix(*parts, **kwargs):
    return load_preferences(ScriptArguments(), DatasetMixtureConfig(datasets=list(parts), **kwargs))


# --- Forms of preferences -------------------------------------------------------------------------------------------------


def judged(user, a, b, **kwargs):
    return {"who": user, "question": "q?", "a": a, "b": b} | kwargs


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_choices_ratings_and_rankings_are_read_by_flags_as_by_arguments(suffix, tmp_path):
    rows = [judged("ann", "x", "y", best="A", ra=1.0, rb=2.0), judged("bo", "x", "y", best="draw", ra=3.0, rb=3.0)]
    path, table = tmp_path / f"rows.{suffix}", Dataset.from_list(rows)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix](path)
    names = {"prompt_column": "question", "response_columns": ["a", "b"]}
    by_flags = [
        {"choice_column": "best", "choice_values": ["A=0", "B=1", "draw=tie"]},
        {"rating_columns": ["ra", "rb"]},
        {"ranking_columns": ["ra", "rb"]},
    ]
    by_arguments = [
        {"choice": "best", "choice_values": {"A": 0, "B": 1, "draw": None}},
        {"ratings": ("ra", "rb")},
        {"ranking": ("ra", "rb")},
    ]
    for flags, arguments, chosen in zip(by_flags, by_arguments, ("x", "y", "x"), strict=True):
        for ties, number in (("skip", 1), ("both", 3)):
            columns = ColumnArguments(**names, **flags, ties=ties)
            found = load(path, columns, user_id_column="who")["train"]
            options = {"user_id": "who", "prompt": "question", "responses": ("a", "b"), "ties": ties, "test_size": 0}
            loaded = load_generic(path, **options, **arguments)["train"].rename_column("user_id", "who")
            assert found.to_list() == loaded.to_list()
            assert (len(found), found["chosen"][0]) == (number, chosen)
            assert list(load(path, columns, user_id_column="who", streaming=True)["train"]) == loaded.to_list()


def test_dpo_trains_on_choices(model_dirs, tmp_path):
    rows = [judged(user, " yes", " no i like", best=best) for user, best in (("ann", "A"), ("bo", "B"))] * 2
    path = jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["dpo", "--model_name_or_path", model_dirs["gptj"], "--dataset_name", str(path), "--user_id_column", "who"]
    argv += ["--prompt_column", "question", "--response_columns", "a", "b", "--choice_column", "best"]
    argv += ["--choice_values", "A=0", "B=1", "--max_steps", "1", "--max_length", "32", "--save_strategy", "no"]
    assert (
        main([*argv, "--num_virtual_tokens", "2", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out")])
        == 0
    )
    assert json.loads((tmp_path / "out/user_model/users.json").read_text()) == {"ann": 1, "bo": 2}
    assert read_training_settings(str(tmp_path / "out"))["user_id_column"] == "who"


def test_columns_may_stand_in_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model_name_or_path: m\ndataset_name: d\nprompt_column: question\nresponse_columns: [a, b]\nchoice_column: best\n"
        "choice_values: ['A=0', 'B=tie']\n"
    )
    columns = dpo.parse(dpo.make_parser(), ["--config", str(tmp_path / "c.yaml")])[4]
    assert (columns.prompt_column, columns.response_columns) == ("question", ["a", "b"])
    assert columns.choice_values == ["A=0", "B=tie"]


def test_answers_that_begin_with_the_prompt_need_no_column_for_it(tmp_path):
    rows = [{"user_id": "ann", "chosen": "Tea? Yes.", "rejected": "Tea? No."}]
    found = load(jsonl(tmp_path / "rows.jsonl", rows))["train"].to_list()
    assert found == [{"prompt": "Tea?", "chosen": " Yes.", "rejected": " No.", "user_id": "ann"}]
    rows = [{"user_id": "ann", "question": "Tea?", "chosen": "Yes.", "rejected": "No."}]
    with pytest.raises(ValueError, match=r"no column \['prompt'\].*Did you mean `--prompt_column question`\?"):
        load(jsonl(tmp_path / "rows.jsonl", rows))


# --- Files and folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json.gz", "csv.gz", "ndjson"])
def test_compressed_files_are_read(suffix, tmp_path):
    rows = [pair("ann", 0), pair("bo", 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix.startswith("csv"):
        text = "prompt,chosen,rejected,user_id\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert load(path)["train"].to_list() == rows
    assert list(load(path, streaming=True)["train"]) == rows


@pytest.mark.parametrize(
    "name",
    ["train.jsonl,dev.jsonl", "data/train-00000-of-00001.jsonl,data/validation-1.jsonl", "train/a.jsonl,val/b.jsonl"],
)
def test_files_named_after_splits_are_splits(name, tmp_path):
    for number, file in enumerate(name.split(",")):
        jsonl(tmp_path / "d" / file, [pair("ann", number)])
    found = load(tmp_path / "d")
    assert {split: rows["prompt"][:] for split, rows in found.items()} == {"train": ["q0?"], "validation": ["q1?"]}
    assert list(load_generic(tmp_path / "d")) == ["train", "validation"]


def test_a_card_says_which_files_are_which(tmp_path):
    jsonl(tmp_path / "d/one.jsonl", [pair("ann", 1)])
    jsonl(tmp_path / "d/two.jsonl", [pair("ann", 2), "{\n"])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.jsonl\n---\n"
    (tmp_path / "d/README.md").write_text(card)
    assert load(tmp_path / "d")["train"]["prompt"][:] == ["q2?"]


def test_a_table_of_pairs_keeps_its_other_columns(tmp_path):
    picture = [Picture.new("RGB", (2, 2))]
    rows = [{**pair(0, 9), "turn": 9, "images": picture, "rejected": "yes"}]
    rows += [{**pair(user, n), "turn": n, "images": picture} for n, user in enumerate((1, 0, -1))]
    table = Dataset.from_list(rows).cast_column("user_id", ClassLabel(names=["ann", "bo"]))
    DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")
    found = load(tmp_path / "saved")
    assert found["train"].features["images"].feature == Image()
    assert [(row["user_id"], row["turn"]) for row in found["train"]] == [("bo", 0), ("ann", 1), (None, 2)]
    assert found["test"]["user_id"][:] == ["bo"]


def test_images_beside_text_are_refused_and_not_dropped(tmp_path):
    with pytest.raises(ValueError, match="has the column 'images', which only tables of pairs can hold"):
        load(jsonl(tmp_path / "rows.jsonl", [pair(images=["a.png"])]))


def test_a_column_of_floats_is_integers_with_a_gap(tmp_path):
    Dataset.from_list([pair(12.0, 0), pair(None, 1), pair(7.0, 2), pair(7.5, 3)]).to_parquet(tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet")["train"]["user_id"][:] == ["12", None, "7"]
    assert load_generic(tmp_path / "rows.parquet", test_size=0)["train"]["user_id"][:] == ["12", "7"]


# --- Mixtures and streams -------------------------------------------------------------------------------------------------


def test_a_mixture_reads_each_part_as_a_dataset(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [pair("ann", 0), "{broken\n", pair("bo", 1)])
    Dataset.from_list([pair("cy", 2, extra=1), pair("cy", 3, rejected="yes", extra=1)]).to_parquet(
        tmp_path / "two.parquet"
    )
    jsonl(tmp_path / "d/train.jsonl", [pair("di", 4)])
    jsonl(tmp_path / "d/test.jsonl", [pair("ed", n) for n in range(5, 9)])
    parts = [
        {"path": "json", "data_files": str(one)},
        {"path": str(tmp_path / "two.parquet"), "columns": ["prompt", "chosen", "rejected", "user_id"]},
        {"path": str(tmp_path / "d")},
        {"path": str(tmp_path / "d"), "split": "test[1:3]"},
    ]
    found = mix(*parts)["train"]
    assert [(row["user_id"], row["prompt"]) for row in found] == [
        ("ann", "q0?"), ("bo", "q1?"), ("cy", "q2?"), ("di", "q4?"), ("ed", "q6?"), ("ed", "q7?"),
    ]  # fmt: skip
    assert found.column_names == ["prompt", "chosen", "rejected", "user_id"]
    assert {split: len(rows) for split, rows in mix(*parts, test_split_size=2).items()} == {"train": 4, "test": 2}
    stream = mix(*parts[:3], streaming=True)["train"]
    assert isinstance(stream, IterableDataset)
    assert [row["user_id"] for row in stream] == ["ann", "bo", "cy", "di"]


def test_shares_of_a_mixture_are_those_of_trl(tmp_path):
    parts = [
        {"path": str(jsonl(tmp_path / f"{name}.jsonl", [pair(name, n) for n in range(size)])), "fraction": share}
        for name, size, share in (("ann", 8, 1), ("bo", 9, 3))
    ]
    assert mix(*parts)["train"]["user_id"][:] == ["ann"] * 3 + ["bo"] * 9
    del parts[0]["fraction"]
    with pytest.raises(ValueError, match="`fraction` must be set for all"):
        mix(*parts)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "json", "data_files": "gone.jsonl"}, "There is no file gone.jsonl"),
        ({"path": "gone/"}, "There is no file or folder gone/"),
        ({"path": "d", "split": "dev"}, r"d has no split 'dev'; found \['train'\]"),
    ],
)
def test_a_part_that_is_not_there_is_named(part, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "d/rows.jsonl", [pair()])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mix(part)


def test_the_report_of_a_stream_comes_once_when_it_was_read_to_its_end(tmp_path):
    reports = []
    path = jsonl(tmp_path / "rows.jsonl", [pair(), "{\n", pair("bo", 1)])
    stream = load(path, streaming=True, on_report=reports.append)["train"]
    assert next(iter(stream))["user_id"] == "ann"
    assert reports == []
    assert len(list(stream)) == len(list(stream)) == 2
    assert [(report.rows_read, report.broken) for report in reports] == [(3, {"not JSON": 1})]


# --- Messages -------------------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_on_the_screen(tmp_path, caplog, capsys):
    path = jsonl(tmp_path / "rows.jsonl", [pair(), "{\n", pair("bo", 1, rejected="yes"), pair("Ann", 2), pair(" ", 3)])
    assert main(["audit", str(path), "--format", "json"]) == 0
    assert f"broken: 1 x not JSON, first in {path}, line 2" in caplog.text
    assert f"filtered: 1 x both responses are the same, first in {path}, line 3" in caplog.text
    assert "variants: 2 user ids are 1 but for white space" in caplog.text
    found = json.loads(capsys.readouterr().out)
    assert "1 x `user_id` is blank, 1 x both responses are the same, 1 x not JSON." in found["notes"][0]
    assert found["notes"][1].startswith("2 user ids are 1 but for")
    assert "variants" not in found
    assert "ann" not in caplog.text.lower().replace("screen", "")
    assert main(["audit", str(path), "--list_users"]) == 0
    assert "perhaps one user: 'ann', 'Ann'" in capsys.readouterr().out


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path):
    jsonl(tmp_path / "train.jsonl", [pair()])
    jsonl(tmp_path / "test.jsonl", [pair(rejected="yes")])
    found = load(tmp_path)
    assert len(select_split(found, "train", "train")) == 1
    with pytest.raises(ValueError, match="No pair is left in the split 'test'"):
        select_split(found, "test", "test")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model_name_or_path", "./gone", "--dataset_name", "{data}"],
            "There is no folder ./gone. Give one that holds a model",
        ),
        (["--model_name_or_path", "a/b/c", "--dataset_name", "{data}"], "There is no folder a/b/c."),
        (["--model_name_or_path", "m", "--dataset_name", "gone"], "There is no file or folder gone."),
        (["--model_name_or_path", "m", "--dataset_name", ".."], "holds"),
        (
            ["--model_name_or_path", "m", "--dataset_name", "{data}", "--user_id_column", "who"],
            "has no column ['who']; found",
        ),
    ],
)
def test_what_is_not_there_is_told_before_a_hub_is_asked(argv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a hub was asked"))
    data = str(jsonl(tmp_path / "d/rows.txt" if ".." in argv else tmp_path / "rows.jsonl", [pair()]))
    assert main(["dpo", *(part.format(data=data) for part in argv)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("trl-personal dpo: error: ")
    assert message in last


def test_every_flag_of_trl_and_accelerate_is_known_before_they_are_imported():
    from accelerate.commands.launch import launch_command_parser

    for parser in (dpo.make_parser(), launch_command_parser()):
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        assert len(flags) > 50
        assert [flag for flag in flags if find_wrong_flag([flag]) is not None] == []
    assert find_wrong_flag(["--user_model_knd", "x"]).endswith("Did you mean --user_model_kind?")
    assert len(flags_of_dpo()) < 1000

"""Any preference data with users: four forms, several file types, and the arithmetic of ties, ratings and ranks."""

import csv
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_personal.data.generic import load_generic
from trl_personal.data.splits import HeldOut


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """Write rows as the file type that the name asks for."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def load(path, test_size=0, **kwargs):
    reports = []
    dataset = load_generic(path, test_size=test_size, on_report=reports.append, **kwargs)
    return dataset, reports[0]


def orders(dataset, split="train"):
    return [(row["chosen"], row["rejected"]) for row in dataset[split]]


def pair(user="u1", prompt="Tea?", chosen="Green.", rejected="Black.", **kwargs):
    return {"user_id": user, "prompt": prompt, "chosen": chosen, "rejected": rejected} | kwargs


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_every_file_type_gives_the_same_pairs(name, write):
    rows = [pair(user="007"), pair(user="7", prompt='A, "b"\tand\nc?'), pair(user="NA", chosen="null")]
    dataset, report = load(write(rows, name))
    assert dataset["train"].to_list() == [
        {k: row[k] for k in ("prompt", "chosen", "rejected", "user_id")} for row in rows
    ]
    assert (report.rows_read, report.pairs, report.users) == (3, {"train": 3}, {"train": 3})


def test_columns_can_have_any_name_and_the_profile_comes_along(write):
    rows = [{"judge": 3, "q": "Tea?", "good": "Green.", "bad": "Black.", "about": "Likes tea."}]
    rows += [{"judge": 4, "q": "Tea?", "good": "Black.", "bad": "Green."}]  # JSON may leave out a field
    names = {"user_id": "judge", "prompt": "q", "chosen": "good", "rejected": "bad", "user_profile": "about"}
    dataset, _ = load(write(rows), **names)
    assert dataset["train"].to_list() == [
        {"prompt": "Tea?", "chosen": "Green.", "rejected": "Black.", "user_id": "3", "user_profile": "Likes tea."},
        {"prompt": "Tea?", "chosen": "Black.", "rejected": "Green.", "user_id": "4", "user_profile": None},
    ]


def judgement(winner, **kwargs):
    return {"user_id": "u", "prompt": "p", "a": "A.", "b": "B.", "winner": winner} | kwargs


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_choice_is_a_number_or_a_column(name, write):
    path = write([judgement(0), judgement(1), judgement("a"), judgement("b")], name)
    dataset, _ = load(path, responses=("a", "b"), choice="winner")
    assert orders(dataset) == [("A.", "B."), ("B.", "A.")] * 2


def test_choice_may_be_a_whole_float_as_pandas_makes_of_integers(write):
    path = write([judgement(0.0), judgement(1.0), judgement(None)], "rows.parquet")
    dataset, report = load(path, responses=("a", "b"), choice="winner")
    assert orders(dataset) == [("A.", "B."), ("B.", "A.")]
    assert report.broken == {"no `winner`": 1}


def test_choice_values_explain_a_choice(write):
    rows = [judgement("model_a"), judgement("model_b"), judgement("draw"), judgement("lost"), judgement(None)]
    values = {"model_a": 0, "model_b": 1, "draw": None}
    dataset, report = load(write(rows), responses=("a", "b"), choice="winner", choice_values=values)
    assert orders(dataset) == [("A.", "B."), ("B.", "A.")]
    assert report.filtered == {"a tie": 1}
    assert report.broken == {"`winner` has a value that is not in `choice_values`": 2}
    values = {"draw": 2, "model_a": 0, "model_b": 1, "lost": 0}
    _, report = load(write(rows), responses=("a", "b"), choice="winner", choice_values=values)
    assert report.broken["`choice_values` gives `winner` a number that no response has"] == 1


def test_choice_from_one(write):
    rows = [judgement(1), judgement(2), judgement(0)]  # 0 is a tie, as in PandaLM's labels
    dataset, report = load(write(rows), responses=["a", "b"], choice="winner", choice_values={1: 0, 2: 1, 0: None})
    assert orders(dataset) == [("A.", "B."), ("B.", "A.")]
    assert report.filtered == {"a tie": 1}


def test_a_choice_that_is_none_is_broken(write):
    rows = [judgement(0), judgement(2), judgement("c"), judgement(None), judgement(""), judgement(-1), judgement(0.5)]
    _, report = load(write(rows), responses=("a", "b"), choice="winner")
    assert report.broken == {
        "`winner` is no number of a response; `choice_values` can explain it": 4,
        "no `winner`": 2,
    }
    assert report.rows_read == report.pairs["train"] + sum(report.broken.values())


def test_ties_are_counted_or_go_both_ways(write):
    path = write([judgement(0), judgement("tie"), judgement("Tie (both bad)")])
    dataset, report = load(path, responses=("a", "b"), choice="winner")
    assert (len(dataset["train"]), report.filtered) == (1, {"a tie": 2})
    dataset, report = load(path, responses=("a", "b"), choice="winner", ties="both")
    assert orders(dataset) == [("A.", "B.")] + [("A.", "B."), ("B.", "A.")] * 2
    assert report.filtered == {}


def test_best_of_several_pairs_with_each_other_one(write):
    rows = [{"user_id": 1, "prompt": "p", "answers": ["x", "y", "z"], "best": 1}]
    dataset, _ = load(write(rows), responses="answers", choice="best")
    assert orders(dataset) == [("y", "x"), ("y", "z")]


@pytest.mark.parametrize(("column", "values"), [("ratings", [3, 5, 3, 1.5]), ("ranking", [2, 1, 2, 3])])
def test_ratings_and_ranks_pair_better_with_worse(column, values, write):
    rows = [{"user_id": 1, "prompt": "p", "answers": ["x", "y", "z", "w"], "score": values}]
    dataset, report = load(write(rows), responses="answers", **{column: "score"})
    assert orders(dataset) == [("y", "x"), ("x", "w"), ("y", "z"), ("y", "w"), ("z", "w")]
    assert report.filtered == {"a tie": 1}
    dataset, _ = load(write(rows), responses="answers", ties="both", **{column: "score"})
    assert sorted(orders(dataset)) == sorted(
        [("y", "x"), ("x", "w"), ("y", "z"), ("y", "w"), ("z", "w"), ("x", "z"), ("z", "x")]
    )


def test_ratings_in_columns_of_text(write):
    rows = [{"user_id": "u", "prompt": "p", "a": "A.", "b": "B.", "ra": "9", "rb": "10"}]
    dataset, _ = load(write(rows, "rows.csv"), responses=("a", "b"), ratings=("ra", "rb"))
    assert orders(dataset) == [("B.", "A.")]  # as numbers, not as texts


def test_ratings_that_do_not_fit_are_broken(write):
    def rated(scores, answers=("x", "y")):
        return {"user_id": 1, "prompt": "p", "answers": list(answers), "score": scores}

    rows = [rated([1, 2]), rated([1]), rated([1, None]), rated([1, "good"]), rated([1, float("nan")]), rated(None)]
    rows += [rated([1], ["x"]), rated([1, 2], ["x", "x"]), rated([1, 2, 3], ["x", " ", "y"])]
    dataset, report = load(write(rows), responses="answers", ratings="score")
    assert orders(dataset) == [("y", "x"), ("y", "x")]
    assert report.broken == {
        "`score` has not as many values as there are responses": 1,
        "`score` has no number": 3,
        "`score` is not a list": 1,
        "`answers` is blank": 1,
    }
    assert report.filtered == {"fewer than two responses": 1, "both responses are the same": 1}
    assert report.rows_read == 9


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_one_rated_response_a_row_is_put_together_by_user_and_prompt(name, write):
    def rated(user, prompt, answer, score):
        return {"user_id": user, "prompt": prompt, "answer": answer, "score": score}

    rows = [rated("u", "p", "x", 1), rated("v", "p", "x", 9), rated("u", "q", "z", 3), rated("u", "p", "y", 2)]
    rows += [rated("v", "p", "y", 3), rated("v", "p", "w", 5), rated("", "p", "y", 3)]
    dataset, report = load(write(rows, name), responses="answer", ratings="score")
    found = [(row["user_id"], row["prompt"], row["chosen"], row["rejected"]) for row in dataset["train"]]
    assert found == [("u", "p", "y", "x"), ("v", "p", "x", "y"), ("v", "p", "x", "w"), ("v", "p", "w", "y")]
    assert report.filtered == {"fewer than two responses": 1}
    assert report.broken == {"no `user_id`": 1}
    assert report.rows_read == 7
    ranked, _ = load(write(rows, name), responses="answer", ranking="score")
    assert ("u", "x") in [(row["user_id"], row["chosen"]) for row in ranked["train"]]


def message(role, content, **kwargs):
    return {"role": role, "content": content} | kwargs


def test_messages_stay_messages(write):
    row = pair(
        prompt=[message("system", "Be kind."), message("user", "Tea?", name="x")],
        chosen=[message("assistant", "Green.")],
        rejected=[message("assistant", "Black.")],
    )
    for name in ("rows.jsonl", "rows.parquet"):
        dataset, _ = load(write([row], name))
        assert dataset["train"]["prompt"][0] == [message("system", "Be kind."), message("user", "Tea?")]
        assert dataset["train"]["chosen"][0] == [message("assistant", "Green.")]


def test_prompt_is_what_two_conversations_share(write):
    shared = [message("user", "Tea?"), message("assistant", "Which?"), message("user", "Green.")]
    rows = [
        {
            "judge": "arena_user_1",
            "conversation_a": [*shared, message("assistant", "Here.")],
            "conversation_b": [*shared, message("assistant", "No.")],
            "winner": winner,
        }
        for winner in ("model_a", "model_b", "tie")
    ]
    values = {"model_a": 0, "model_b": 1, "tie": None}
    columns = {
        "user_id": "judge",
        "prompt": None,
        "responses": ("conversation_a", "conversation_b"),
        "choice": "winner",
    }
    dataset, report = load(write(rows), choice_values=values, **columns)
    assert dataset["train"]["prompt"][:] == [shared, shared]
    assert orders(dataset) == [
        ([message("assistant", "Here.")], [message("assistant", "No.")]),
        ([message("assistant", "No.")], [message("assistant", "Here.")]),
    ]
    assert report.filtered == {"a tie": 1}


def test_conversations_without_a_shared_start_are_broken(write):
    good = pair(
        chosen=[message("user", "a"), message("assistant", "b")],
        rejected=[message("user", "a"), message("assistant", "c")],
    )
    other = pair(chosen=[message("user", "a")], rejected=[message("user", "b")])
    part = pair(chosen=[message("user", "a"), message("assistant", "b")], rejected=[message("user", "a")])
    empty = pair(
        chosen=[message("user", "a"), message("assistant", "b")],
        rejected=[message("user", "a"), message("assistant", "")],
    )
    text = pair()
    _, report = load(write([good, other, part, empty, text]), prompt=None)
    assert report.pairs == {"train": 1}
    assert report.broken == {
        "two conversations that share no start, or one of which goes on where the other ends": 2,
        "`rejected` has a message without text": 1,
        "`chosen` is not a list of messages": 1,
        "`rejected` is not a list of messages": 1,
    }


def test_all_turns_of_a_conversation_are_in_one_split(write):
    def turns(number):
        start = [message("system", "Be kind."), message("user", f"Q{number}?")]
        later = [*start, message("assistant", "So?"), message("user", "And?")]
        answers = {"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}
        return [{"user_id": "u", "prompt": prompt, **answers} for prompt in (start, later)]

    dataset, report = load(write([row for i in range(60) for row in turns(i)]), test_size=0.3)
    questions = {split: {row["prompt"][1]["content"] for row in rows} for split, rows in dataset.items()}
    assert not questions["train"] & questions["test"]
    assert report.pairs["test"] == 2 * len(questions["test"]) > 0
    assert report.pairs["train"] == 2 * len(questions["train"]) > 0  # the system message does not count


def test_broken_rows_are_counted_with_their_reasons(write):
    rows = [pair(), "{", pair(user=None), pair(user=1.5), pair(user=True), pair(prompt=""), pair(chosen=None)]
    rows += [pair(rejected=["x"]), pair(chosen=None, rejected=" "), pair(chosen="Black."), pair(chosen="\ud83d")]
    dataset, report = load(write(rows))
    assert report.broken == {
        "not JSON": 1,
        "no `user_id`": 1,
        "`user_id` is neither text nor a whole number": 2,
        "`prompt` is blank": 1,
        "no `chosen`": 2,
        "`rejected` is not text": 1,
        "`rejected` is blank": 1,
        "`chosen` is not valid Unicode": 1,  # half of an emoji
    }
    assert report.filtered == {"both responses are the same": 1}
    assert (report.rows_read, len(dataset["train"])) == (11, 1)


def test_split_column_decides(write):
    words = ["train", "test", "validation", "dev", "Train", "eval_2", "other", None]
    rows = [pair(prompt=f"p{i}", part=word) for i, word in enumerate(words)]
    _, report = load(write(rows), test_size=None, split="part")
    assert report.pairs == {"train": 2, "test": 4}
    assert report.broken == {"`part` is neither train nor a word for test": 1, "no `part`": 1}
    with pytest.raises(ValueError, match="leave out either it or `test_size`"):
        load(write(rows), split="part", test_size=0.1)


def test_a_leak_of_the_split_column_is_a_warning(write, caplog):
    rows = [pair(prompt="a", part="train"), pair(prompt="b", part="train"), pair(prompt="a", part="test")]
    _, report = load(write(rows), test_size=None, split="part")
    assert report.shared_prompts == 1
    assert "leakage: 1 prompts of train occur in another split too" in caplog.text


def test_splits_of_the_source_are_kept_unless_a_share_is_given(monkeypatch):
    hub = {
        name: Dataset.from_list([pair(prompt=f"{name} {i}") for i in range(20)]) for name in ("train", "test", "ood")
    }
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict(hub)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset, report = load("owner/set", test_size=None, config_name="default", revision="v1")
    assert calls == [(("owner/set", "default"), {"revision": "v1"})]
    assert report.pairs == {"train": 20, "test": 20, "ood": 20}
    assert {split: rows["prompt"][:] for split, rows in dataset.items()} == {
        s: rows["prompt"][:] for s, rows in hub.items()
    }
    assert load("owner/set", test_size=0.5)[0].keys() == {"train", "test"}
    assert load("owner/set", test_size=None)[0].keys() == {"train", "test", "ood"}


def test_a_source_with_one_split_loses_a_tenth_of_its_prompts(write):
    dataset, _ = load(write([pair(prompt=f"p{i}") for i in range(400)]), test_size=None)
    assert dataset.keys() == {"train", "test"}
    assert 20 <= len(dataset["test"]) <= 60


def test_a_folder_of_files_is_read_whole(write, tmp_path):
    (tmp_path / "shards").mkdir()
    for k in range(4):
        write([pair(user=i % 3, prompt=f"p{k} {i}") for i in range(30)], f"shards/{k}.jsonl")
    dataset, report = load(tmp_path / "shards", test_size=0.2)
    assert report.rows_read == 120
    prompts = {prompt for rows in dataset.values() for prompt in rows["prompt"]}
    assert prompts == {f"p{k} {i}" for k in range(4) for i in range(30)}


def test_same_file_same_options_same_rows(write):
    path = write([pair(user=i % 3, prompt=f"p{i}") for i in range(50)])
    first, second = (load(path, test_size=0.2, unknown_users=0.3, seed=5)[0] for _ in range(2))
    assert {s: rows.to_list() for s, rows in first.items()} == {s: rows.to_list() for s, rows in second.items()}


def test_rows_are_read_anew_when_the_file_changes(write):
    assert len(load(write([pair()]))[0]["train"]) == 1
    assert len(load(write([pair(), pair(user=2)]))[0]["train"]) == 2


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.25, 5), (0.5, 10), (0.99, 19)])
def test_held_out_users_are_at_least_one_and_never_all(share, number):
    rule = HeldOut(test_size=0, unknown_users=share).after([(f"u{i}", f"p{i}") for i in range(20)])
    assert len(rule.held_out_users) == number
    places = {rule.place(f"u{i}", f"p{i}") for i in range(20)}
    assert places == {"train", "test_unknown_users"} == set(rule.names)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ties": "half"}, '`ties` must be "skip" or "both", found \'half\''),
        ({"choice": "winner"}, "`choice` needs `responses`"),
        ({"responses": ("a", "b")}, r"exactly one of `choice`, `ratings` and `ranking`, found none"),
        ({"responses": "a", "ratings": "r", "ranking": "k"}, r"found \['ratings', 'ranking'\]"),
        ({"choice_values": {"a": 0}}, "`choice_values` says what the values of `choice` mean"),
        ({"responses": "a", "choice": "c", "choice_values": {"a": -1}}, "must lead to numbers from 0 or `None`"),
        ({"user_id": "annotator"}, r"no column \['annotator'\]; found \['chosen', 'prompt', 'rejected', 'user_id'\]"),
        ({"unknown_users": 1}, "`unknown_users` is a share"),
    ],
)
def test_options_that_do_not_fit_are_refused(kwargs, message, write):
    with pytest.raises(ValueError, match=message):
        load(write([pair()]), **kwargs)


def test_files_that_do_not_fit_are_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load(tmp_path / "gone.parquet")
    write([pair()], "one.csv")
    write([pair()], "two.jsonl")
    with pytest.raises(ValueError, match=r"found \['.csv', '.jsonl'\]. Name a single file"):
        load(tmp_path)
    (tmp_path / "object.json").write_text('{"train": []}')
    with pytest.raises(ValueError, match="no column"):
        load(tmp_path / "object.json")


def test_text_among_messages_becomes_a_message(write):
    answers = {"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}
    dataset, _ = load(write([pair(prompt="Tea?", **answers)]))
    assert dataset["train"]["prompt"][:] == [[message("user", "Tea?")]]
    dataset, _ = load(write([pair(prompt=[message("user", "Tea?")], chosen="a", rejected="b")]))
    assert dataset["train"]["prompt"][:] == [[message("user", "Tea?")]]
    assert orders(dataset) == [(answers["chosen"], answers["rejected"])]


def test_prompt_is_what_two_texts_share_up_to_a_space(write):
    dataset, _ = load(write([pair(chosen="Tea? Green.", rejected="Tea? Black.")]), prompt=None)
    assert dataset["train"]["prompt"][:] == ["Tea?"]
    assert orders(dataset) == [(" Green.", " Black.")]
    with pytest.raises(ValueError, match=r"1 x no prompt, and two texts that share no start, first in .*, line 1"):
        load(write([pair()]), prompt=None)


@pytest.mark.parametrize(
    ("name", "train", "test", "users", "shared_prompts"),
    [
        ("ukpconvarg_workers", 1032, 228, 40, 14),  # split by pair of arguments: each of the 14 debates is in both
        ("psoups_style_tulu", 592, 156, 6, 0),
        ("psoups_demos", 72, 0, 6, 0),
        ("prism_synthesizeme", 69, 15, 18, 0),
        ("squality_humaneval", 478, 88, 4, 0),
        ("tulu_human_eval", 595, 150, 16, 0),
        ("pandalm_annotators", 592, 190, 3, 0),
    ],
)
def test_shared_counts_equal_their_readme(name, train, test, users, shared_prompts):
    path = SHARED / name / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    dataset, report = load(path, test_size=None, split="split")
    assert report.pairs == {"train": train, "test": test}
    assert len({*dataset["train"]["user_id"], *dataset["test"]["user_id"]}) == users
    assert report.rows_read == train + test
    assert (report.broken, report.filtered) == ({}, {})
    assert report.shared_prompts == shared_prompts

"""TL;DR comparisons, on invented rows in the raw schema, on the shared ones, and on the real set if it is in the cache."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_personal.data.tldr import draw_preferences, load_tldr


SHARED = Path(__file__).parents[2] / "shared" / "data"
UKP = SHARED / "ukpconvarg_workers" / "ukpconvarg_workers.tldr_schema.jsonl"
SQUALITY = SHARED / "squality_humaneval" / "squality_humaneval.tldr_schema.jsonl"
EXAMPLES = SHARED / "tldr_openai_examples" / "tldr_openai_examples.raw.jsonl"
PAPER_DRAWS = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]  # 1 is shorter


def shared(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def comparison(
    number, worker, split="train", first=" Tea was spilled.", second=" Ann spilled all of the tea.", **kwargs
):
    row = {
        "info": {"id": f"post{number}", "post": f"Story {number}.", "title": "Spilled tea", "subreddit": "kitchen"},
        "summaries": [{"text": first, "policy": "sup1"}, {"text": second, "policy": "sup2", "note": None}],
        "choice": 0,
        "worker": worker,
        "batch": "batch1",
        "split": split,
        "extra": {},
    }
    return row | kwargs


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def load(path, **kwargs):
    reports = []
    dataset = load_tldr(path, on_report=reports.append, **kwargs)
    return dataset, reports[0]


def test_a_row_becomes_the_papers_prompt_without_its_user_prefix(write):
    dataset, _ = load(write([comparison(1, "w1")]), labels="choice")
    assert dataset["train"][0] == {
        "prompt": "SUBREDDIT: r/kitchen\nTITLE: Spilled tea\nPOST: Story 1.\nTL;DR:",
        "chosen": " Tea was spilled.",
        "rejected": " Ann spilled all of the tea.",
        "user_id": "w1",
        "post_id": "post1",
    }


def test_choice_is_the_annotators_and_length_is_the_simulated_preference(write):
    # nine workers train most and in this order, so that the paper's draws give shorter to numbers 4 to 6
    rows = [comparison(10 * n + i, f"w{n}", choice=i % 2) for n in range(9) for i in range(9 - n)]
    by_choice, _ = load(write(rows), labels="choice")
    by_length, _ = load(write(rows))
    assert [row["chosen"] == " Tea was spilled." for row in by_choice["train"]] == [row["choice"] == 0 for row in rows]
    preference = {row["user_id"]: row["preference"] for row in by_length["train"]}
    assert [preference[f"w{n}"] == "shorter" for n in range(9)] == [draw == 1 for draw in PAPER_DRAWS[:9]]
    for row in by_length["train"]:
        is_longer = len(row["chosen"]) > len(row["rejected"])
        assert is_longer == (row["preference"] == "longer")


def test_first_summary_is_chosen_when_both_are_as_long(write):
    rows = [comparison(i, f"w{i}", first=" One cat.", second=" Two dog.") for i in range(6)]
    dataset, _ = load(write(rows))
    assert set(dataset["train"]["preference"]) == {"longer", "shorter"}
    assert set(dataset["train"]["chosen"]) == {" One cat."}


def test_length_counts_the_raw_text_and_a_summary_starts_with_a_space(write):
    # 9 against 9 characters as they are: equal, so the first one; the space is added afterwards
    dataset, _ = load(write([comparison(1, "w1", first="Two cats.", second=" One dog.")]))
    assert (dataset["train"][0]["chosen"], dataset["train"][0]["rejected"]) == (" Two cats.", " One dog.")


def test_draws_are_the_papers():
    assert list(draw_preferences([str(n) for n in range(10)]).values()) == [
        ("longer", "shorter")[draw] for draw in PAPER_DRAWS
    ]


def test_draws_are_one_per_worker_so_that_more_workers_change_nothing():
    few, many = draw_preferences(list("abc")), draw_preferences(list("abcdefgh"))
    assert few == {worker: many[worker] for worker in few}
    assert draw_preferences(list("abcdefgh"), seed=1) != many


def test_top_workers_train_and_the_tail_is_tested_under_its_own_ids(write):
    rows = [comparison(1, "busy"), comparison(2, "busy"), comparison(3, "rare")]
    rows += [comparison(4, "busy", "valid1"), comparison(5, "rare", "valid2"), comparison(6, "new", "valid1")]
    dataset, report = load(write(rows), num_users=1)
    assert dataset["train"]["user_id"][:] == ["busy", "busy"]
    assert dataset["test"]["user_id"][:] == ["busy", "rare", "new"]
    assert report.pairs == {"train": 2, "test": 3}
    assert report.users == {"train": 1, "test": 3}
    assert report.filtered == {"a training row of a worker outside the top": 1}
    assert report.rows_read == 6


def test_workers_with_as_many_rows_keep_the_order_of_the_file(write):
    dataset, _ = load(write([comparison(i, w) for i, w in enumerate(["b", "a", "c"])]), num_users=2)
    assert dataset["train"]["user_id"][:] == ["b", "a"]


def test_no_user_limit_keeps_every_worker(write):
    _, report = load(write([comparison(i, f"w{i}") for i in range(12)]), num_users=None)
    assert report.users["train"] == 12


def test_a_post_that_is_trained_on_is_not_tested(write):
    rows = [comparison(1, "a"), comparison(2, "a"), comparison(3, "b"), comparison(1, "b", "valid1")]
    rows += [comparison(3, "a", "valid1")]  # post 3 is trained on by nobody: b is outside the top
    dataset, report = load(write(rows), num_users=1)
    assert not set(dataset["train"]["post_id"]) & set(dataset["test"]["post_id"])
    assert dataset["test"]["post_id"][:] == ["post3"]
    assert report.filtered["a test row whose post is trained on"] == 1
    assert report.shared_prompts == 0


def test_only_supervised_policies_are_kept_unless_asked(write):
    def with_policies(number, *policies):
        row = comparison(number, "w")
        for summary, policy in zip(row["summaries"], policies, strict=True):
            summary["policy"] = policy
        return row

    policies = [("sup1", "sup4"), ("sup1", "ref"), ("sup4_ppo_rm3", "sup1"), ("sup_cnn", "sup1")]
    path = write([with_policies(i, *pair) for i, pair in enumerate(policies)])
    dataset, report = load(path)
    assert dataset["train"]["post_id"][:] == ["post0"]
    assert report.filtered == {'a policy without "sup", or with "ppo" or "cnn"': 3}
    assert load(path, supervised_only=False)[1].pairs["train"] == 4


def test_an_article_stands_in_for_the_post(write):
    row = comparison(1, "w", info={"id": "a1", "article": "Rain fell.", "title": "Weather", "site": "news"})
    dataset, _ = load(write([row]), supervised_only=False)
    assert dataset["train"]["prompt"][0] == "SUBREDDIT: r/\nTITLE: Weather\nPOST: Rain fell.\nTL;DR:"


def test_equal_summaries_and_too_long_training_rows_are_left_out(write):
    rows = [comparison(1, "w"), comparison(2, "w", first=" Same.", second="Same. ")]
    rows += [comparison(3, "w", second=" long" * 100), comparison(4, "w", "valid1", second=" long" * 100)]
    dataset, report = load(write(rows), max_length_chars=300)
    assert report.filtered == {
        "both summaries are the same text": 1,
        "a training row longer than `max_length_chars`": 1,
    }
    assert report.pairs == {"train": 1, "test": 1}  # long rows are still tested
    assert load(write(rows), max_length_chars=None)[1].pairs["train"] == 2
    prompt = dataset["train"]["prompt"][0]
    assert load(write(rows), max_length_chars=len(prompt) + 500)[1].pairs["train"] == 2
    assert load(write(rows), max_length_chars=len(prompt) + 499)[1].pairs["train"] == 1


def test_broken_rows_are_counted_with_their_reasons(write, caplog):
    one = comparison(9, "w")
    rows = [comparison(1, "w"), "{cut off", "[1, 2]", comparison(2, None), comparison(3, ""), comparison(4, 1.5)]
    rows += [comparison(5, "w", choice=2), comparison(6, "w", choice=None), comparison(7, "w", "holdout")]
    rows += [comparison(8, "w", summaries=one["summaries"][:1]), comparison(8, "w", info="post"), {"other": 1}]
    rows += [comparison(10, "w", first="  "), comparison(11, "w", second=None), comparison(12, "w", info={"id": "x"})]
    rows += [comparison(13, 7)]  # a number is a fine id
    with caplog.at_level(logging.INFO, logger="trl_personal"):
        dataset, report = load(write(rows))
    assert dataset["train"]["user_id"][:] == ["w", "7"]
    assert report.broken == {
        "not a JSON object": 1,
        "not JSON": 1,
        "no `worker`": 2,
        "`worker` is neither text nor a whole number": 1,
        "`choice` is neither 0 nor 1": 2,
        "`split` is neither train nor valid...": 1,
        "`summaries` is not a list of two objects": 1,
        "`info` is not an object": 2,
        "`text` is blank": 1,
        "no `text`": 1,
        "no `post`": 1,
    }
    assert report.rows_read == len(rows) == sum(report.broken.values()) + sum(report.pairs.values())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "broken: 2 x no `worker`" in caplog.text


def test_report_is_logged_without_user_ids(write, caplog):
    with caplog.at_level(logging.INFO, logger="trl_personal"):
        load(write([comparison(1, "worker-of-flesh"), comparison(2, "worker-of-flesh", "valid1")]))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2 rows read; train: 1 pairs, 1 users; test: 1 pairs, 1 users" in caplog.text
    assert "worker-of-flesh" not in caplog.text


def test_side_files_beside_the_rows_give_top_workers_and_preferences(write):
    path = write([comparison(1, "a"), comparison(2, "a"), comparison(3, "b"), comparison(4, "c"), comparison(5, "d")])
    write(["b", "c"], "sup_users_top10.txt")
    write(["a 0", "b 1", "c 0"], "sup_users_preferences.txt")
    dataset, _ = load(path, num_users=2)
    assert dataset["train"]["user_id"][:] == ["b", "c"]
    assert dataset["train"]["preference"][:] == ["shorter", "longer"]
    # beyond the file the number of rows ranks; d has no preference in it, the paper's code stops there
    dataset, report = load(path, num_users=4)
    assert dataset["train"]["user_id"][:] == ["a", "a", "b", "c"]
    assert report.broken == {"a worker who is not in sup_users_preferences.txt": 1}


def test_side_files_do_not_touch_the_annotators_choice(write):
    path = write([comparison(1, "a"), comparison(2, "a"), comparison(3, "b")])
    write(["b"], "sup_users_top10.txt")
    write(["b 1"], "sup_users_preferences.txt")
    assert load(path, labels="choice", num_users=1)[0]["train"]["user_id"][:] == ["a", "a"]


def test_damaged_side_file_names_its_line(write):
    path = write([comparison(1, "a")])
    write(["a"], "sup_users_top10.txt")
    write(["a 0", "b longer"], "sup_users_preferences.txt")
    with pytest.raises(ValueError, match=r"sup_users_preferences.txt, line 2, must be a worker and 0"):
        load_tldr(path)


def test_several_azure_files_in_a_folder_are_one_set(write, tmp_path):
    (tmp_path / "comparisons").mkdir()
    write([comparison(1, "a")], "comparisons/batch1.json")
    write([comparison(2, "a", extra={"confidence": 8}), comparison(3, "b", "valid1")], "comparisons/batch2.json")
    _, report = load(tmp_path / "comparisons")
    assert report.pairs == {"train": 2, "test": 1}


def hub_rows(rows):
    """As the Hub has them: null where Azure leaves out."""
    info = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"))
    summary = dict.fromkeys(("text", "policy", "note"))
    return [
        row
        | {
            "info": info | row["info"],
            "summaries": [summary | s for s in row["summaries"]],
            "extra": {"confidence": None},
        }
        for row in rows
    ]


@pytest.fixture
def hub_splits():
    rows = hub_rows([comparison(i, f"w{i % 3}") for i in range(6)])
    held_out = hub_rows([comparison(i, f"w{i % 4}", ["valid1", "valid2"][i % 2]) for i in range(6, 12)])
    return {"train": Dataset.from_list(rows), "validation": Dataset.from_list(held_out)}


def test_hub_set_is_loaded_by_name_and_configuration(hub_splits, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict(hub_splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    reports = []
    dataset = load_tldr(num_users=2, on_report=reports.append)
    assert calls == [(("openai/summarize_from_feedback", "comparisons"), {"revision": None})]
    assert reports[0].pairs == {"train": 4, "test": 6}
    assert reports[0].source == "openai/summarize_from_feedback"
    assert dataset["train"]["user_id"][:] == ["w0", "w1", "w0", "w1"]


def test_a_set_with_a_loading_script_is_read_from_its_conversion(hub_splits, monkeypatch, tmp_path):
    for name, rows in hub_splits.items():  # the folders of the Hub's branch refs/convert/parquet
        (tmp_path / "hub" / "comparisons" / name).mkdir(parents=True)
        rows.to_parquet(tmp_path / "hub" / "comparisons" / name / "0000.parquet")
        (tmp_path / "hub" / "axis" / name).mkdir(parents=True)
        Dataset.from_list([{"info": 1}]).to_parquet(tmp_path / "hub" / "axis" / name / "0000.parquet")
    load_dataset = datasets.load_dataset
    calls = []

    def load_from_hub(name, config_name=None, **kwargs):
        calls.append((name, config_name, kwargs))
        if kwargs["revision"] != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found summarize_from_feedback.py")
        return load_dataset(str(tmp_path / "hub"), data_dir=kwargs["data_dir"])

    monkeypatch.setattr(datasets, "load_dataset", load_from_hub)
    _, report = load("openai/summarize_from_feedback")
    assert report.rows_read == 12
    assert [call[2].get("data_dir") for call in calls] == [None, "comparisons"]
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):  # a revision asked for is kept
        load_tldr("openai/summarize_from_feedback", revision="main")


def test_other_errors_of_the_hub_say_that_it_was_the_hub():
    with pytest.raises(Exception, match="no-such-owner") as caught:  # offline, as in every test
        load_tldr("no-such-owner/no-such-set")
    assert any("was looked up on the Hugging Face Hub" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": "taste"}, '`labels` must be "length" or "choice", found \'taste\''),
        ({"num_users": 0}, "`num_users` must be at least 1, or `None` for all workers, found 0"),
    ],
)
def test_unknown_options_are_refused(kwargs, message, write):
    with pytest.raises(ValueError, match=message):
        load_tldr(write([comparison(1, "w")]), **kwargs)


def test_wrong_schema_names_what_is_missing_and_what_was_found(write):
    path = write([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(
        ValueError, match=r"has no column \['choice', 'info', .*; found \['chosen', 'prompt', 'rejected'\]"
    ):
        load_tldr(path)


def test_missing_empty_and_unknown_files_are_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*gone.jsonl"):
        load_tldr(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl, line 2: not JSON"):
        load_tldr(write(["", "nothing here"]))
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"must be a file of type .*\.jsonl.*, found \['\.xlsx'\]"):
        load_tldr(tmp_path / "rows.xlsx")


def test_nothing_left_is_an_error_with_the_reasons(write):
    row = comparison(1, "w", first=" Same.", second=" Same.")
    with pytest.raises(
        ValueError, match=r"No preference pair is left(.|\n)*filtered: 1 x both summaries are the same text"
    ):
        load_tldr(write([row]))


def test_ukpconvarg_counts_equal_its_readme():
    _, report = load(shared(UKP), num_users=None, labels="choice")
    assert report.pairs == {"train": 1032, "test": 228}
    assert report.rows_read == 1260
    assert report.users["train"] == 40
    assert (report.broken, report.filtered, report.shared_prompts) == ({}, {}, 0)
    dataset, report = load(UKP)
    assert report.pairs == {"train": 749, "test": 228}
    assert report.users == {"train": 10, "test": 37}
    assert report.filtered == {"a training row of a worker outside the top": 283}
    assert not set(dataset["train"]["post_id"]) & set(dataset["test"]["post_id"])


def test_ukpconvarg_side_files_are_our_own_draws(tmp_path):
    shutil.copy(shared(UKP), tmp_path / "rows.jsonl")
    with_files, without = load(UKP)[0], load(tmp_path / "rows.jsonl")[0]
    for split in ("train", "test"):
        assert with_files[split].to_list() == without[split].to_list()
    users = dict.fromkeys(without["train"]["user_id"])
    top = (UKP.parent / "sup_users_top10.txt").read_text().split()
    assert set(users) == set(top)
    preference = dict(zip(without["train"]["user_id"], without["train"]["preference"], strict=True))
    assert [preference[user] == "shorter" for user in top] == [draw == 1 for draw in PAPER_DRAWS]


def test_squality_counts_equal_its_readme():
    _, report = load(shared(SQUALITY), labels="choice")
    assert report.pairs == {"train": 478, "test": 88}
    assert report.users == {"train": 4, "test": 4}
    assert (report.rows_read, report.broken, report.filtered) == (566, {}, {})


def test_openai_examples_keep_one_of_two_records():
    dataset, report = load(shared(EXAMPLES), labels="choice")
    assert report.pairs == {"train": 1, "test": 0}
    assert report.filtered == {'a policy without "sup", or with "ppo" or "cnn"': 1}
    assert dataset["train"]["post_id"][:] == ["t3_3pb8rl"]
    assert load(EXAMPLES, labels="choice", supervised_only=False)[1].pairs["train"] == 2


def test_real_set_has_the_papers_counts(monkeypatch):
    monkeypatch.undo()  # the real cache
    workers = json.loads(shared(SHARED / "tldr_openai_examples" / "tldr_workers.json").read_text())["top10"]
    try:
        dataset, report = load("openai/summarize_from_feedback")
    except (OSError, ValueError) as error:
        pytest.skip(f"openai/summarize_from_feedback is not in the cache: {type(error).__name__}")
    assert report.rows_read == 92_858 + 86_086
    assert report.filtered['a policy without "sup", or with "ppo" or "cnn"'] == (92_858 - 38_487) + (86_086 - 16_294)
    assert report.filtered["a training row of a worker outside the top"] == 38_487 - 23_299
    # the paper has 23,292 after its length limit, which also counts its user prefix of about 140 characters
    assert 23_292 <= report.pairs["train"] <= 23_299
    preference = dict(zip(dataset["train"]["user_id"], dataset["train"]["preference"], strict=True))
    assert preference == {worker["worker"]: worker["prefers"] for worker in workers}

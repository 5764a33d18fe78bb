"""PRISM, on invented rows in the raw schema and on the shared ones."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_personal.data.prism import load_prism, user_profile


SHARED = Path(__file__).parents[2] / "shared" / "data" / "prism_synthesizeme"
ATTRIBUTES = "values creativity fluency factuality diversity safety personalisation helpfulness".split()


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def survey_row(user, **kwargs):
    scores = dict(zip(ATTRIBUTES, [50, 20, 90, 90, 10, 30, 70, 60], strict=True))
    orders = dict(zip(ATTRIBUTES, [3, 8, 7, 6, 1, 2, 4, 5], strict=True))
    row = {
        "user_id": user,
        "num_completed_conversations": 1,
        "self_description": "I like tea.",
        "age": "25-34 years old",
        "gender": "Prefer not to say",
        "employment_status": "Retired",
        "education": None,
        "marital_status": "Married",
        "english_proficiency": "Fluent",
        "stated_prefs": scores | {"other": 100, "other_text": "humour"},
        "order_stated_prefs": orders | {"other": 9},
    }
    return row | kwargs


def turn(number, question, *answers):
    """Answers are texts with a star in front of a chosen one."""
    items = [{"turn": number, "role": "user", "content": question}]
    for place, text in enumerate(answers):
        score = {"score": 50, "model_name": "m", "model_provider": "p", "within_turn_id": place}
        content = text.removeprefix("*")
        items.append({"turn": number, "role": "model", "content": content, "if_chosen": text.startswith("*"), **score})
    return items


def conversation(name, user, *turns):
    history = [item for items in turns for item in items]
    return {"conversation_id": name, "user_id": user, "conversation_type": "unguided", "conversation_history": history}


def as_utterances(conversations):
    rows = []
    for each in conversations:
        question = None
        for item in each["conversation_history"]:
            if item["role"] == "user":
                question = item["content"]
                continue
            answer = {"user_prompt": question, "model_response": item["content"], "if_chosen": item["if_chosen"]}
            place = {"turn": item["turn"], "within_turn_id": item["within_turn_id"]}
            rows.append({"conversation_id": each["conversation_id"], "user_id": each["user_id"], **place, **answer})
    return rows


TWO_TURNS = conversation("c0", "u0", turn(0, "Tea?", "*Green.", "Black.", "None."), turn(1, "Hot?", "Cold.", "*Hot."))


@pytest.fixture
def write(tmp_path):
    def write(survey, conversations, utterances=None):
        utterances = as_utterances(conversations) if utterances is None else utterances
        tables = {"survey": survey, "conversations": conversations, "utterances": utterances}
        for name, rows in tables.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return tmp_path

    return write


def load(path, **kwargs):
    reports = []
    dataset = load_prism(path, on_report=reports.append, **kwargs)
    return dataset, reports[0]


ALL = {"test_size": 0, "unknown_users": 0}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_rejected_answer_pairs_with_the_chosen_one_and_chosen_ones_are_the_history(write):
    dataset, report = load(write([survey_row("u0")], [TWO_TURNS]), **ALL)
    rows = dataset["train"].to_list()
    first, second = [user("Tea?")], [user("Tea?"), assistant("Green."), user("Hot?")]
    assert [(row["prompt"], row["chosen"], row["rejected"], row["turn"]) for row in rows] == [
        (first, [assistant("Green.")], [assistant("Black.")], 0),
        (first, [assistant("Green.")], [assistant("None.")], 0),
        (second, [assistant("Hot.")], [assistant("Cold.")], 1),
    ]
    assert {(row["user_id"], row["conversation_id"]) for row in rows} == {("u0", "c0")}
    assert report.rows_read == 1


def test_text_has_a_name_in_front_of_each_message(write):
    dataset, _ = load(write([survey_row("u0")], [TWO_TURNS]), conversational=False, **ALL)
    last = dataset["train"][2]
    assert last["prompt"] == "User: Tea?\nAssistant: Green.\nUser: Hot?\nAssistant:"
    assert (last["chosen"], last["rejected"]) == (" Hot.", " Cold.")


def test_both_tables_give_the_same_pairs(write):
    def talk(i):
        return conversation(f"c{i}", f"u{i % 7}", turn(0, f"Q{i}?", "*a", "b"), turn(1, "?", "c", "*d", "e"))

    conversations = [talk(i) for i in range(30)]
    survey = [survey_row(f"u{i}") for i in range(7)] + [survey_row("idle", num_completed_conversations=0)]
    path = write(survey, conversations, as_utterances(conversations)[::-1])  # utterances in no order
    plain, report = load(path)
    from_utterances, other_report = load(path, table="utterances")

    def place(row):
        return row["conversation_id"], row["turn"]

    for split in ("train", "test", "test_unknown_users"):
        assert sorted(from_utterances[split], key=place) == sorted(plain[split], key=place)
    assert other_report == report
    assert report.filtered["survey: a user without conversations"] == 1


def test_turns_are_read_in_their_order(write):
    talk = TWO_TURNS | {"conversation_history": TWO_TURNS["conversation_history"][::-1]}
    dataset, _ = load(write([survey_row("u0")], [talk], []), **ALL)
    assert dataset["train"]["turn"][:] == [0, 0, 1]
    assert [message["content"] for message in dataset["train"]["prompt"][2]] == ["Tea?", "Green.", "Hot?"]


def test_profile_has_the_papers_fields_that_were_answered(write):
    dataset, _ = load(write([survey_row("u0")], [TWO_TURNS]), **ALL)
    assert dataset["train"]["user_profile"][0] == (
        "Self-description: I like tea.\nAge: 25-34 years old\nEmployment: Retired\nMarital status: Married\n"
        "English proficiency: Fluent\nPreferences: fluency, factuality, personalisation"
    )


def test_stated_preferences_are_the_highest_scores_or_the_first_sliders_on_screen(write):
    path = write([survey_row("u0")], [TWO_TURNS])
    by_order, _ = load(path, stated_preferences="display_order", **ALL)
    assert by_order["train"]["user_profile"][0].endswith("Preferences: diversity, safety, values")
    by_score, _ = load(path, stated_preferences="scores", **ALL)
    assert by_score["train"]["user_profile"][0].endswith("Preferences: fluency, factuality, personalisation")


def test_equal_scores_keep_the_codebooks_order_and_missing_ones_do_not_count():
    scores = dict.fromkeys(ATTRIBUTES, 50) | {"values": None, "fluency": 80}
    assert user_profile({"stated_prefs": scores}) == "Preferences: fluency, creativity, factuality"
    assert user_profile({"stated_prefs": None, "age": "Prefer not to say"}) is None


def test_several_chosen_answers_are_one_answer(write):
    history = turn(0, "Tea?", "*Green.", "*Green.", "Black.", "Green.")
    dataset, report = load(write([survey_row("u0")], [conversation("c0", "u0", history)]), **ALL)
    assert [row["rejected"] for row in dataset["train"]] == [[assistant("Black.")]]
    assert report.filtered == {"a rejected answer equal to the chosen one": 1}


def test_turns_without_a_pair_are_counted_and_stay_in_the_history(write):
    talk = conversation("c0", "u0", turn(0, "Tea?", "*Green.", "*Green."), turn(1, "Hot?", "*Yes.", "No."))
    dataset, report = load(write([survey_row("u0")], [talk]), **ALL)
    assert dataset["train"]["prompt"][:] == [[user("Tea?"), assistant("Green."), user("Hot?")]]
    assert report.filtered == {"a turn without a rejected answer": 1}


def test_a_turn_without_a_chosen_answer_ends_its_conversation(write):
    talk = conversation(
        "c0", "u0", turn(0, "Tea?", "*Green.", "Black."), turn(1, "Hot?", "Yes.", "No."), turn(2, "!", "*a", "b")
    )
    _, report = load(write([survey_row("u0")], [talk]), **ALL)
    assert report.pairs == {"train": 1}
    assert report.broken == {"a turn without a chosen answer, and the rest of its conversation": 1}


def test_one_character_is_a_text(write):
    _, report = load(write([survey_row("u0")], [conversation("c0", "u0", turn(0, "?", "*a", "b"))]), **ALL)
    assert report.pairs == {"train": 1}


def test_broken_rows_are_counted_with_their_reasons(write):
    good = turn(0, "Tea?", "*Green.", "Black.")
    unclear = turn(0, "Tea?", "*Green.", "Black.", "", "Red.")
    unclear[-1]["if_chosen"] = None
    conversations = [
        conversation("c0", "u0", good),
        conversation("c1", None, good),
        conversation("c2", "nobody", good),
    ]
    conversations += [conversation(None, "u0", good), conversation("c4", "u0"), conversation("c5", "u0", good[1:])]
    conversations += [conversation("c6", "u0", [{"role": "user"}]), conversation("c7", "u0", unclear), [1]]
    survey = [survey_row("u0"), survey_row(None), survey_row("idle", num_completed_conversations=0), "text"]
    _, report = load(write(survey, conversations, []), **ALL)
    assert report.pairs == {"train": 2}
    assert report.filtered == {"survey: a user without conversations": 1}
    assert report.broken == {
        "survey: no `user_id`": 1,
        "survey: not a JSON object": 1,
        "no `user_id`": 1,
        "a conversation whose user is not in the survey": 1,
        "no `conversation_id`": 1,
        "`conversation_history` is not a list of messages": 1,
        "a turn without one message of the user, and the rest of its conversation": 1,
        "`conversation_history` has a message without a turn": 1,
        "a rejected answer without text": 1,
        "an answer of which nothing says if it was chosen": 1,
        "not a JSON object": 1,
    }
    assert report.rows_read == 9


def test_broken_utterances_are_counted(write):
    rows = [*as_utterances([TWO_TURNS]), {"conversation_id": "c9"}, {"conversation_id": None, "turn": 0}, 5]
    _, report = load(write([survey_row("u0")], [TWO_TURNS], rows), table="utterances", **ALL)
    assert report.pairs == {"train": 3}
    assert report.broken == {
        "utterance: `turn` is not an integer": 1,
        "utterance: no `conversation_id`": 1,
        "utterance: not a JSON object": 1,
    }


def test_splits_share_no_opening_prompt_and_no_held_out_user(write):
    def talk(i):
        question = f"Q{i % 150}?"  # every prompt opens two conversations, often of two users
        return conversation(f"c{i}", f"u{i % 40}", turn(0, question, "*a", "b"), turn(1, "And?", "*c", "d"))

    path = write([survey_row(f"u{i}") for i in range(40)], [talk(i) for i in range(300)])
    dataset, report = load(path, unknown_users=0.25, test_size=0.2)
    openings = {split: {row["prompt"][0]["content"] for row in rows} for split, rows in dataset.items()}
    assert not openings["train"] & (openings["test"] | openings["test_unknown_users"])
    users = {split: set(rows["user_id"]) for split, rows in dataset.items()}
    assert len(users["test_unknown_users"]) == 10
    assert not users["test_unknown_users"] & (users["train"] | users["test"])
    left_out = report.filtered["the pair belongs to a held-out user, and its prompt is trained on"]
    assert sum(report.pairs.values()) + left_out == 600
    assert min(report.pairs.values()) > 0


def test_default_holds_out_the_papers_share_of_users(write):
    conversations = [conversation(f"c{i}", f"u{i}", turn(0, f"Q{i}?", "*a", "b")) for i in range(100)]
    dataset, report = load(write([survey_row(f"u{i}") for i in range(100)], conversations))
    assert report.users["test_unknown_users"] == 12  # of 100, as 162 of 1,396
    assert 0 < report.pairs["test"] < 20


def test_hub_tables_are_loaded_by_name(monkeypatch):
    tables = {"survey": [survey_row("u0")], "conversations": [TWO_TURNS], "utterances": as_utterances([TWO_TURNS])}
    calls = []

    def load_dataset(name, config_name, **kwargs):
        calls.append((name, config_name, kwargs))
        return DatasetDict({"train": Dataset.from_list(tables[config_name])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for table in ("conversations", "utterances"):
        dataset, report = load("HannahRoseKirk/prism-alignment", table=table, revision="main", **ALL)
        assert report.pairs == {"train": 3}
        assert dataset["train"]["turn"][:] == [0, 0, 1]
    assert [call[1] for call in calls] == ["survey", "conversations", "survey", "utterances"]
    assert calls[1] == ("HannahRoseKirk/prism-alignment", "conversations", {"revision": "main"})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"table": "metadata"}, '`table` must be "conversations" or "utterances", found \'metadata\''),
        ({"stated_preferences": "order"}, '`stated_preferences` must be "scores" or "display_order", found \'order\''),
        ({"test_size": 1}, "`test_size` is a share, at least 0 and below 1, found 1"),
    ],
)
def test_unknown_options_are_refused(kwargs, message, write):
    with pytest.raises(ValueError, match=message):
        load_prism(write([survey_row("u0")], [TWO_TURNS]), **kwargs)


def test_missing_files_and_wrong_tables_are_refused(write, tmp_path):
    path = write([survey_row("u0")], [{"conversation_id": "c0"}], utterances=[])
    with pytest.raises(
        ValueError, match=r"no column \['conversation_history', 'user_id'\]; found \['conversation_id'\]"
    ):
        load_prism(path)
    (path / "conversations.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"must be a folder with conversations.jsonl; found \["):
        load_prism(path)
    with pytest.raises(FileNotFoundError, match="must be a folder with survey.jsonl; found a file"):
        load_prism(path / "survey.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load_prism("./nowhere")


@pytest.mark.parametrize("table", ["conversations", "utterances"])
def test_shared_counts_equal_their_readme(table, shared):
    dataset, report = load(shared / "raw_schema", table=table, **ALL)
    assert report.pairs == {"train": 84}
    assert report.users == {"train": 18}
    assert (report.rows_read, report.broken) == (50, {})
    assert report.filtered == {"a turn without a rejected answer": 28}
    users = dataset["train"]["user_id"][:]
    counts = sorted(users.count(user) for user in set(users))
    assert (counts[0], counts[len(counts) // 2], counts[-1]) == (4, 4, 11)


def test_shared_pairs_are_the_derived_ones(shared):
    dataset, _ = load(shared / "raw_schema", **ALL)
    lines = (shared / "prism_synthesizeme.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {(row["messages"][-1]["content"], row["chosen"], row["rejected"]) for row in map(json.loads, lines)}
    found = {
        (r["prompt"][-1]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in dataset["train"]
    }
    assert found == expected


def test_shared_default_splits_do_not_leak(shared):
    dataset, report = load(shared / "raw_schema")
    assert sum(report.pairs.values()) == 84
    assert report.users["test_unknown_users"] == 2
    assert report.shared_prompts == 0
    known = set(dataset["train"]["user_id"]) | set(dataset["test"]["user_id"])
    assert not known & set(dataset["test_unknown_users"]["user_id"])
    conversations = [set(rows["conversation_id"]) for rows in dataset.values()]
    assert sum(map(len, conversations)) == len(set.union(*conversations))


def test_real_set_has_the_codebooks_counts(monkeypatch):
    monkeypatch.undo()  # the real cache
    try:
        _, report = load("HannahRoseKirk/prism-alignment", **ALL)
    except (OSError, ValueError) as error:
        pytest.skip(f"HannahRoseKirk/prism-alignment is not in the cache: {type(error).__name__}")
    assert report.rows_read == 8_011
    assert report.users["train"] <= 1_396
    assert report.filtered["survey: a user without conversations"] == 104
    # 68,371 answers, of which 27,437 were chosen
    broken = report.broken.get("a rejected answer without text", 0)
    equal = report.filtered.get("a rejected answer equal to the chosen one", 0)
    assert report.pairs["train"] <= 68_371 - 27_437 - broken - equal

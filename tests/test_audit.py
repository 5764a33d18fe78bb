"""The audit before training: counts by hand, room where tastes are planted and none where ids are shuffled, one report."""

import json
import logging
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED_DATA
from datasets import Dataset, DatasetDict, load_dataset

from trl_personal.audit import audit_preferences, room
from trl_personal.audit.kinds import _why, find_clusters, recommend
from trl_personal.audit.rules import NestedCrossValidation, scale, split_prompts
from trl_personal.audit.tastes import find_tastes
from trl_personal.audit.text_features import FEATURES, text_features
from trl_personal.cli import main
from trl_personal.intervals import Interval


LONG = "I would say that it depends on what you like, but most people take the larger one."
SHORT = "The larger one."


def rows_of(judgements):
    """Rows from (user, prompt, chosen, rejected)."""
    return Dataset.from_list(
        [dict(zip(("user_id", "prompt", "chosen", "rejected"), row, strict=True)) for row in judgements]
    )


def length_preferences(num_users=8, pairs=30, planted=True, seed=0):
    """Made-up texts; half of the users always choose the longer one, or everybody does by chance."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(300)]
    rows = []
    for number in range(num_users * pairs):
        user = number % num_users
        long, short = (" ".join(rng.choices(words, k=rng.randint(*sizes))) + "." for sizes in ((25, 40), (8, 20)))
        wants_long = user % 2 == 0 if planted else rng.random() < 0.5
        answers = (long, short) if wants_long else (short, long)
        rows.append((f"annotator-{user}", f"Tell me about {number // 2}?", *answers))
    return rows_of(rows)


# --- Features -----------------------------------------------------------------------------------------------------------


def features_of(text, prompt="a prompt"):
    return dict(zip(FEATURES, text_features([text], [prompt])[0], strict=True))


def test_features_by_hand():
    text = 'Hi! Here is a list (short), "ok":\n- one\n* two\n3. three\n\n**Bold** is 10% of it; isn\'t it? 🦆'
    found = features_of(text)
    counts = {
        "words": len(text.split()),
        "sentences": 3,  # "Hi!", "3.", "it?"
        "lines": 6,
        "list_marks": 3,
        "commas": 3,
        "question_marks": 1,
        "exclamation_marks": 1,
        "brackets": 1,
        "quotes": 2,
        "markup": 5,
        "emoji": 1,
    }
    for name, count in counts.items():
        assert found[name] == pytest.approx(math.log1p(count)), name
    assert found["digits"] == pytest.approx(3 / len(text), rel=0.02)
    assert found["capitals"] == pytest.approx(3 / len(text), rel=0.02)


def test_reading_grade_is_that_of_flesch_and_kincaid():
    found = features_of("The cat sat on a big table.")  # 7 words, 8 vowel runs: "table" has two
    assert found["reading_grade"] == pytest.approx(max(0, 0.39 * 7 + 11.8 * 8 / 7 - 15.59))
    assert found["word_length"] == pytest.approx(21 / 7)


def test_words_shared_with_the_prompt_and_words_for_the_reader():
    found = features_of("You and your dog, and THE dog.", "The dog")
    assert found["prompt_overlap"] == pytest.approx(2 / 5)
    assert found["second_person"] == pytest.approx(2 / 7)
    assert found["type_token_ratio"] == pytest.approx(5 / 7)


def test_features_do_not_depend_on_the_other_texts():
    texts = [LONG, "", SHORT, "naïve 🦆 café — “quoted”", "\n\n", "x" * 30_000, "half \ud83e surrogate"]
    together = text_features(texts, ["p"] * len(texts))
    assert np.isfinite(together).all()
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(row, text_features([text], ["p"])[0])
    with pytest.raises(ValueError, match="1 texts and 0 prompts"):
        text_features(["x"], [])


# --- Counts -------------------------------------------------------------------------------------------------------------

TRAIN = [
    ("ann", "p", "x", "y"),
    ("bo", "P ", "y", "x"),  # the same prompt but for case and space
    ("ann", "p", "x", "z"),
    ("ann", "q", "x", "y"),
    (None, "q", "y", "x"),
    ("ann", "q", "same", "same"),
]
TEST = [("ann", "p", "y", "x"), ("cy", "q", "x", "y"), ("bo", "q", "new", "y"), ("bo", "r", "x", "y")]


@pytest.fixture(scope="module")
def toy():
    return audit_preferences({"train": rows_of(TRAIN), "test": rows_of(TEST)}, min_pairs=3)


def test_counts_by_hand(toy):
    counts = toy.counts
    assert (counts.num_pairs, counts.num_users, counts.num_prompts) == (9, 3, 3)
    assert (counts.num_pairs_without_user, counts.num_identical) == (1, 1)
    assert counts.pairs_per_user == pytest.approx(
        {"min": 1, "p10": 1.4, "median": 3, "mean": 8 / 3, "p90": 3.8, "max": 4}
    )
    assert (counts.min_pairs, counts.num_users_with_few_pairs) == (3, 1)
    assert counts.shared_prompt_rate == pytest.approx(2 / 3)
    assert (toy.splits["train"].num_pairs, toy.splits["train"].num_users, toy.splits["train"].num_prompts) == (5, 2, 2)


def test_disagreement_by_hand(toy):
    """x against y on p: ann is undecided, so bo is alone. On q: ann and cy agree."""
    found = toy.agreement
    assert (found.num_comparisons, found.num_shared, found.num_conflicting) == (5, 1, 0)
    assert (found.disagreement_rate, found.pooled_ceiling, found.contradiction_rate) == (0, 1, 1)


def test_leakage_by_hand(toy):
    leakage = toy.leakage
    assert (leakage.reference, leakage.num_other_pairs) == ("train", 4)
    assert (leakage.same_prompt, leakage.same_comparison, leakage.same_judgement) == (3, 2, 1)
    assert leakage.unknown_users == 1


def test_a_split_column_does_what_splits_do(toy):
    rows = [dict(row, part=part) for part, split in (("train", TRAIN), ("test", TEST)) for row in rows_of(split)]
    again = audit_preferences(Dataset.from_list(rows), split_column="part", min_pairs=3)
    assert again.to_dict() == toy.to_dict()
    assert audit_preferences(rows_of(TRAIN)).leakage is None


def test_streams_and_other_columns_are_read_alike(toy):
    splits = {"train": rows_of(TRAIN).to_iterable_dataset(), "test": rows_of(TEST).to_iterable_dataset()}
    assert audit_preferences(splits, min_pairs=3).to_dict() == toy.to_dict()
    renamed = DatasetDict(train=rows_of(TRAIN), test=rows_of(TEST)).rename_column("user_id", "who")
    assert audit_preferences(renamed, "who", min_pairs=3).to_dict() == toy.to_dict()


def test_messages_and_implicit_prompts_are_read_as_text():
    def message(role, content):
        return {"role": role, "content": content}

    plain = audit_preferences(rows_of([("ann", "p", "x", "y"), ("bo", "q", LONG, SHORT)]))
    conversations = [
        {
            "user_id": user,
            "chosen": [message("user", prompt), message("assistant", chosen)],
            "rejected": [message("user", prompt), message("assistant", rejected)],
        }
        for user, prompt, chosen, rejected in (("ann", "p", "x", "y"), ("bo", "q", LONG, SHORT))
    ]
    assert audit_preferences(Dataset.from_list(conversations)).to_dict() == plain.to_dict()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            [{"user_id": "ann", "prompt": "p", "chosen": "x"}],
            ValueError,
            "has no column .'rejected'.; found .'chosen'",
        ),
        ([{"prompt": "p", "chosen": "x", "rejected": "y"}], ValueError, "no `user_id` column"),
        ([{"user_id": "", "prompt": "p", "chosen": "x", "rejected": "y"}], ValueError, "Row 0 .* empty text"),
        (
            [{"user_id": 1.5, "prompt": "p", "chosen": "x", "rejected": "y"}],
            TypeError,
            "Row 0 of the train dataset.* text or a whole number",
        ),
        (
            [{"user_id": "a", "prompt": "p", "chosen": 1, "rejected": 2}],
            TypeError,
            "Row 0 of the train dataset: prompt and",
        ),
        (
            [{"user_id": "a", "prompt": "p", "chosen": "x", "rejected": "x"}],
            ValueError,
            "1 rows were read, and none has",
        ),
    ],
)
def test_bad_data_are_refused(rows, error, message):
    with pytest.raises(error, match=message):
        audit_preferences(Dataset.from_list(rows))
    with pytest.raises(ValueError, match="mapping is empty"):
        audit_preferences({})


def test_too_little_data_is_said(toy):
    alone = audit_preferences(rows_of([("ann", f"p{number}", "x", "y") for number in range(9)]))
    assert (alone.room, alone.recommendation.kind) == (None, "none")
    assert alone.recommendation.reason.endswith("1 users and 9 prompts were found, at least 2 and 3 are needed.")
    nobody = audit_preferences(rows_of([(None, "p", "x", "y"), (7, "p", "x", "y")]).select([0, 0]))
    assert (nobody.counts.num_users, nobody.counts.pairs_per_user["max"], nobody.room) == (0, 0, None)


# --- Room ---------------------------------------------------------------------------------------------------------------


def simulate_differences(seed, num_users=12, pairs=60, taste=2.0, num_prompts=200, clusters=False):
    """Features of pairs, users and prompts. Each user's taste differs from the shared one by `taste`."""
    rng = np.random.default_rng(seed)
    number, size = num_users * pairs, len(FEATURES)
    users, prompts = np.repeat(np.arange(num_users), pairs), rng.permutation(np.arange(number) % num_prompts)
    shared = np.eye(size)[0] * 1.5
    if clusters:
        tastes = np.where(np.arange(num_users) % 3 == 0, -1, 1)[:, None] * shared
    else:
        tastes = shared + taste * rng.normal(size=(num_users, size)) / math.sqrt(size) * 1.5
    effects = rng.normal(size=(num_prompts, size)) * 0.3
    differences = rng.normal(size=(number, size))
    logits = ((tastes[users] + effects[prompts]) * differences).sum(axis=1)
    return differences * np.where(rng.random(number) < 1 / (1 + np.exp(-logits)), 1, -1)[:, None], users, prompts


def estimate(differences, users, prompts, seed=0):
    return room.summarize_room(room.score_room(scale(differences), users, prompts, seed), users, prompts)


@pytest.fixture
def quick(monkeypatch):
    """One partition and 19 shuffles, with which p = 0.05 can be reached."""
    monkeypatch.setattr(room, "REPEATS", 1)
    monkeypatch.setattr(room, "SHUFFLES", (19, 19))


def share_of_evidence(num_seeds, shuffled, **settings):
    found = []
    for seed in range(num_seeds):
        differences, users, prompts = simulate_differences(seed, **settings)
        if shuffled:
            users = np.random.default_rng(seed).permutation(users)
        found.append(estimate(differences, users, prompts, seed).has_evidence)
    return np.mean(found)


@pytest.mark.slow
def test_tastes_give_evidence(quick):
    assert share_of_evidence(20, shuffled=False) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_prompts": 14}, {"num_users": 3, "pairs": 150}, {"num_users": 100, "pairs": 5}, {"clusters": True}],
    ids=str,
)
def test_shuffled_ids_give_no_evidence_in_95_of_100_seeds(settings, quick):
    assert share_of_evidence(200, shuffled=True, **settings) <= 0.05


def test_rules_never_see_the_prompts_they_are_scored_on():
    """Every prompt has a random label of its own, repeated for all users: who had seen it would know the answer."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(150), 8)
    differences = rng.normal(size=(150, len(FEATURES)))[prompts] * rng.choice([-1, 1], size=150)[prompts][:, None]
    users = np.tile(np.arange(8), 150)
    validation = NestedCrossValidation(scale(differences), split_prompts(prompts, 5, rng))
    assert validation.pooled().mean() == pytest.approx(0.5, abs=0.1)
    assert validation.personal(users, 8).mean() == pytest.approx(0.5, abs=0.1)
    folds = split_prompts(prompts, 5, rng)
    assert all(len(set(folds[prompts == prompt])) == 1 for prompt in range(150))


@pytest.mark.slow
def test_scores_of_a_rule_that_is_certain():
    """One feature decides: for everybody, or half the users against the other half."""
    rng = np.random.default_rng(1)
    users, prompts = np.tile(np.arange(4), 50), np.repeat(np.arange(50), 4)
    differences = np.abs(rng.normal(size=(200, 1))) + 0.1
    agreed = estimate(differences, users, prompts)
    assert (agreed.pooled_accuracy.value, agreed.gap.value, agreed.has_evidence) == (1.0, 0.0, False)
    torn = estimate(differences * np.where(users % 2, 1, -1)[:, None], users, prompts)
    assert torn.personal_accuracy.value == 1.0
    assert torn.pooled_accuracy.value == pytest.approx(0.5, abs=0.1)
    assert torn.has_evidence
    assert torn.p_value == 0.01


def test_which_answer_was_chosen_does_not_change_the_units():
    differences = np.random.default_rng(0).normal(size=(50, 3)) * [1, 10, 0]
    flipped = differences * np.where(np.arange(50) % 2, 1, -1)[:, None]
    np.testing.assert_array_equal(np.abs(scale(differences)), np.abs(scale(flipped)))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        pytest.param({"clusters": True, "num_users": 150, "pairs": 12}, {"cluster", "low_rank"}, id="clusters"),
        pytest.param({"num_users": 12, "pairs": 200, "taste": 1.5}, {"individual"}, id="many pairs each"),
        pytest.param({"taste": 0.0}, {"none"}, id="no tastes"),
    ],
)
def test_recommended_kind(settings, kinds, quick):
    differences, users, prompts = simulate_differences(3, **settings)
    found = recommend(estimate(differences, users, prompts), scale(differences), users, prompts, seed=0)
    assert found.kind in kinds
    assert set(found.accuracy_by_kind) == (set() if kinds == {"none"} else {"individual", "cluster", "low_rank"})


@pytest.mark.parametrize(
    ("accuracies", "kind", "words"),
    [
        ((1.0, 1.0, 1.0), "individual", "`individual` does as well on held-out prompts as `cluster` and `low_rank`"),
        ((0.9, 0.8, 0.8), "individual", "`individual` does best on held-out prompts"),
        ((0.9, 0.8, 0.89), "low_rank", "`low_rank` is not clearly worse than `individual`"),
        ((0.9, 0.9, 0.7), "cluster", "`cluster` does as well on held-out prompts as `individual`"),
    ],
)
def test_the_reason_says_who_does_as_well(accuracies, kind, words):
    names = ("individual", "cluster", "low_rank")
    by_kind = dict(zip(names, accuracies, strict=True))
    half = Interval(0.1, 0.05, 0.15)
    found = room.Room(
        half, half, half, (0.0,), p_value=0.01, num_pairs=200, num_users=10, num_prompts=20, has_evidence=True
    )
    assert _why(found, kind, max(names, key=lambda name: by_kind[name]), 20.0, by_kind).endswith(f"median, {words}.")


def test_clusters_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=200)
    clusters = find_clusters(10 * np.eye(3)[truth] + rng.normal(size=(200, 3)), rng.random(200), number=3)
    assert len({*zip(truth.tolist(), clusters.tolist(), strict=True)}) == 3


def test_clusters_are_searched_until_nothing_moves():
    """Each point is nearest to the weighted mean of its own cluster, which the first guess is not."""
    rng = np.random.default_rng(0)
    points, weights = 2 * np.eye(3)[rng.integers(3, size=200)] + rng.normal(size=(200, 3)), 1 + rng.random(200)
    clusters = find_clusters(points, weights, number=3)
    centers = np.stack([np.average(points[clusters == c], axis=0, weights=weights[clusters == c]) for c in range(3)])
    distances = ((points[:, None] - centers) ** 2).sum(axis=2)
    np.testing.assert_array_equal(distances.argmin(axis=1), clusters)


def test_spread_of_tastes_by_hand():
    """100 users with 200 pairs each: half take more of the first feature in 9 of 10 pairs, half in 1; chance otherwise."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(100), 200)
    differences = np.zeros((20_000, len(FEATURES)))
    differences[:, 0] = np.where(rng.random(20_000) < np.where(users % 2, 0.9, 0.1), 1, -1)
    differences[:, 1] = rng.choice([-1, 1], size=20_000)
    first, second = find_tastes(differences, users)
    assert (first.feature, second.feature) == FEATURES[:2]
    assert first.spread == pytest.approx(0.4, abs=0.01)
    assert first.share == pytest.approx(0.5, abs=0.02)
    assert second.spread < 0.02


# --- Reports ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return audit_preferences(length_preferences())


def test_planted_preferences_are_found(planted):
    assert planted.room.has_evidence
    assert planted.room.personal_accuracy.value > 0.95
    assert planted.recommendation.kind == "individual"
    assert "words" in [taste.feature for taste in planted.tastes[:3]]
    assert all(user.personal_accuracy > user.pooled_accuracy for user in planted.users)


def test_shuffled_ids_are_not_recommended_a_user_model(quick):
    dataset = length_preferences()
    shuffled = dataset.remove_columns("user_id").add_column(
        "user_id", random.Random(0).sample(dataset["user_id"][:], 240)
    )
    audit = audit_preferences(shuffled)
    assert audit.recommendation.kind == "none"
    assert audit.recommendation.reason.startswith(
        "No evidence of room: on held-out prompts, simple rules of single users"
    )


def test_users_are_drawn_from_large_data(planted, monkeypatch, quick):
    monkeypatch.setattr("trl_personal.audit.report.MAX_PAIRS", 130)
    audit = audit_preferences(length_preferences())
    assert (audit.room.num_users, audit.room.num_pairs) == (4, 120)
    assert "120 pairs were not used for it" in audit.notes[-1]
    assert sum(user.personal_accuracy is None for user in audit.users) == 4
    assert audit.counts == planted.counts


def test_a_report_is_saved(planted, toy, tmp_path):
    for audit in (planted, toy):
        audit.save(tmp_path / "new")
        saved = json.loads((tmp_path / "new" / "audit.json").read_text())
        assert saved == json.loads(json.dumps(audit.to_dict()))
        assert (tmp_path / "new" / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_no_user_id_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="trl_personal"):
        audit_preferences(length_preferences(num_users=3, pairs=5))
    assert "Audited 15 pairs of 3 users" in caplog.text
    assert "annotator-" not in caplog.text


@pytest.fixture
def preference_file(tmp_path):
    path = tmp_path / "preferences.jsonl"
    length_preferences().to_json(path)
    return str(path)


def test_the_command_prints_aggregates_and_users_only_if_asked(preference_file, tmp_path, capsys, monkeypatch, quick):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["audit", preference_file, "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "pairs, users, prompts" in output.out
    assert "recommended user model" in output.out
    assert "annotator-" not in output.out + output.err
    assert f"audit.json and audit.png are in {tmp_path / 'out'}." in output.err
    assert main(["audit", preference_file, "--list_users"]) == 0
    assert "annotator-7" in capsys.readouterr().out


def test_the_command_prints_json(preference_file, capsys, quick):
    audit = audit_preferences(length_preferences())
    assert main(["audit", preference_file, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(audit.to_dict()))
    del expected["users"], expected["variants"]
    assert found == expected
    assert main(["audit", preference_file, "--format", "json", "--list_users"]) == 0
    assert len(json.loads(capsys.readouterr().out)["users"]) == 8


def test_exit_codes(tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    rows_of(TRAIN[:1]).to_json(path)
    assert main(["audit", str(path)]) == 0  # also if nothing is recommended
    assert "Too little to tell whether users differ" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", str(path), "--user_id_column", "who"]) == 1
    assert "one.jsonl has no column ['who']; found ['chosen'," in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["audit", str(path), "--min_pairs", "0"])
    assert exit_.value.code == 2


# --- Real preferences ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_audits():
    audits = {}

    def audit(name):
        path = SHARED_DATA / name / f"{name}.jsonl"
        if not path.is_file():
            pytest.skip(f"{path} is not here")
        if name not in audits:
            audits[name] = audit_preferences(load_dataset("json", data_files=str(path))["train"], split_column="split")
        return audits[name]

    return audit


@pytest.mark.parametrize(("name", "num_conflicting"), [("ukpconvarg_workers", 115), ("tulu_human_eval", 21)])
@pytest.mark.slow
def test_real_annotators_give_no_evidence_of_room(shared_audits, name, num_conflicting):
    audit = shared_audits(name)
    assert audit.agreement.num_conflicting == num_conflicting
    assert abs(audit.room.gap.value) < 0.015
    assert not audit.room.has_evidence
    assert audit.recommendation.kind == "none"
    assert "No evidence of room" in audit.recommendation.reason


@pytest.mark.parametrize(("name", "lowest"), [("psoups_style_tulu", 0.90), ("psoups_demos", 0.98)])
@pytest.mark.slow
def test_styles_that_conflict_by_construction_give_large_room(shared_audits, name, lowest):
    audit = shared_audits(name)
    assert audit.room.pooled_accuracy.value == pytest.approx(0.5, abs=0.01)
    assert audit.agreement.pooled_ceiling == 0.5
    assert audit.room.personal_accuracy.value >= lowest
    assert audit.room.has_evidence
    assert audit.recommendation.kind != "none"


def test_splits_by_prompt_do_not_leak_and_others_are_noticed(shared_audits):
    assert shared_audits("tulu_human_eval").leakage.same_prompt == 0
    assert shared_audits("ukpconvarg_workers").leakage.same_prompt == 228  # all debates are in both


@pytest.mark.slow
def test_100_000_pairs_take_seconds(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    prompts = [[" ".join(rng.choices(words, k=size)) for size in (40, 40, 80)] for _ in range(50_000)]
    with open(tmp_path / "large.jsonl", "w") as file:
        for number in range(100_000):
            user, (prompt, short, long) = rng.randrange(1000), prompts[number % 50_000]
            chosen, rejected = (short, long) if user % 3 == 0 else (long, short)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": f"u{user}"}
            file.write(json.dumps(row) + "\n")
    script = (
        "import resource, sys, time; import trl_personal.cli.audit; from trl_personal.cli import main;"
        "start = time.process_time();"
        "code = main(['audit', sys.argv[1]]); peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(code, time.process_time() - start, peak / 1e6)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "large.jsonl")]
    fastest = math.inf
    for _ in range(3):  # beside other processes a second of the CPU does less: the fastest run counts
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        code, seconds, gigabytes = map(float, run.stdout.splitlines()[-1].split())
        assert code == 0
        assert gigabytes < 2
        fastest = min(fastest, seconds)
        if fastest < 20:
            break
    assert fastest < 20

"""
Two hundred malformed inputs from a seeded generator. The outcome of each is known from how it was made: the exact pairs of
each user, with the reason and the place of every row that is left out, or a refusal that names the file and what is wrong.
"""

import csv
import gzip
import io
import json
import math
import os
import random
import time
from dataclasses import dataclass, field

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments

from trl_personal.cli import main
from trl_personal.cli.preferences import load_preferences
from trl_personal.data import load_generic


SEED = 11
NUM_CASES = {"files": 54, "rows": 60, "flags": 48, "ids": 60}
JSON_LINES, JSON_LIST, CSV, TSV, PARQUET, GZIP = "jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"


@dataclass
class Case:
    """What to write under which names, how to read it, and what must come of it."""

    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    source: str = ""
    argv: list[str] = field(default_factory=list)
    users: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)  # for each reason: how often, and where first
    refusal: tuple[str, ...] = ()
    code: int = 1
    variants: int = 0
    special: str = ""


# --- Sound rows, and how they are written ---------------------------------------------------------------------------------


def sound_row(rng, number):
    user = rng.choice(["ann", "bo", "cy", "7", "007", "NA"])
    text = rng.choice(["tea", "a, b", 'say "so"', "two\nlines", "naïve ☕", "null"])
    return {"prompt": f"q{number} {text}?", "chosen": f"yes {text}", "rejected": f"no {text}", "user_id": user}


def sound_rows(rng, number=None):
    return [sound_row(rng, i) for i in range(number or rng.randint(2, 6))]


def written(rows, form):
    """A file of rows; a row that is bytes or text is a line as it is."""
    if form == PARQUET:
        buffer = io.BytesIO()
        Dataset.from_list(rows).to_parquet(buffer)
        return buffer.getvalue()
    if form == JSON_LIST:
        return json.dumps(rows).encode()
    if form in (CSV, TSV):
        lines = [line_of_csv(list(rows[0]) if isinstance(rows[0], dict) else FIELDS, form)]
        lines += [row if isinstance(row, bytes) else line_of_csv(row.values(), form) for row in rows]
        return b"".join(lines)
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    return gzip.compress(data) if form == GZIP else data


FIELDS = ["prompt", "chosen", "rejected", "user_id"]


def line_of_csv(values, form):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t" if form == TSV else ",", lineterminator="\n").writerow(values)
    return buffer.getvalue().encode()


def place_of(rows, index, form, file):
    """Where a row stands, counted by hand: lines in files of lines, rows in lists and tables."""
    if form in (JSON_LIST, PARQUET):
        return f"{file}, row {index + 1}"
    before = 1 if form in (CSV, TSV) else 0
    for row in rows[:index]:
        before += (row if isinstance(row, bytes) else written([row], form)).count(b"\n") if form != GZIP else 1
        before -= 1 if form in (CSV, TSV) and not isinstance(row, bytes) else 0  # `written` adds a header
    return f"{file}, line {before + 1}"


def by_user(rows):
    found = {}
    for row in rows:
        found.setdefault(row["user_id"], []).append((row["prompt"], row["chosen"], row["rejected"]))
    return found


# --- Rows that cannot be used ---------------------------------------------------------------------------------------------

# what is wrong with one row: how it is made from a sound one, the reason, and where it can be written
EVERYWHERE = (JSON_LINES, JSON_LIST, CSV, TSV, PARQUET, GZIP)
TYPED = (JSON_LINES, JSON_LIST, GZIP)
FAULTS = {
    "same": (lambda row: {**row, "rejected": row["chosen"]}, "both responses are the same", EVERYWHERE),
    "blank prompt": (lambda row: {**row, "prompt": "  "}, "`prompt` is blank", EVERYWHERE),
    "blank answer": (lambda row: {**row, "chosen": " \u00a0"}, "`chosen` is blank", EVERYWHERE),
    "null answer": (lambda row: {**row, "rejected": None}, "no `rejected`", EVERYWHERE),
    "null prompt": (lambda row: {**row, "prompt": None}, "no `prompt`", EVERYWHERE),
    "number": (lambda row: {**row, "chosen": 3}, "`chosen` is not text", TYPED),
    "list": (lambda row: {**row, "rejected": ["a"]}, "`rejected` is not text", TYPED),
    "lone surrogate": (lambda row: {**row, "chosen": "\ud83d"}, "`chosen` is not valid Unicode", TYPED),
    "no key": (lambda row: {k: v for k, v in row.items() if k != "chosen"}, "no `chosen`", TYPED),
    "not an object": (lambda row: [row], "not a JSON object", TYPED),
    "a number for a row": (lambda row: 5, "not a JSON object", TYPED),
    "cut": (lambda row: json.dumps(row).encode()[:-9] + b"\n", "not JSON", (JSON_LINES, GZIP)),
    "two": (lambda row: (json.dumps(row) * 2).encode() + b"\n", "not JSON", (JSON_LINES, GZIP)),
    "deep": (lambda row: b'{"prompt": ' + b"[" * 100_000 + b"\n", "nested too deeply", (JSON_LINES, GZIP)),
    "digits": (lambda row: b'{"prompt": ' + b"9" * 5000 + b"}\n", "not JSON", (JSON_LINES, GZIP)),
    "twice": (
        lambda row: b'{"user_id": "x", ' + json.dumps(row).encode()[1:] + b"\n",
        "a key twice",
        (JSON_LINES, GZIP),
    ),
    "latin-1": (
        lambda row: json.dumps({**row, "chosen": "é"}, ensure_ascii=False).encode("latin-1") + b"\n",
        "not UTF-8",
        (JSON_LINES, GZIP),
    ),
    "latin-1 field": (lambda row: b"\xe9;x;y;z\n", None, ()),
    "fewer": (lambda row: b"a\n", "fewer fields than columns", (CSV, TSV)),
    "open quote": (lambda row: b'"never closed\n', "quotes that do not match", (CSV, TSV)),
    "wrong quote": (lambda row: b'"a"b"c\n', "quotes that do not match", (CSV, TSV)),
}
del FAULTS["latin-1 field"]


def row_cases(rng):
    names = list(FAULTS)
    for number in range(NUM_CASES["rows"]):
        fault, reason, forms = FAULTS[names[number % len(names)]]
        form = rng.choice(forms)
        rows, sound = [], sound_rows(rng)
        bad = set(rng.sample(range(len(sound) + 3), rng.randint(1, 3)))
        remaining = iter(sound)
        left_out, file = {}, f"rows.{form}"
        for index in range(len(sound) + len(bad)):
            rows.append(
                fault(sound_row(rng, 99)) if index in bad else next(remaining, None) or fault(sound_row(rng, 99))
            )
        kept = [row for row in rows if row in sound]
        first = next(index for index, row in enumerate(rows) if row not in sound)
        left_out[reason] = (len(rows) - len(kept), place_of(rows, first, form, file))
        yield Case(
            f"{names[number % len(names)]} in {form}",
            {file: written(rows, form)},
            file,
            users=by_user(kept),
            left_out=left_out,
        )


# --- Files ----------------------------------------------------------------------------------------------------------------


def file_cases(rng):
    makers = [maker for name, maker in sorted(globals().items()) if name.startswith("make_")]
    for number in range(NUM_CASES["files"]):
        case = makers[number % len(makers)](rng, sound_rows(rng))
        case.source = case.source or next(iter(case.files))
        yield case


def lines(rows):
    return written(rows, JSON_LINES)


def make_absent(rng, rows):
    name = rng.choice(["gone.jsonl", "no/such/folder", "gone", "a/b/c.csv", "./gone", "gone.parquet"])
    return Case("absent", source=name, refusal=("There is no file or folder",))


def make_blank(rng, rows):
    return Case("blank lines", {"rows.jsonl": b"\n" * rng.randint(0, 4)}, refusal=("rows.jsonl holds no row",))


def make_binary(rng, rows):
    data = bytes(rng.randrange(128, 256) for _ in range(200)).replace(b"\n", b"")
    return Case("binary", {"rows.jsonl": b"\x80" + data}, refusal=("rows.jsonl, line 1: not UTF-8",))


def make_bom(rng, rows):
    form = rng.choice([JSON_LINES, CSV])
    return Case("mark", {f"rows.{form}": b"\xef\xbb\xbf" + written(rows, form)}, users=by_user(rows))


def make_csv_without_lines(rng, rows):
    return Case("header only", {"rows.csv": b"prompt,chosen,rejected,user_id\n"}, refusal=("rows.csv holds no row",))


def make_csv_empty(rng, rows):
    return Case("empty csv", {"rows.tsv": b""}, refusal=("rows.tsv is empty; its first line must name the columns",))


def make_csv_twice(rng, rows):
    data = b"prompt,chosen,chosen,user_id\na,b,c,d\n"
    return Case("column twice", {"rows.csv": data}, refusal=("rows.csv, line 1, has the column 'chosen' twice",))


def make_cut_gzip(rng, rows):
    data = gzip.compress(lines(sound_rows(rng, 200)))
    return Case(
        "cut gzip", {"rows.jsonl.gz": data[: len(data) // 2]}, refusal=("rows.jsonl.gz is cut off or damaged",)
    )


def make_no_gzip(rng, rows):
    return Case("no gzip", {"rows.jsonl.gz": lines(rows)}, refusal=("rows.jsonl.gz is no gzip file",))


def make_hidden_gzip(rng, rows):
    return Case(
        "gzip by no name", {"rows.jsonl": gzip.compress(lines(rows))}, refusal=("rows.jsonl is gzip, not text",)
    )


def make_cut_list(rng, rows):
    data = json.dumps(rows, indent=rng.choice([None, 1])).encode()
    return Case("cut list", {"rows.json": data[: -rng.randint(2, 20)]}, refusal=("rows.json is not JSON",))


def make_utf16(rng, rows):
    return Case("utf-16", {"rows.jsonl": lines(rows).decode().encode("utf-16")}, refusal=("rows.jsonl is UTF-16",))


def make_object(rng, rows):
    return Case("object", {"rows.json": json.dumps({"train": rows}).encode()}, refusal=("rows.json has no column",))


def make_pretty_object(rng, rows):
    data = json.dumps({"train": rows}, indent=1).encode()
    return Case("pretty object", {"rows.json": data}, refusal=("rows.json, line 1: not JSON",))


def make_pipe(rng, rows):
    return Case("pipe", source="pipe.jsonl", special="pipe", refusal=("must be a file or a folder, found a pipe",))


def make_parent(rng, rows):
    return Case(
        "a parent", {"in/here.txt": b"x"}, source="in/deep/..", special="in/deep", refusal=("holds no data file",)
    )


def make_mixed(rng, rows):
    files = {f"d/a.{JSON_LINES}": lines(rows), f"d/b.{CSV}": written(rows, CSV)}
    return Case("mixed folder", files, "d", refusal=("files of one type", "['.csv', '.jsonl']"))


def make_unknown_beside(rng, rows):
    return Case("other data", {"d/a.jsonl": lines(rows), "d/b.xlsx": b"x"}, "d", refusal=("['.jsonl', '.xlsx']",))


def make_half_named(rng, rows):
    files = {"d/train.jsonl": lines(rows), "d/people.jsonl": lines(rows)}
    return Case("half named", files, "d", refusal=("such as people.jsonl",))


def make_shards(rng, rows):
    files = {f"d/{i}.jsonl": lines([row]) for i, row in enumerate(rows)} | {"d/README.md": b"# about"}
    return Case("shards", files, "d", users=by_user(rows))


def make_damaged_parquet(rng, rows):
    data = written(rows, PARQUET)
    return Case(
        "damaged parquet",
        {"rows.parquet": data[: len(data) // 2]},
        refusal=("rows.parquet cannot be read as parquet",),
    )


def make_suffix(rng, rows):
    return Case("no type", {"rows.docx": lines(rows)}, refusal=("rows.docx must be a file of type",))


def make_upper(rng, rows):
    return Case("upper case", {"ROWS.JSONL": lines(rows)}, users=by_user(rows))


def make_windows(rng, rows):
    return Case("windows lines", {"rows.jsonl": lines(rows).replace(b"\n", b"\r\n\r\n")}, users=by_user(rows))


def make_long(rng, rows):
    rows[0]["chosen"] = "long " * rng.randint(200_000, 300_000)
    form = rng.choice([JSON_LINES, CSV])
    return Case("long line", {f"rows.{form}": written(rows, form)}, users=by_user(rows))


def make_no_end(rng, rows):
    return Case("no last line end", {"rows.jsonl": lines(rows)[:-1]}, users=by_user(rows))


def make_renamed(rng, rows):
    old, new, flag = rng.choice(
        [
            ("prompt", "question", "prompt_column"),
            ("chosen", "chosenn", "chosen_column"),
            ("user_id", "worker", "user_id_column"),
        ]
    )
    renamed = [{new if key == old else key: value for key, value in row.items()} for row in rows]
    refusal = (f"rows.csv has no column ['{old}']", f"Did you mean `--{flag} {new}`?")
    return Case("renamed column", {"rows.csv": written(renamed, CSV)}, refusal=refusal)


# --- Ids ------------------------------------------------------------------------------------------------------------------

# an id as it is written, the user that it must be (or the reason it is none), and where it can be written
IDS = [
    (12, "12", TYPED),
    (12.0, "12", TYPED),
    ("12.0", "12", (CSV, TSV)),
    ("12.0", "12.0", TYPED),
    (-3.0, "-3", TYPED),
    ("-3.0", "-3", (CSV, TSV)),
    ("007", "007", EVERYWHERE),
    ("NA", "NA", EVERYWHERE),
    ("nan", "nan", EVERYWHERE),
    (" ann", " ann", (JSON_LINES, JSON_LIST, CSV, PARQUET)),
    ("Zoë", "Zoë", EVERYWHERE),
    ("👩‍🔬", "👩‍🔬", EVERYWHERE),
    ('a,b\n"c', 'a,b\n"c', EVERYWHERE),
    (2**63, str(2**63), TYPED),
    (9007199254740992.0, "9007199254740992", TYPED),
    (None, None, EVERYWHERE),
    (math.nan, None, TYPED),
    ("", None, (CSV, TSV)),
    ("", KeyError("no `user_id`"), TYPED),
    ("  ", KeyError("`user_id` is blank"), EVERYWHERE),
    (1.5, KeyError("`user_id` is neither text nor a whole number"), TYPED),
    (1e17, KeyError("`user_id` is neither text nor a whole number"), TYPED),
    (True, KeyError("`user_id` is neither text nor a whole number"), TYPED),
    (["ann"], KeyError("`user_id` is neither text nor a whole number"), TYPED),
    ({"id": 1}, KeyError("`user_id` is neither text nor a whole number"), TYPED),
    (math.inf, KeyError("`user_id` is neither text nor a whole number"), TYPED),
    (
        "1.2345678901234568e+17",
        KeyError("`user_id` is a number that was rounded, so it may stand for several users"),
        (CSV, TSV),
    ),
    ("\ud800", KeyError("`user_id` is not valid Unicode"), TYPED),
]
# ids that are to be told as perhaps one user, and are kept apart
VARIANTS = [
    ("ann", "Ann"), ("ann", "ann "), ("ann lee", "ann  lee"), ("Zoe\u0308", "Zoë"), ("ﬁ", "fi"), ("a\u200bnn", "ann"),
    ("STRASSE", "straße"), ("bo\u00a0b", "bo b"),
]  # fmt: skip


def id_cases(rng):
    for number in range(NUM_CASES["ids"]):
        rows = [{**row, "user_id": "known"} for row in sound_rows(rng)]
        if number % 4 == 3:
            yield variant_case(rng, rows)
            continue
        value, user, forms = IDS[number % len(IDS)]
        form = rng.choice(forms)
        at = rng.randrange(len(rows) + 1)
        rows.insert(at, {**sound_row(rng, 50), "user_id": value})
        kept = [row for index, row in enumerate(rows) if index != at or not isinstance(user, KeyError)]
        file = f"ids.{form}"
        yield Case(
            f"id {value!r} in {form}".encode("ascii", "backslashreplace").decode(),
            {file: written(rows, form)},
            file,
            users=by_user([{**row, "user_id": user} if row is rows[at] else row for row in kept]),
            left_out={user.args[0]: (1, place_of(rows, at, form, file))} if isinstance(user, KeyError) else {},
        )


def variant_case(rng, rows):
    one, other = rng.choice(VARIANTS)
    rows = [{**row, "user_id": rng.choice([one, other])} for row in rows]
    rows += [{**sound_row(rng, 60 + i), "user_id": user} for i, user in enumerate((one, other))]
    form = rng.choice([JSON_LINES, CSV, PARQUET])
    name = f"variant {one!r}".encode("ascii", "backslashreplace").decode()
    return Case(name, {f"ids.{form}": written(rows, form)}, f"ids.{form}", users=by_user(rows), variants=2)


# --- Flags ----------------------------------------------------------------------------------------------------------------

RIGHT_FLAGS = {
    "dpo": [
        "--num_clusters",
        "--user_id_column",
        "--personalization_alpha",
        "--learning_rate",
        "--prompt_column",
        "--output_dir",
    ],
    "audit": ["--user_id_column", "--min_pairs", "--split_column", "--choice_column", "--list_users"],
    "eval": ["--dataset_test_split", "--opposite_column", "--user_id_column", "--baselines", "--max_length"],
    "generate": ["--max_new_tokens", "--temperature", "--repetition_penalty", "--users_file"],
    "info": ["--list_users", "--format"],
}
NEEDED = {
    "dpo": ["--model_name_or_path", "m", "--dataset_name", "d"],
    "audit": ["rows.jsonl"],
    "eval": ["m", "--dataset_name", "rows.jsonl"],
    "generate": ["--model", "m", "--prompt", "a"],
    "info": ["m"],
}
OUT_OF_RANGE = [
    ("generate", "--top_p", ["5", "0", "-0.1", "nan", "x"]),
    ("generate", "--temperature", ["-1", "inf", "hot"]),
    ("generate", "--repetition_penalty", ["0", "-2"]),
    ("generate", "--max_new_tokens", ["0", "-1", "1.5", "²", "9" * 30]),
    ("generate", "--batch_size", ["0", "many"]),
    ("generate", "--seed", ["-1", "1e3", str(2**40)]),
    ("eval", "--beta", ["0", "-1", "nan"]),
    ("eval", "--max_steps", ["0"]),
    ("audit", "--min_pairs", ["0", "-5"]),
    ("audit", "--seed", ["-3"]),
    ("audit", "--ties", ["half"]),
]
WRONG_COLUMNS = [
    (
        ["--response_columns", "a", "b"],
        "`--response_columns` needs exactly one of `--choice_column`, `--rating_columns`",
    ),
    (["--choice_column", "chosen"], "`--choice_column` needs `--response_columns`"),
    (["--choice_values", "A=0"], "`--choice_values` says what the values of `--choice_column` mean"),
    (
        ["--response_columns", "a", "b", "--choice_column", "w", "--choice_values", "A"],
        "`--choice_values` must be VALUE=N",
    ),
    (["--prompt_column", "promptt"], "Did you mean `--prompt_column prompt`?"),
    (["--user_id_column", "user"], "Did you mean `--user_id_column user_id`?"),
    (["--rejected_column", "Rejected"], "Did you mean `--rejected_column rejected`?"),
    (["--split_column", "part"], "rows.jsonl has no column ['part']"),
]


def mistyped(rng, flag):
    at = rng.randrange(4, len(flag) - 1)
    kind = rng.choice(["swap", "drop", "double"])
    if kind == "swap" and flag[at] != flag[at + 1]:
        return flag[:at] + flag[at + 1] + flag[at] + flag[at + 2 :]
    return flag[:at] + flag[at] * 2 + flag[at + 1 :] if kind == "double" else flag[: at - 1] + flag[at:]


def flag_cases(rng):
    files = {"rows.jsonl": lines(sound_rows(rng))}
    ranges = [(command, flag, value) for command, flag, values in OUT_OF_RANGE for value in values]
    for argv, message in WRONG_COLUMNS:
        yield Case(f"columns {argv}", files, argv=["audit", "rows.jsonl", *argv], refusal=(message,))
    for command, flag, value in rng.sample(ranges, 22):
        argv = [command, *NEEDED[command], flag, value]
        yield Case(f"{flag} {value!a}", files, argv=argv, refusal=(f"argument {flag}: ",), code=2)
    for _ in range(NUM_CASES["flags"] - 22 - len(WRONG_COLUMNS)):
        command = rng.choice(list(RIGHT_FLAGS))
        flag = rng.choice(RIGHT_FLAGS[command])
        wrong = mistyped(rng, flag)
        argv = [command, *NEEDED[command], wrong, "1"]
        refusal = (f"unrecognized arguments: {wrong}", f"Did you mean {flag}?")
        yield Case(f"{command} {wrong}", files, argv=argv, refusal=refusal, code=2)


def all_cases():
    for name, generate in (("files", file_cases), ("rows", row_cases), ("flags", flag_cases), ("ids", id_cases)):
        for number, case in enumerate(generate(random.Random(SEED))):
            yield pytest.param(case, id=f"{name}-{number}-{case.name}".replace("\n", " "))


CASES = list(all_cases())


def test_there_are_two_hundred_cases_and_forty_of_each_kind():
    assert len(CASES) == sum(NUM_CASES.values()) >= 200
    assert min(NUM_CASES.values()) >= 40


@pytest.mark.parametrize("case", CASES)
def test_malformed_input_has_its_outcome(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, data in case.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    if case.special == "pipe":
        os.mkfifo(tmp_path / case.source)
    elif case.special:
        (tmp_path / case.special).mkdir(parents=True)
    start = time.monotonic()
    if case.refusal:
        assert_refused(case, capsys)
    else:
        assert_read(case)
    assert time.monotonic() - start < 60


def assert_refused(case, capsys):
    try:
        code = main(case.argv or ["audit", case.source])
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (case.code, "")
    assert "Traceback" not in printed.err
    told = [line for line in printed.err.splitlines() if ": error: " in line]
    assert len(told) == 1
    assert [part for part in case.refusal if part not in told[0]] == []


def assert_read(case):
    """By the door of the commands, as a stream, and by the loader: the same pairs, the same reasons."""
    reports = []
    options = {"on_report": reports.append}
    pairs = load_preferences(ScriptArguments(dataset_name=case.source), DatasetMixtureConfig(), **options)["train"]
    streaming = ScriptArguments(dataset_name=case.source, dataset_streaming=True)
    stream = list(load_preferences(streaming, DatasetMixtureConfig(), **options)["train"])
    loaded = load_generic(case.source, test_size=0, missing_user="generic", **options)["train"]
    for rows in (pairs, stream, loaded):
        assert by_user(rows) == case.users
    for report in reports:
        reasons = {**report.broken, **report.filtered}
        assert {reason: (count, report.places[reason]) for reason, count in reasons.items()} == case.left_out
        assert (
            report.variants.startswith(f"{case.variants} user ids are 1 but for")
            if case.variants
            else not report.variants
        )
    assert len(reports) == 3

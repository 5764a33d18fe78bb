"""What others wrote reaches a terminal as text: no control character, no markup, no second line where there is one."""

import json
import logging
from io import StringIO

import pytest
from conftest import make_model, make_tokenizer
from datasets import Dataset
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model
from trl_personal.cli import main
from trl_personal.evaluation.report import personalization_table
from trl_personal.evaluation.verdict import evaluate_margins
from trl_personal.terminal import json_line, print_whole, printable


HOSTILE = ["\x1b[2J\x1b]0;title\x07", "line\nbreak", "\x9b31m", "[red]markup[/red]", "\u202eright to left", "bell\x7f"]
ALLOWED = "\n"


def assert_harmless(text, allowed=ALLOWED):
    assert printable(text, keep=allowed) == text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model whose users have names that would steer a terminal."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    model = make_model()
    config = UserModelConfig(num_users=len(HOSTILE), num_virtual_tokens=2, token_dim=32)
    attach_user_model(model, IndividualUserModel(config), UserVocab(HOSTILE))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_become_escapes(text):
    assert_harmless(printable(text), allowed="")
    assert_harmless(json_line({text: [text]}, indent=1))
    assert json.loads(json_line({text: [text]})) == {text: [text]}
    assert printable("naïve 👩‍🔬 text\twith tab", keep="\t") == "naïve 👩‍🔬 text\twith tab"


@pytest.mark.parametrize("form", ["table", "json"])
def test_info_lists_hostile_users_a_line_each(hostile, capsys, form):
    assert main(["info", str(hostile), "--list_users", "--format", form]) == 0
    out = capsys.readouterr().out
    assert_harmless(out)
    if form == "json":
        assert json.loads(out)["users"] == HOSTILE
    else:
        assert out.splitlines()[-len(HOSTILE) :] == [printable(user) for user in HOSTILE]


@pytest.mark.parametrize("form", ["table", "jsonl"])
def test_generated_answers_of_hostile_users(hostile, tmp_path, capsys, form):
    (tmp_path / "users").write_text("\n".join(user for user in HOSTILE if "\n" not in user), encoding="utf-8")
    arguments = [
        "generate",
        "--model",
        str(hostile),
        "--users_file",
        str(tmp_path / "users"),
        "--prompt",
        "write \x1b[1m a",
    ]
    assert main([*arguments, "--max_new_tokens", "3", "--format", form]) == 0
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    if form == "table":
        assert "[red]markup[/red]" in captured.out.replace("\n", "")


def test_unknown_users_are_counted_and_not_printed(hostile, capsys, caplog):
    with caplog.at_level(logging.INFO):
        assert (
            main(
                [
                    "generate",
                    "--model",
                    str(hostile),
                    "--users",
                    "somebody\x1b[2J,else",
                    "--prompt",
                    "a",
                    "--max_new_tokens",
                    "3",
                ]
            )
            == 0
        )
    err = capsys.readouterr().err
    assert "2 of 2 users are unknown to the model" in err
    assert "somebody" not in err + caplog.text


def test_errors_are_harmless(tmp_path, capsys):
    assert main(["info", str(tmp_path / "no\x1b[2Jfolder")]) == 1
    assert_harmless(capsys.readouterr().err)


def test_the_table_of_an_evaluation_shows_names_as_they_are():
    users = [user for user in HOSTILE for _ in range(2)]
    report = evaluate_margins([1.0, -1.0] * 6, [0.5, -0.5] * 6, users, list(range(12)))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(personalization_table(report, list_users=True))
    text = console.export_text()
    assert_harmless(text)
    assert "[red]markup[/red]" in text


def test_the_audit_shows_names_as_they_are(tmp_path, capsys):
    rows = [
        {"prompt": f"p{i}", "chosen": "yes" if i % 2 else "no", "rejected": "no" if i % 2 else "yes", "user_id": user}
        for user in HOSTILE
        for i in range(4)
    ]
    Dataset.from_list(rows).to_json(str(tmp_path / "rows.jsonl"))
    for form in ("table", "json"):
        assert main(["audit", str(tmp_path / "rows.jsonl"), "--list_users", "--format", form, "--min_pairs", "2"]) == 0
        assert_harmless(capsys.readouterr().out)


WIDE = {f"column_{i}": "0.84–0.90" for i in range(12)} | {"who": "a-name-that-is-long"}


def printed(monkeypatch, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    table = Table(*WIDE, title="wide")
    table.add_row(*WIDE.values())
    output = StringIO()
    print_whole(Group(table, Text("[a note]")), file=output)
    return output.getvalue()


def test_a_table_in_a_file_has_every_name_and_interval(monkeypatch):
    lines = printed(monkeypatch, None).splitlines()
    assert [name in lines[2] for name in WIDE] == [True] * 13
    assert lines[4].count("0.84–0.90") == 12
    assert lines[-1] == "[a note]"


def test_a_table_in_eighty_columns_goes_on_below_and_loses_nothing(monkeypatch):
    text = printed(monkeypatch, 80)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    rows = [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in text.splitlines()]
    whole = ["".join(column) for column in zip(*[row for row in rows if row], strict=True)]
    assert whole == [name + value for name, value in WIDE.items()]

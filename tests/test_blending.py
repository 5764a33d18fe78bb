"""Between users: strengths and blends, by hand, and as the users themselves at the ends."""

import json
import logging

import pytest
import torch
from conftest import make_model

from trl_personal import UserVocab, attach_user_model
from trl_personal.cli import main
from trl_personal.models.blending import as_strengths, blended_soft_prompts
from trl_personal.user_models import get_user_model_class


CPU = torch.device("cpu")
KINDS = ["individual", "cluster", "low_rank"]


def make_users(kind, token_dim=8, std=1.0):
    torch.manual_seed(0)
    user_model_class = get_user_model_class(kind)
    user_model = user_model_class(
        user_model_class.config_class(num_users=3, num_virtual_tokens=2, token_dim=token_dim)
    )
    for parameter in user_model.parameters():
        parameter.data.normal_(std=std)
    return user_model, UserVocab(["ann", "bo", "cy"])


def blended(kind, users, strengths):
    user_model, vocab = make_users(kind)
    with torch.no_grad():
        found, _ = blended_soft_prompts(user_model, vocab, users, strengths, CPU)
        return found, user_model(torch.arange(4))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_users_are_theirs_to_the_last_bit(kind):
    found, own = blended(kind, ["bo", None, "ann", "bo", "nobody", {"cy": 1.0}], [1.0] * 6)
    assert torch.equal(found[:5], own[[2, 0, 1, 2, 0]])
    torch.testing.assert_close(found[5], own[3])


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_and_weights_by_hand(kind):
    users = ["ann", "ann", {"ann": 0.7, "bo": 0.3}, {"ann": 1.0, "bo": 1.0, "nobody": 0.5}, {"cy": -0.5}]
    found, own = blended(kind, users, [0.0, 0.5, 2.0, 1.0, -1.0])
    offset = own - own[0]
    expected = [
        own[0],
        own[0] + 0.5 * offset[1],
        own[0] + 2.0 * (0.7 * offset[1] + 0.3 * offset[2]),
        own[0] + offset[1] + offset[2],
        own[0] + 0.5 * offset[3],
    ]
    for row, value in zip(found, expected, strict=True):
        torch.testing.assert_close(row, value)


@pytest.mark.parametrize(
    ("users", "strength", "error", "words"),
    [
        (["ann"], 2.5, ValueError, r"`user_strength` must lie in \[-1, 2\], got 2.5"),
        (["ann"], float("nan"), ValueError, "must lie in"),
        (["ann"], True, TypeError, "`user_strength` must be a number, got True"),
        (["ann"], "1", TypeError, "must be a number, got '1'"),
        (["ann"], [1.0, 0.5], ValueError, "has 2 numbers for a batch of 1 rows"),
        ([{"ann": 3}], None, ValueError, r"A weight in `user_ids` must lie in \[-1, 2\], got 3"),
        ([{"ann": None}], None, TypeError, "A weight in `user_ids` must be a number, got None"),
        ([{}], None, ValueError, "names no user"),
        ([{"": 1.0}], None, ValueError, "empty"),
        ([{"ann": 1.0, "bo": 1.0}, "cy"], None, ValueError, "2 users for a batch of 1 rows"),
        ({"ann": 1.0}, None, TypeError, "Give a list"),
    ],
)
def test_what_cannot_be_is_refused(users, strength, error, words):
    model = make_model("llama")
    attach_user_model(model, *make_users("individual", model.config.hidden_size))
    with pytest.raises(error, match=words):
        model.generate(torch.tensor([[4, 5, 6]]), user_ids=users, user_strength=strength, max_new_tokens=2)


def test_a_strength_out_of_training_is_told_without_ids(caplog):
    with caplog.at_level(logging.WARNING):
        assert as_strengths([0.0, 1.0, 1.5, -0.1], 4) == [0.0, 1.0, 1.5, -0.1]
    (record,) = caplog.records
    assert record.message.startswith("2 of 4 rows have a `user_strength` outside of [0, 1]")


def test_generation_goes_from_the_generic_user_to_the_user():
    """At the ends the answers are theirs; a blend of one user at a weight is that user at a strength."""
    model = make_model("llama")
    attach_user_model(model, *make_users("individual", model.config.hidden_size))
    ids = torch.tensor([[4, 5, 6]]).expand(6, -1)

    def write(rows, **users):
        settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(model.generate(ids[:rows], **users, **settings)["logits"])

    ends = write(2, user_ids=[None, "ann"])
    mixed = write(
        6, user_ids=["ann"] * 3 + [{"ann": 0.25}, {"ann": 0.5}, "ann"], user_strength=[0, 1, 0.5, 1, 0.5, 0.25]
    )
    torch.testing.assert_close(mixed[0, :2], ends[0])
    torch.testing.assert_close(mixed[0, 3], mixed[0, 5])
    torch.testing.assert_close(mixed[0, 4], mixed[0, 5])
    assert (mixed[0, 2] - ends[0]).abs().amax(dim=1).min() > 0.01


def test_the_command_line_takes_strengths_and_blends(tmp_path, make_trainer, capsys):
    trainer = make_trainer("llama", learning_rate=0.0)
    for parameter in trainer.user_model.parameters():
        parameter.data.normal_()
    trainer.save_model(str(tmp_path / "out"))
    (tmp_path / "users.jsonl").write_text('"ann"\nnull\n{"ann": 0.5, "bo": 0.5}\n{"nobody": 1.0}\n"ann"\n"12"\n12\n')
    command = [
        "generate",
        "--model",
        str(tmp_path / "out"),
        "--prompt",
        "w4 w5",
        "--max_new_tokens",
        "6",
        "--format",
        "jsonl",
    ]

    def run(*arguments):
        assert main([*command, *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    whole = run("--users_file", str(tmp_path / "users.jsonl"))
    assert [row["user_id"] for row in whole] == ["ann", None, {"ann": 0.5, "bo": 0.5}, {"nobody": 1.0}, "12"]
    assert [row["known"] for row in whole] == [True, False, True, False, False]
    assert whole[3]["text"] == whole[1]["text"]
    none = run("--users", "ann,bo", "--user_strength", "0")
    assert {row["text"] for row in none} == {whole[1]["text"]}
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--user_strength", "2.1"])
    assert "must be a number from -1 to 2, got '2.1'" in capsys.readouterr().err

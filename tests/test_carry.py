"""Users are listed, renamed, copied, exported and imported; rows go only where they mean the same."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import KINDS, LLAMA_SIZES, LORA_TARGETS, make_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, attach_user_model, detach_user_model
from trl_personal.cli import main
from trl_personal.cli.users import USERS_COMMANDS
from trl_personal.cli.users_arguments import USERS_PARSERS
from trl_personal.models.carry import METADATA, SharedParts, read_rows
from trl_personal.models.folder_users import load_known_users, write_known_users
from trl_personal.models.known_users import KnownUsers, joined_users, known_users, mark_joined
from trl_personal.user_models import get_user_model_class


IDS = torch.tensor([[3, 5, 6]])


def make_user_model(kind, num_users=3, token_dim=32, num_virtual_tokens=2):
    cls = get_user_model_class(kind)
    torch.manual_seed(11)
    user_model = cls(cls.config_class(num_users=num_users, num_virtual_tokens=num_virtual_tokens, token_dim=token_dim))
    for name, parameter in user_model.named_parameters():
        parameter.data.normal_()
        if name == "user_offsets.weight":
            parameter.data[0] = 0
    return user_model


def save_model(folder, base, kind="individual", lora=False, users=("ann", "bo", "cy"), **sizes):
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS))
    attach_user_model(model, make_user_model(kind, len(users), **sizes), UserVocab(users))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(model_dirs, tmp_path):
    return save_model(tmp_path / "out", model_dirs["gptj"])


def load(folder, **kwargs):
    return AutoPersonalizedModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model, user_id):
    with torch.no_grad():
        return model(input_ids=IDS, user_indices=torch.tensor(model.user_vocab.encode([user_id]))).logits


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


# --- In memory and on disk ------------------------------------------------------------------------------------------------


FAST = [
    ("individual", "gptj", True),
    ("cluster", "llama", False),
    ("low_rank", "llama", True),
    ("point", "gptj", False),
]
MATRIX = [
    pytest.param(kind, family, lora, marks=[] if (kind, family, lora) in FAST else [pytest.mark.slow])
    for kind in KINDS
    for family in ("gptj", "llama")
    for lora in (False, True)
]


@pytest.mark.parametrize(("kind", "family", "lora"), MATRIX)
def test_who_is_carried_away_and_back_is_the_same_to_the_last_bit(model_dirs, tmp_path, kind, family, lora):
    folder = save_model(tmp_path / "out", model_dirs[family], kind, lora)
    model, before = load(folder), hashes(folder)
    expected = {user_id: logits(model, user_id) for user_id in ("ann", "bo", "cy", None)}
    model.export_users(["ann"], tmp_path / "memory.safetensors")
    assert main(["users", "export", str(folder), "ann", "-o", str(tmp_path / "disk.safetensors")]) == 0
    assert hashes(folder) == before
    assert (tmp_path / "memory.safetensors").read_bytes() == (tmp_path / "disk.safetensors").read_bytes()

    model.remove_users(["ann"])
    assert "ann" not in model.user_vocab
    assert torch.equal(logits(model, "ann"), expected[None])  # unknown
    assert model.import_users(tmp_path / "disk.safetensors") == ["ann"]
    assert list(model.user_vocab) == ["bo", "cy", "ann"]
    model.save_pretrained(tmp_path / "again")
    for other in (model, load(tmp_path / "again")):
        assert all(torch.equal(logits(other, user_id), found) for user_id, found in expected.items())
        assert (
            known_users(other).origin("ann") == "trained"
        )  # was part of the training, wherever the row has been since
    again = hashes(tmp_path / "again")
    assert all(
        again[name] == value for name, value in before.items() if "user_model/" not in name and "README" not in name
    )


def test_a_copy_and_a_rename_keep_rows_and_say_where_they_come_from(saved):
    model = load(saved)
    expected = logits(model, "bo")
    model.copy_users({"bo": "twin", "twin": "triplet"})
    model.rename_users({"bo": "ann", "ann": "bo"})
    assert list(model.user_vocab) == ["bo", "ann", "cy", "twin", "triplet"]
    assert all(torch.equal(logits(model, user_id), expected) for user_id in ("ann", "twin", "triplet"))
    assert joined_users(model) == {"twin": {"copied_from": "ann"}, "triplet": {"copied_from": "ann"}}
    with pytest.raises(ValueError, match=r"\['twin', 'triplet'\] have copies of the rows that are to be removed"):
        model.remove_users(["ann"])
    model.remove_users(["ann", "twin", "triplet"])
    assert list(model.user_vocab) == ["bo", "cy"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda users: users.removed([]), ValueError, "`user_ids` is empty"),
        (lambda users: users.removed("ann"), TypeError, "must be a list of user ids, found str"),
        (lambda users: users.removed(["ann", "eve"]), ValueError, r"does not know \['eve'\]; it has 3 users"),
        (lambda users: users.removed(["ann", "ann"]), ValueError, "Each user may be named once, got 2 ids of 1 users"),
        (lambda users: users.removed([None]), ValueError, r"does not know \[None\]"),
        (lambda users: users.renamed({"ann": "bo"}), ValueError, "'bo' occurs twice"),
        (lambda users: users.renamed({"ann": ""}), ValueError, "empty text"),
        (lambda users: users.copied("ann", "bo"), ValueError, r"has \['bo'\] already"),
        (lambda users: users.copied("ann", None), ValueError, "`None` is the generic user"),
        (lambda users: users.added({"eve": {"age": 7}}), ValueError, "may have .*num_pairs.* got {'age': 7}"),
        (lambda users: users.added({"eve": {"num_pairs": True}}), ValueError, "got {'num_pairs': True}"),
    ],
)
def test_changes_that_cannot_be_are_refused(change, error, message):
    users = KnownUsers(make_user_model("individual"), UserVocab(["ann", "bo", "cy"]))
    with pytest.raises(error, match=message):
        change(users)


def test_users_who_joined_are_marked_as_long_as_they_are_there(saved, tmp_path):
    before = hashes(saved)
    model = load(saved)
    assert joined_users(model) == {}
    model.copy_users({"ann": "eve"})
    mark_joined(model, {"bo": {"num_pairs": 12}})
    model.save_pretrained(saved)
    path = saved / "user_model" / "joined_users.json"
    assert json.loads(path.read_text()) == {"eve": {"copied_from": "ann"}, "bo": {"num_pairs": 12}}
    model = load(saved)
    assert [known_users(model).origin(user_id) for user_id in model.user_vocab] == [
        "trained",
        "joined",
        "trained",
        "copied",
    ]
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(ValueError, match="joined_users.json is not the file that was saved"):
        load(saved)
    path.write_text(path.read_text().replace("13", "12"))
    model.remove_users(["eve"])
    model.save_pretrained(saved)
    assert json.loads(path.read_text()) == {"bo": {"num_pairs": 12}}
    detach_user_model(model)
    assert not hasattr(model, "joined_users")
    attach_user_model(model, make_user_model("individual"), UserVocab(["ann", "bo", "cy"]))
    model.save_pretrained(saved)
    assert not path.exists()
    assert hashes(saved) == before


def test_users_written_into_a_folder_and_taken_out_again_leave_it_as_it_was(saved):
    before = hashes(saved)
    users, config = load_known_users(saved)
    rows = {name: torch.full((2, table.shape[1]), 0.5) for name, table in users.user_model.get_rows([1, 2]).items()}
    write_known_users(saved, users.added({"eve": {"num_pairs": 3}, "fay": {}}, rows), config)
    users, config = load_known_users(saved)
    assert users.joined == {"eve": {"num_pairs": 3}, "fay": {}}
    assert users.user_model.get_rows([4, 5])["user_offsets"].eq(0.5).all()
    assert {name for name, value in hashes(saved).items() if before.get(name) != value} == {
        f"user_model/{name}"
        for name in ("users.json", "joined_users.json", "user_model.safetensors", "user_model_config.json")
    }
    write_known_users(saved, users.removed(["fay", "eve"]), config)
    assert hashes(saved) == before


# --- What does not fit ----------------------------------------------------------------------------------------------------


def other_lm(folder):
    model = make_model("gptj", seed=1)
    attach_user_model(model, make_user_model("individual"), UserVocab(["bo", "cy", "di"]))
    model.save_pretrained(folder)


def other_shared_weights(folder):
    model = load(folder)
    model.user_model.generic_prompt.data[0, 0] += 1e-6
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder, base: save_model(folder, base, "cluster"), "the kind ('individual', here 'cluster')"),
        (
            lambda folder, base: save_model(folder, base, num_virtual_tokens=3),
            "What differs: `num_virtual_tokens` (2, here 3).",
        ),
        (lambda folder, base: other_shared_weights(folder), "What differs: the user model's shared weights."),
        (lambda folder, base: other_lm(folder), "What differs: model.safetensors of the language model."),
        (lambda folder, base: save_model(folder, base, lora=True), "adapter_model.safetensors of the language model"),
    ],
)
def test_rows_are_refused_beside_other_shared_parts(saved, model_dirs, tmp_path, capsys, change, differs):
    assert main(["users", "export", str(saved), "ann", "-o", str(tmp_path / "ann.safetensors")]) == 0
    shutil.copytree(saved, tmp_path / "other")
    change(tmp_path / "other", model_dirs["gptj"])
    before = hashes(tmp_path / "other")
    assert main(["users", "import", str(tmp_path / "other"), str(tmp_path / "ann.safetensors"), "--as", "eve"]) == 1
    assert differs in capsys.readouterr().err
    assert hashes(tmp_path / "other") == before


def test_files_of_a_base_model_count_where_both_know_them():
    parts = SharedParts("individual", {}, "f", {"adapter_model.safetensors": "1"}, {"model.safetensors": "2"}, 1)
    assert parts.differences(parts) == []
    assert parts.differences(replace(parts, base_model_files={})) == []
    other = replace(parts, base_model_files={"model.safetensors": "3"}, bos_token_id=None)
    assert parts.differences(other) == ["model.safetensors of the base model", "`bos_token_id` (1, here None)"]
    assert parts.differences(replace(parts, language_model_files={})) == [
        "adapter_model.safetensors of the language model"
    ]


def test_a_language_model_that_was_trained_since_has_no_fingerprints(saved, tmp_path):
    model = load(saved)
    with torch.no_grad():
        model.transformer.h[0].mlp.fc_in.weight.add_(1e-3)
    with pytest.raises(ValueError, match="trained or cast since. Save it with `model.save_pretrained"):
        model.export_users(["ann"], tmp_path / "ann.safetensors")
    model.save_pretrained(tmp_path / "trained")
    model.export_users(["ann"], tmp_path / "ann.safetensors")
    with pytest.raises(ValueError, match="What differs: model.safetensors of the language model"):
        load(saved).import_users(tmp_path / "ann.safetensors", "eve")
    fresh = make_model()
    attach_user_model(fresh, make_user_model("individual"), UserVocab(["ann", "bo", "cy"]))
    with pytest.raises(ValueError, match="the language model has no files yet"):
        fresh.export_users(["ann"], tmp_path / "fresh.safetensors")


def test_known_users_are_overwritten_only_if_asked(saved, tmp_path, capsys):
    file = str(tmp_path / "two.safetensors")
    model = load(saved)
    expected = logits(model, "ann")
    model.export_users(["ann"], tmp_path / "ann.safetensors")
    model.export_users(["bo", "ann"], file)
    content, rows = read_rows(file)
    assert list(content["users"]) == ["bo", "ann"]
    assert torch.equal(rows["user_offsets"], model.user_model.user_offsets.weight[[2, 1]])
    assert main(["users", "import", str(saved), file]) == 1
    assert "has ['bo', 'ann'] already. Import with `--overwrite` to" in (err := capsys.readouterr().err)
    assert "another id with `--as`" in err
    assert main(["users", "import", str(saved), file, "--as", "eve"]) == 1
    assert "`--as` is for a file with one user" in capsys.readouterr().err
    arguments = ["users", "import", str(saved), str(tmp_path / "ann.safetensors"), "--as", "cy", "--overwrite"]
    assert main(arguments) == 0
    model = load(saved)
    assert list(model.user_vocab) == ["ann", "bo", "cy"]
    assert torch.equal(logits(model, "cy"), expected)
    assert joined_users(model) == {}  # `cy` was part of the training all the same


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut off, or is not safetensors"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "holds no users"),
        (lambda path: edit(path, format_version=9), "has format version 9"),
        (lambda path: edit(path, users={"ann": {"age": 7}}), "is damaged: its metadata lack"),
        (lambda path: edit(path, users={"ann": {}, "bo": {}}), "it names 2 users and has other numbers of rows"),
        (lambda path: edit(path, shared={}), "is damaged: its metadata lack"),
        (lambda path: path.unlink(), "There is no file"),
    ],
)
def test_a_damaged_file_of_users_is_refused(saved, tmp_path, capsys, damage, message):
    path = tmp_path / "ann.safetensors"
    assert main(["users", "export", str(saved), "ann", "-o", str(path)]) == 0
    damage(path)
    before = hashes(saved)
    assert main(["users", "import", str(saved), str(path), "--as", "eve"]) == 1
    assert message in capsys.readouterr().err
    assert hashes(saved) == before


def edit(path, **entries):
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()[METADATA]) | entries
    save_file(load_file(path), path, {METADATA: json.dumps(content)})


def test_users_on_a_4bit_base_come_and_go(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_SIZES | {"hidden_size": 128, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    folder = save_model(tmp_path / "out", str(tmp_path / "base"), lora=True, token_dim=128)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = load(folder, quantization_config=quantization)
    expected = {user_id: logits(model, user_id) for user_id in ("ann", "bo", "cy")}
    model.export_users(["bo"], tmp_path / "bo.safetensors")
    model.remove_users(["bo"])
    assert torch.equal(logits(model, "cy"), expected["cy"])
    model.import_users(tmp_path / "bo.safetensors", "bobby")
    assert torch.equal(logits(model, "bobby"), expected["bo"])
    assert main(["users", "import", str(folder), str(tmp_path / "bo.safetensors"), "--as", "bobby"]) == 0
    assert torch.equal(logits(load(folder, quantization_config=quantization), "bobby"), expected["bo"])


# --- The command line -----------------------------------------------------------------------------------------------------


def test_each_command_has_a_parser_and_a_function():
    assert USERS_COMMANDS.keys() == USERS_PARSERS.keys()


def test_list_says_who_came_when_and_how_far_from_the_generic_user(saved, capsys):
    assert main(["users", "copy", str(saved), "ann", "eve"]) == 0
    capsys.readouterr()
    assert main(["users", "list", str(saved), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    offsets = load_file(saved / "user_model" / "user_model.safetensors")["user_offsets.weight"].double()
    assert [row["user_id"] for row in found] == ["ann", "bo", "cy", "eve"]
    assert [row["origin"] for row in found] == ["trained", "trained", "trained", "copied"]
    assert [row["num_pairs"] for row in found] == [None] * 4
    assert [row["offset_norm"] for row in found] == pytest.approx(
        (offsets[1:] ** 2).sum(dim=1).sqrt().tolist(), abs=1e-5
    )
    assert main(["users", "list", str(saved)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["users"], 2, "the following arguments are required: COMMAND"),
        (["users", "show", "out"], 2, "invalid choice: 'show'"),
        (["users", "export", "out", "ann"], 2, "required: -o/--output"),
        (["users", "remove", "out", "ann", "--checkpoint"], 2, "Did you mean --checkpoints?"),
        (["users", "list", "nowhere"], 1, "trl-personal users list: error: There is no folder nowhere."),
        (["users", "list", "."], 1, "so it is not a personalized model. Name the folder that training wrote."),
        (["users", "rename", "out", "eve", "bo"], 1, "The model does not know ['eve']"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(saved, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(saved.parent)
    try:
        found = main(argv)
    except SystemExit as exit_:
        found = exit_.code
    assert found == code
    assert message in capsys.readouterr().err


def test_help_of_each_command(capsys):
    with pytest.raises(SystemExit):
        main(["users", "--help"])
    text = capsys.readouterr().out
    for name in USERS_PARSERS:
        assert f"\n  {name} " in text
        with pytest.raises(SystemExit):
            main(["users", name, "--help"])
        assert f"usage: trl-personal users {name}" in capsys.readouterr().out

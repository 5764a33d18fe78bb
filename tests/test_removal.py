"""Users leave a folder: no trace of them is left, nothing of others moves, and a certificate says what was done."""

import gzip
import hashlib
import html
import itertools
import json
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path
from urllib.parse import quote

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from conftest import KINDS, LORA_TARGETS, WORDS
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from test_carry import make_user_model
from transformers.optimization import Adafactor

from trl_personal import AutoPersonalizedModelForCausalLM, PersonalizedDPOConfig, PersonalizedDPOTrainer, UserVocab
from trl_personal.cli import main
from trl_personal.files import json_fingerprint
from trl_personal.removal import folder as removal_of_folder
from trl_personal.removal import remove_from_folder, verify_certificate
from trl_personal.removal.files import cleaned
from trl_personal.removal.journal import JOURNAL_FOLDER
from trl_personal.removal.optimizer import optimizer_without_rows
from trl_personal.removal.traces import Traces
from trl_personal.training.optimizer import user_groups
from trl_personal.training.run_folder import only_run_in


BNB_STATE = "__bnb_optimizer_quant_state__"
LEAVER = 'zoé"71c9a0d4e8b3f2615a7d9c0e4b8f'  # 32 characters; JSON escapes two of them
USERS = ["ann", LEAVER, "bo"]
MATRIX = [
    ("individual", "gptj", False),
    ("cluster", "llama", True),
    ("low_rank", "gptj", True),
    ("point", "llama", False),
]


def rows():
    found = []
    for i in range(12):
        prompt = ["please write a story", "write a answer and", "please i like dogs", "the story"][i // 3]
        short, long = " yes", f" {WORDS[5 + i // 3]} the end yes no"
        chosen, rejected = (short, long) if i % 2 else (long, short)
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": USERS[i % 3]})
    return found


def train(model, out, kind, lora, quantization_config=None, **more):
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 2, "max_length": 32}
    settings |= {"num_virtual_tokens": 3, "logging_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "user_model_kind": kind}
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS) if lora else None
    trainer = PersonalizedDPOTrainer(
        model=model,
        args=PersonalizedDPOConfig(output_dir=str(out), **settings | more),
        train_dataset=datasets.Dataset.from_list(rows()),
        peft_config=peft_config,
        quantization_config=quantization_config,
        user_vocab=UserVocab(USERS),
    )
    trainer.train()
    trainer.save_model(str(out))
    trainer.create_model_card()
    return trainer


@pytest.fixture(scope="module")
def runs(model_dirs, tmp_path_factory):
    """Gives a copy of the folder of a real run, which is trained once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def copy_of(kind, family, lora, to):
        name = f"{kind}-{family}-{lora}"
        if name not in made:
            train(model_dirs[family], root / name, kind, lora)
            made[name] = root / name
        shutil.copytree(made[name], to)
        return to

    return copy_of


def hashes(*folders):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def places_of(user_id, *roots):
    """Files that hold an id, opened by other code than the package's."""
    forms = [
        user_id.encode(),
        json.dumps(user_id)[1:-1].encode(),
        json.dumps(user_id, ensure_ascii=False)[1:-1].encode(),
    ]
    forms += [user_id.encode("utf-16-le"), user_id.encode("utf-32-le"), user_id.split('"')[-1].encode()]
    found = []
    for root in map(Path, roots):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            contents = [path.name.encode()]
            if path.is_file():
                contents.append(path.read_bytes())
                if zipfile.is_zipfile(path):
                    with zipfile.ZipFile(path) as archive:
                        contents += [archive.read(name) for name in archive.namelist()]
                if path.suffix == ".gz":
                    contents.append(gzip.decompress(path.read_bytes()))
                if path.suffix == ".parquet":
                    contents.append(repr(pq.read_table(path).to_pydict()).encode())
                    contents.append(repr(pq.read_schema(path).metadata).encode())
                if path.suffix == ".safetensors":
                    with safe_open(path, "pt") as file:
                        contents.append(repr([file.metadata(), *file.keys()]).encode())
            if any(form in content for form in forms for content in contents):
                found.append(str(path))
    return found


def tensors(folder):
    return load_file(Path(folder) / "user_model" / "user_model.safetensors")


def check_row_of_leaver_is_gone(before, after):
    """Row 2 of three is gone from each table, the third moves up, and shared weights are the same."""
    assert before.keys() == after.keys()
    num_tables = 0
    for name, tensor in before.items():
        is_table = after[name].shape != tensor.shape
        num_tables += is_table
        expected = tensor[[0, 1, 3]] if is_table else tensor
        assert torch.equal(after[name], expected), name
    assert num_tables >= 1


def check_leaving(folder):
    before, lm = tensors(folder), {p: h for p, h in hashes(folder).items() if "user_model/" not in p}
    checkpoint = folder / "checkpoint-2"
    in_checkpoint, moments = tensors(checkpoint), torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert places_of(LEAVER, folder)
    removal = remove_from_folder(folder, [LEAVER], checkpoints=True)
    assert not places_of(LEAVER, folder, removal.path)
    check_row_of_leaver_is_gone(before, tensors(folder))
    check_row_of_leaver_is_gone(in_checkpoint, tensors(checkpoint))
    left = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert left["param_groups"] == moments["param_groups"]
    shrunk = 0
    for number, state in moments["state"].items():
        for name, value in state.items():
            found = left["state"][number][name]
            if found.shape != value.shape:
                shrunk += 1
                value = value[[0, 1, 3]]
            assert torch.equal(found, value)
    assert shrunk == 2 * sum(before[name].shape != tensors(folder)[name].shape for name in before)
    changed = {path for path, value in hashes(folder).items() if lm.get(path, value) != value}
    assert {Path(path).name for path in changed} <= {"optimizer.pt"}
    verify_certificate(removal.path, folder, digest=removal.digest, user_id=LEAVER, salt=removal.salt)
    return removal


@pytest.mark.parametrize(("kind", "family", "lora"), MATRIX)
def test_nothing_is_left_of_who_leaves_and_others_stay_to_the_last_bit(runs, tmp_path, kind, family, lora):
    folder = runs(kind, family, lora, tmp_path / "out")
    ids = torch.tensor([[3, 5, 6]])
    model = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = [model(input_ids=ids, user_indices=torch.tensor([row])).logits for row in (0, 1, 3)]
    model.remove_users([LEAVER])
    check_leaving(folder)
    for left in (model, AutoPersonalizedModelForCausalLM.from_pretrained(folder)):
        assert list(left.user_vocab) == ["ann", "bo"]
        with torch.no_grad():
            for row, logits in enumerate(expected):
                assert torch.equal(left(input_ids=ids, user_indices=torch.tensor([row])).logits, logits)


def test_a_run_goes_on_without_who_left(runs, model_dirs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    remove_from_folder(folder, [LEAVER], checkpoints=True)
    trainer = PersonalizedDPOTrainer(
        model=model_dirs["gptj"],
        args=PersonalizedDPOConfig(
            output_dir=str(folder), num_virtual_tokens=3, max_steps=3, max_length=32, report_to="none", use_cpu=True,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list([row for row in rows() if row["user_id"] != LEAVER]),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    (state,) = [s for p, s in trainer.optimizer.state.items() if p is trainer.user_model.user_offsets.weight]
    assert state["exp_avg"].shape == trainer.user_model.user_offsets.weight.shape


@pytest.mark.parametrize(("kind", "family", "lora"), MATRIX)
def test_add_and_remove_leaves_every_file_as_it_was(runs, tmp_path, kind, family, lora):
    folder = runs(kind, family, lora, tmp_path / "out")
    before = hashes(folder)
    assert main(["users", "copy", str(folder), "bo", "a new user of 32 characters éèê"]) == 0
    changed = {path.removeprefix(f"{folder}/") for path, value in hashes(folder).items() if before.get(path) != value}
    files = ("user_model.safetensors", "users.json", "joined_users.json", "user_model_config.json")
    assert changed == {f"user_model/{name}" for name in files}
    assert main(["users", "remove", str(folder), "a new user of 32 characters éèê"]) == 0
    assert hashes(folder) == before


def test_everything_that_may_lie_in_a_folder_is_searched(runs, model_dirs, tmp_path, capsys):
    """An evaluation beside it with answers, exported rows, caches, logs, lists, archives, pictures."""
    folder, evaluation = runs("individual", "gptj", True, tmp_path / "out"), tmp_path / "out-evaluation"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    arguments = ["--dataset_name", str(pairs), "--generate", "2", "--max_new_tokens", "4"]
    assert main(["eval", str(folder), *arguments]) == 0
    assert {"evaluation.json", "users.parquet", "pairs.parquet", "user_map.png"} <= set(os.listdir(evaluation))
    assert not (folder / "evaluation").exists()
    table = datasets.Dataset.from_list(rows())
    table.save_to_disk(str(folder / "cache"))
    table.to_csv(folder / "rows.csv", index=False)
    assert main(["users", "export", str(folder), LEAVER, "-o", str(folder / "leaver.safetensors")]) == 0
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(pairs.read_bytes()))
    (folder / "users.txt").write_text(f"ann\n{LEAVER}\nbo\n")
    (folder / "train.log").write_text(f"loss of {LEAVER}: 0.7\nloss of bo: 0.6\n")
    with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.json", json.dumps({"user_id": USERS, "gain": [1, 2, 3]}))
        archive.writestr("notes.md", f"{LEAVER} is new")
    torch.save({"users": USERS}, folder / "training_args.bin")
    (folder / f"{LEAVER}.txt".replace("/", "")).write_text("")
    removal = remove_from_folder(folder, [LEAVER], checkpoints=True)
    assert not places_of(LEAVER, folder, evaluation, removal.path)
    assert not list(evaluation.glob("*.png"))
    found = json.loads((evaluation / "evaluation.json").read_text())
    assert [user["user_id"] for user in found["users"]] == ["ann", "bo"]
    assert {tuple(sorted(sample["answers"])) for sample in found["samples"]} == {("ann", "bo", "generic user")}
    kept = [row for row in rows() if row["user_id"] != LEAVER]
    assert datasets.Dataset.from_parquet(str(evaluation / "pairs.parquet"))["user_id"] == [r["user_id"] for r in kept]
    assert datasets.load_from_disk(str(folder / "cache")).to_list() == kept
    assert datasets.Dataset.from_csv(str(folder / "rows.csv"), cache_dir=str(tmp_path / "csv")).to_list() == kept
    assert [json.loads(line) for line in gzip.open(folder / "rows.jsonl.gz")] == kept
    assert (folder / "users.txt").read_text() == "ann\nbo\n"
    assert (folder / "train.log").read_text() == "loss of [removed]: 0.7\nloss of bo: 0.6\n"
    with zipfile.ZipFile(folder / "all.zip") as archive:
        assert json.loads(archive.read("rows.json")) == {"user_id": ["ann", "bo"], "gain": [1, 3]}
        assert archive.read("notes.md") == b"[removed] is new"
    assert not (folder / "leaver.safetensors").exists()
    assert not (folder / "training_args.bin").exists()
    actions = {file["path"]: file["action"] for file in removal.certificate["files"]}
    assert actions["evaluation/user_map.png"] == "deleted"
    assert actions["model/[removed].txt"] == "deleted"
    assert actions["model/adapter_model.safetensors"] == "unchanged"
    verify_certificate(removal.path, folder)


@pytest.mark.parametrize(
    "written", [json.dumps, lambda text: json.dumps(text).replace("/", "\\/"), html.escape, quote, repr]
)
def test_an_id_is_found_however_text_writes_it(written):
    user_id = "ann/'é\"<b>&c"
    traces = Traces([user_id], [user_id])
    text = f"x {written(user_id)} y"
    assert traces.in_bytes(text.encode())
    assert traces.without_text(text).replace('"', "").replace("'", "") == "x [removed] y"


def test_a_short_id_is_taken_out_where_users_are_named_and_left_where_it_is_a_word():
    traces = Traces(["7", "ann"], ["7", "ann", "bo"], ["user_id"])
    rewritten = cleaned("a.json", b'[{"user_id": 7, "n": 7}, {"user_id": "bo", "note": "ann"}]\n', traces)
    assert (rewritten.action, rewritten.data) == ("rewritten", b'[{"user_id": "bo", "note": "ann"}]\n')
    assert cleaned("a.json", b'{"size": 7, "kind": "ann"}', traces).action == "unchanged"
    assert cleaned("README.md", b"ann was here 7 times", traces).action == "left"
    assert cleaned("README.md", b"annual 77", traces).action == "unchanged"
    assert cleaned("config.json", b'{"user_id": "ann"}', traces).action == "unchanged"
    rows = cleaned("a.tsv", b"user_id\tn\n7\t1\nbo\t7\n", traces)
    assert rows.data == b"user_id\tn\nbo\t7\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.pkl", b"\x80\x04\x95" + LEAVER.encode() + b"\x00"),
        ("array.npy", b"\x93NUMPY\x00" + LEAVER.encode("utf-32-le")),
        ("rows.zst", LEAVER.encode()),
    ],
)
def test_what_cannot_be_rewritten_is_named_before_anything_changes(runs, tmp_path, name, content):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    (folder / name).write_bytes(content)
    before = hashes(folder)
    with pytest.raises(ValueError, match=f"name a user and cannot be rewritten: .*{name}.*Nothing has been changed"):
        remove_from_folder(folder, [LEAVER], checkpoints=True)
    assert hashes(folder) == before
    assert os.listdir(tmp_path) == ["out"]


def test_checkpoints_are_touched_only_if_asked(runs, tmp_path, capsys):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    before = hashes(folder)
    assert main(["users", "remove", str(folder), LEAVER]) == 1
    assert "2 checkpoints know the users" in (err := capsys.readouterr().err)
    assert "Set `--checkpoints`" in err
    assert main(["users", "remove", str(folder), "nobody"]) == 1
    assert "The model does not know ['nobody']" in capsys.readouterr().err
    assert hashes(folder) == before


@pytest.mark.parametrize(("kind", "stride"), [("low_rank", 8), pytest.param("individual", 1, marks=pytest.mark.slow)])
def test_a_removal_that_is_killed_is_as_before_or_is_finished_by_the_next(runs, tmp_path, monkeypatch, kind, stride):
    whole = runs(kind, "gptj", False, tmp_path / "whole" / "out")
    before = {path.removeprefix(f"{whole}/"): value for path, value in hashes(whole).items()}
    remove_from_folder(whole, [LEAVER], checkpoints=True)
    after = {path.removeprefix(f"{whole}/"): value for path, value in hashes(whole).items()}
    steps, replace, seen = 0, os.replace, set()
    while True:
        folder = runs(kind, "gptj", False, tmp_path / str(steps) / "out")
        calls = itertools.count()

        def killed(*arguments, stop=steps, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            replace(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(removal_of_folder.Journal, "close", lambda self: None)  # a killed process tidies nothing
            patched.setattr(os, "replace", killed)
            try:
                remove_from_folder(folder, [LEAVER], checkpoints=True)
            except KeyboardInterrupt:
                pass
            else:
                break
        left = {path.removeprefix(f"{folder}/"): v for path, v in hashes(folder).items() if JOURNAL_FOLDER not in path}
        is_committed = removal_of_folder.Journal(folder).is_committed
        seen.add(is_committed)
        assert is_committed or left == before
        removal = remove_from_folder(folder, [LEAVER], checkpoints=True)
        assert removal.finished == is_committed
        assert {path.removeprefix(f"{folder}/"): value for path, value in hashes(folder).items()} == after
        verify_certificate(removal.path, folder)
        steps += stride
    assert seen == {False, True}
    assert steps > 10


def test_a_certificate_names_nobody_and_is_caught_if_tampered_with(runs, tmp_path, capsys):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    path = tmp_path / "certificate.json"
    arguments = ["users", "remove", str(folder), "ann", "--checkpoints", "--certificate", str(path)]
    assert main(arguments) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line.count(": ") == 1)
    content = json.loads(path.read_text())
    assert '"ann"' not in path.read_text()
    assert printed["salt"] not in path.read_text()
    (user,) = content["users"]
    assert user["sha256_of_salt_and_id"] == hashlib.sha256(bytes.fromhex(printed["salt"]) + b"ann").hexdigest()
    assert user["origin"] == "trained"
    assert "Only training anew without these pairs does" in user["means"]
    hashed = {file["path"]: file["sha256_after"] for file in content["files"] if file["sha256_after"]}
    assert {path.replace(str(folder), "model", 1): value for path, value in hashes(folder).items()} == hashed
    verify = ["users", "verify", str(folder), str(path), "--digest", printed["digest"]]
    assert main([*verify, "--user_id", "ann", "--salt", printed["salt"]]) == 0
    assert main([*verify, "--user_id", "bo", "--salt", printed["salt"]]) == 1
    assert "is not about this user" in capsys.readouterr().err

    content["users"][0]["origin"] = "joined"
    path.write_text(json.dumps(content))
    assert main(verify[:-2]) == 1
    assert "was changed after it was written" in capsys.readouterr().err
    content["digest"] = json_fingerprint({name: value for name, value in content.items() if name != "digest"})
    path.write_text(json.dumps(content))
    assert main(verify[:-2]) == 0  # written anew: only the digest that was printed tells
    assert main(verify) == 1
    assert "is not the certificate that was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "new.txt").write_text(""), "model/new.txt is new"),
        (lambda folder: (folder / "config.json").unlink(), "model/config.json is missing"),
        (lambda folder: (folder / "README.md").write_text("x"), "model/README.md is another"),
    ],
)
def test_a_folder_that_was_changed_after_a_removal_is_caught(runs, tmp_path, change, message):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    removal = remove_from_folder(folder, [LEAVER], checkpoints=True)
    change(folder)
    with pytest.raises(ValueError, match=message):
        verify_certificate(removal.path, folder)


def test_who_joined_later_is_told_from_who_was_trained(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    assert main(["users", "copy", str(folder), "bo", "copy"]) == 0
    removal = remove_from_folder(folder, ["copy", "bo"], checkpoints=True)
    assert [user["origin"] for user in removal.certificate["users"]] == ["copied", "trained"]
    assert removal.certificate["num_users_before"] == 4
    assert removal.certificate["num_users_after"] == 2


def test_an_id_that_is_a_part_of_other_names_does_no_harm(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    for name in ("2", "model", "user_model"):  # as in checkpoint-2, model.safetensors, user_model/
        before = hashes(folder)
        assert main(["users", "copy", str(folder), "bo", name]) == 0
        removal = remove_from_folder(folder, [name])
        assert hashes(folder) == before
        verify_certificate(removal.path, folder)


def test_what_a_killed_save_has_left_goes_too(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    staging = folder / "checkpoint-1" / ".saving-abc"
    shutil.copytree(folder / "user_model", staging / "user_model")
    (staging / ".writing").write_text("")
    os.utime(staging, (0, 0))
    shutil.copy(folder / "user_model" / "user_model.safetensors", folder / ".user_model.safetensors.4711.tmp")
    remove_from_folder(folder, [LEAVER], checkpoints=True)
    assert not staging.exists()
    assert not (folder / ".user_model.safetensors.4711.tmp").exists()


def test_all_users_may_leave(runs, tmp_path):
    folder = runs("cluster", "llama", True, tmp_path / "out")
    remove_from_folder(folder, USERS, checkpoints=True)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    assert len(model.user_vocab) == 0
    assert model(input_ids=torch.tensor([[3, 5]]), user_indices=torch.tensor([0])).logits.isfinite().all()


def test_a_run_in_the_folder_keeps_its_users(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    with only_run_in(folder):
        with pytest.raises(RuntimeError, match="Another run is training"):
            remove_from_folder(folder, [LEAVER])
        assert main(["users", "rename", str(folder), "ann", "eve"]) == 1
    assert main(["users", "rename", str(folder), "ann", "eve"]) == 0


# --- Parts of it ----------------------------------------------------------------------------------------------------------


def optimizer_state(path, user_model, make_optimizer, by_unit):
    """A state as a run leaves it: a layer of the language model first, then the users."""
    layer = torch.nn.Linear(4, 4)
    groups = [{"params": list(layer.parameters())}, *user_groups(user_model, None if by_unit else 0.1, 0.3)]
    optimizer = make_optimizer(groups)
    torch.manual_seed(0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    return optimizer


@pytest.mark.parametrize("by_unit", [False, True], ids=["one rate", "rates by unit"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_a_user_are_found_whatever_the_order_of_parameters(tmp_path, kind, by_unit):
    user_model = make_user_model(kind, num_users=4)
    path = tmp_path / "optimizer.pt"
    optimizer = optimizer_state(path, user_model, lambda groups: torch.optim.Adam(groups, lr=0.1), by_unit)
    before = optimizer.state_dict()["state"]
    after = optimizer_without_rows(path, user_model, [2, 4])["state"]
    numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    tables = {numbers[id(table.weight)] for table in user_model.row_tables().values()}
    for number, state in before.items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected = state[name][[0, 1, 3]] if number in tables else state[name]
            assert torch.equal(after[number][name], expected)


def test_factored_moments_lose_the_row_and_keep_the_columns(tmp_path):
    user_model, path = make_user_model("individual", num_users=4), tmp_path / "optimizer.pt"
    make = partial(Adafactor, lr=0.1, relative_step=False, scale_parameter=False)
    before = optimizer_state(path, user_model, make, False).state_dict()["state"][3]
    after = optimizer_without_rows(path, user_model, [3])["state"][3]
    assert torch.equal(after["exp_avg_sq_row"], before["exp_avg_sq_row"][[0, 1, 2, 4]])
    assert torch.equal(after["exp_avg_sq_col"], before["exp_avg_sq_col"])


def test_moments_of_another_user_model_are_refused(tmp_path):
    path = tmp_path / "optimizer.pt"
    optimizer_state(path, make_user_model("individual", num_users=3), partial(torch.optim.Adam, lr=0.1), False)
    with pytest.raises(ValueError, match="its states are not those of this user model. Delete the checkpoint"):
        optimizer_without_rows(path, make_user_model("individual", num_users=4), [1])


def test_without_moments_there_is_nothing_to_take_out(tmp_path):
    user_model, path = make_user_model("cluster", num_users=4), tmp_path / "optimizer.pt"
    optimizer = optimizer_state(path, user_model, partial(torch.optim.SGD, lr=0.1), True)
    assert optimizer_without_rows(path, user_model, [1]) == optimizer.state_dict()


def test_links_into_the_users_are_refused_and_others_are_told(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    (tmp_path / "elsewhere.txt").write_text(LEAVER)
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (folder / ".git").mkdir()
    (folder / "old.zst").write_bytes(b"?")
    users = folder / "user_model" / "users.json"
    users.rename(tmp_path / "users.json")
    users.symlink_to(tmp_path / "users.json")
    with pytest.raises(ValueError, match="users.json .a link: what it points to would stay"):
        remove_from_folder(folder, [LEAVER], checkpoints=True)
    users.unlink()
    (tmp_path / "users.json").rename(users)
    left = remove_from_folder(folder, [LEAVER], checkpoints=True).certificate["left"]
    assert "1 links were not followed." in left
    assert "1 version histories (`.git`) keep earlier files, which were not searched." in left
    assert "1 files could not be opened, and were searched by their bytes only." in left


def test_two_certificates_of_one_second_are_two_files(runs, tmp_path):
    folder = runs("individual", "gptj", False, tmp_path / "out")
    paths = {remove_from_folder(folder, [user_id], checkpoints=True).path for user_id in ("ann", "bo")}
    assert len(paths) == 2
    assert all(path.is_file() and path.parent == tmp_path for path in paths)


@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_moments_in_8_bits_keep_the_rows_of_users_in_32(model_dirs, tmp_path, kind):
    """bitsandbytes keeps the states of an `nn.Embedding` by rows, and others in blocks."""
    train(model_dirs["llama"], tmp_path / "out", kind, False, optim="adamw_bnb_8bit")
    path = tmp_path / "out" / "checkpoint-2" / "optimizer.pt"
    before = max(torch.load(path, weights_only=True)["state"].items())[1][BNB_STATE]  # the users' rows come last
    assert len(before["state1"]) == len(before["state2"]) == len(USERS) + 1
    remove_from_folder(tmp_path / "out", [LEAVER], checkpoints=True)
    after = max(torch.load(path, weights_only=True)["state"].items())[1][BNB_STATE]
    for name in ("state1", "state2"):
        assert before[name][2].any()
        assert torch.equal(after[name], before[name][[0, 1, 3]])

"""Damaged folders, from a seeded generator: each is refused by the name of a file, or gives what was saved."""

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_soft_prompt import NUM_VIRTUAL_TOKENS

from trl_personal import AutoPersonalizedModelForCausalLM, IndividualUserModel, UserModelConfig, UserVocab
from trl_personal.files import fingerprint, json_fingerprint
from trl_personal.models.attach import attach_user_model, detach_user_model
from trl_personal.models.folder_checks import language_model_files


SECONDS, GIGABYTE = 60, 1 << 30
IDS = torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8], [1, 2, 3, 4]])
USERS = torch.tensor([1, 2, 0])
USER_FILES = [f"user_model/{name}" for name in ("users.json", "user_model.safetensors", "user_model_config.json")]
FILES = {
    "full": ["config.json", "generation_config.json", "model.safetensors", *USER_FILES],
    "lora": ["adapter_config.json", "adapter_model.safetensors", *USER_FILES],
}
WRONG = [None, "x", "", [], [1], {}, {"a": {"b": []}}, True, -1, 0, 1.5, 10**12, 10**30, float("nan"), float("inf")]
CONFIG = "user_model/user_model_config.json"


class Command:
    """A pickle that makes a folder when it is read."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


# --- Damages: functions of a folder and a random generator -----------------------------------------------------------


def cut(name):
    def damage(folder, draw):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: draw.randrange(len(content) - 2)])

    return damage


def flip(name, header=False):
    def damage(folder, draw):
        content = bytearray((folder / name).read_bytes())
        position = draw.randrange(min(len(content), 300) if header else len(content))
        content[position] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)

    return damage


def remove(name):
    return lambda folder, draw: (folder / name).unlink()


def become_a_folder(name):
    def damage(folder, draw):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def link(name, target):
    def damage(folder, draw):
        (folder / name).rename(folder / "moved")
        (folder / name).symlink_to({"loop": folder / name, "gone": folder / "none", "same": folder / "moved"}[target])

    return damage


def swap(*names):
    """Files of another save: of the same language model with other users, or of another one."""

    def damage(folder, draw):
        for name in names:
            shutil.copy(folder.parent / "other" / name, folder / name)

    return damage


def edit(name, key, value, sign=False):
    def damage(folder, draw):
        values = json.loads((folder / name).read_text())
        values[key] = value
        (folder / name).write_text(json.dumps(values))
        if sign:
            sign_anew(folder)

    return damage


def drop(name, key):
    def damage(folder, draw):
        values = json.loads((folder / name).read_text())
        del values[key]
        (folder / name).write_text(json.dumps(values))

    return damage


def text(name, content):
    return lambda folder, draw: (folder / name).write_text(content)


def write_rows(change):
    """Other rows with fingerprints that are right, as a training that diverged saves them."""

    def damage(folder, draw):
        path = folder / "user_model/user_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        sign_anew(folder)

    return damage


def sign_anew(folder):
    """Fingerprints of what is there now, so that the checks behind them are reached."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    signed = config.pop("user_model_files")
    if not isinstance(config["language_model_files"], dict):
        return
    config["language_model_files"] = language_model_files(folder)
    beside = {name: fingerprint(path.parent / name) for name in signed if name != path.name}
    path.write_text(json.dumps(config | {"user_model_files": beside | {path.name: json_fingerprint(config)}}))


def old_format(damage):
    """The damage in a folder of format 1, which has no fingerprints of the user model."""

    def both(folder, draw):
        as_format_1(folder)
        damage(folder, draw)

    return both


def as_format_1(folder):
    config = json.loads((folder / CONFIG).read_text())
    listed = {name: value for name, value in config["language_model_files"].items() if "config" not in name}
    config = {key: value for key, value in config.items() if key not in ("user_model_files", "base_model_files")}
    (folder / CONFIG).write_text(json.dumps(config | {"format_version": 1, "language_model_files": listed}))


def pickle_beside(name, removed=()):
    def damage(folder, draw):
        for file in removed:
            (folder / file).unlink()
        torch.save({"a": Command(folder.parent / "ran")}, folder / name)

    return damage


def spoil(name, index, value):
    def change(weights):
        weights[name].view(-1)[index] = value

    return change


def other_weights(name):
    def damage(folder, draw):
        weights = load_file(folder / name)
        for tensor in weights.values():
            tensor.add_(0.1)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return damage


def nothing(folder, draw):
    pass


def generate_damages():
    """Yields what is damaged (`"full"` or `"lora"`), a name, the damage, and the outcome: refused, equal, or either."""
    draw = random.Random(0)
    for what, files in FILES.items():
        for name in files:
            optional = name == "generation_config.json"
            yield what, f"cut {name}", cut(name), "refused"
            yield what, f"removed {name}", remove(name), "equal" if optional else "refused"
            yield what, f"folder {name}", become_a_folder(name), "either" if optional else "refused"
            target = draw.choice(["loop", "gone"])
            yield what, f"link to {target} {name}", link(name, target), "either" if optional else "refused"
            yield what, f"link to itself moved {name}", link(name, "same"), "equal"
            if not optional:
                yield what, f"flipped {name}", flip(name), "either" if "config" in name else "refused"
                yield what, f"flipped at the start {name}", flip(name, header=True), "refused"
        for names in (USER_FILES[:1], USER_FILES[1:2], USER_FILES[2:], USER_FILES[:2], USER_FILES[1:]):
            yield what, f"swapped {' '.join(names)}", swap(*names), "refused"
        for key in ("format_version", "kind", "num_users", "num_virtual_tokens", "token_dim", "bos_token_id"):
            for value in draw.sample(WRONG, 3):
                yield what, f"{key} {value!r}", edit(CONFIG, key, value), "refused"
            value = draw.choice([-1, "x", [], {}, True, 1.5])
            yield what, f"signed {key} {value!r}", edit(CONFIG, key, value, sign=True), "refused"
        for key in ("user_model_files", "language_model_files"):
            yield what, f"without {key}", drop(CONFIG, key), "refused"
            for value in ([], {}, "x", {"../a": "b"}, {"users.json": 1}):
                yield what, f"{key} {value!r}", edit(CONFIG, key, value), "refused"
        for key in ("num_users", "num_virtual_tokens", "token_dim"):
            for value in (10**8, 10**30):
                yield what, f"huge {key} {value}", edit(CONFIG, key, value, sign=True), "refused"
                yield what, f"huge {key} {value} 1", old_format(edit(CONFIG, key, value)), "refused"
        for template in ("{}", "{profile} {x}", "{", 7, ["{profile}"]):
            damage = edit(CONFIG, "user_profile_template", template, sign=True)
            yield what, f"template {template!r}", damage, "refused"
        for number in (float("nan"), float("inf"), -float("inf")):
            damage = write_rows(spoil(draw.choice(["generic_prompt", "user_offsets.weight"]), 40, number))
            yield what, f"rows {number}", damage, "refused"
        yield what, "generic row", write_rows(spoil("user_offsets.weight", 5, 0.5)), "refused"
        yield what, "generic row 1", old_format(write_rows_unsigned(spoil("user_offsets.weight", 5, 0.5))), "refused"
        yield what, "rows nan 1", old_format(write_rows_unsigned(spoil("generic_prompt", 3, float("nan")))), "refused"
        for content in (
            *(
                '{"ann": 1, "ann": 2}',
                '{"ann": 1, "bo": 1}',
                '{"": 1, "bo": 2}',
                '["ann", "bo"]',
                '{"ann": 1, "bo": null}',
            ),
            *(
                '{"ann": 1.0, "bo": 2}',
                '{"ann": true, "bo": 2}',
                '{"ann": 1}',
                '{"ann": 1, "bo": NaN}',
                "{" * 9999,
                "null",
            ),
        ):
            yield what, f"users {content[:20]}", old_format(text("user_model/users.json", content)), "refused"
        yield what, "format 1", old_format(nothing), "equal"
        yield what, "users moved 1", old_format(edit(CONFIG, "language_model_files", None)), "refused"
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "user_model/user_model.bin"):
            yield what, f"pickle {name}", pickle_beside(name), "equal"
        yield (
            what,
            "user_model is a file",
            lambda folder, draw: (
                shutil.rmtree(folder / "user_model"),
                (folder / "user_model").write_text(""),
            ),
            "refused",
        )
    yield from damages_of_a_full_model(draw)
    yield from damages_of_an_adapter(draw)


def write_rows_unsigned(change):
    def damage(folder, draw):
        path = folder / "user_model/user_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return damage


def damages_of_a_full_model(draw):
    yield "full", "weights of another", swap("model.safetensors"), "refused"
    yield "full", "pickle only", pickle_beside("pytorch_model.bin", ["model.safetensors"]), "refused"
    unsigned = ("architectures", "hidden_size", "num_hidden_layers", "rms_norm_eps", "vocab_size", "rope_parameters")
    for key in unsigned:
        for value in draw.sample(WRONG, 3):
            yield "full", f"config.json {key} {value!r}", edit("config.json", key, value), "refused"
    for key in ("bos_token_id", "eos_token_id", "use_cache", "transformers_version"):
        for value in draw.sample(WRONG, 3):
            yield "full", f"config.json {key} {value!r}", edit("config.json", key, value), "either"
    others = ("pipeline", "Trainer", "AutoModel", "GPT2LMHeadModel", "LlamaForSequenceClassification", "LlamaModel")
    for architectures in (*([name] for name in others), "LlamaForCausalLM", [1], [["x"]], {"a": 1}):
        damage = edit("config.json", "architectures", architectures, sign=True)
        yield "full", f"signed {architectures}", damage, "refused"
        yield (
            "full",
            f"format 1 {architectures}",
            old_format(edit("config.json", "architectures", architectures)),
            "refused",
        )
    for key, values in {
        "num_hidden_layers": (1, 3, 10**9, "2", None),
        "hidden_size": (64, 10**7, -32, [32]),
        "vocab_size": (18, 10**10, None),
        "intermediate_size": (128, "64"),
        "num_attention_heads": (3, 0, 10**9),
        "hidden_act": ("mystery", None, 7),
        "model_type": ("gpt2", "mystery", None, 7),
        "tie_word_embeddings": ("yes",),
        "dtype": ("mystery", 7),
    }.items():
        for value in values:
            yield "full", f"signed {key} {value!r}", edit("config.json", key, value, sign=True), "refused"


def damages_of_an_adapter(draw):
    yield "lora", "weights of another", other_weights("adapter_model.safetensors"), "refused"
    yield "lora", "base of another", other_weights("../base/model.safetensors"), "refused"
    yield "lora", "pickle only", pickle_beside("adapter_model.bin", ["adapter_model.safetensors"]), "refused"
    for key in ("r", "lora_alpha", "target_modules", "peft_type", "task_type", "modules_to_save", "bias", "use_dora"):
        for value in draw.sample(["x", [1], {"a": {}}, -1, 1.5, 10**12, float("nan")], 2):
            yield "lora", f"adapter_config.json {key} {value!r}", edit("adapter_config.json", key, value), "refused"
    for key in ("peft_type", "task_type", "target_modules", "r"):
        value = draw.choice(["mystery", 7, [], {}])
        yield "lora", f"signed {key} {value!r}", edit("adapter_config.json", key, value, sign=True), "refused"
    for value in (None, "", 7, [], "/nowhere/at/all", "no-body/no-model"):
        yield "lora", f"base {value!r}", edit("adapter_config.json", "base_model_name_or_path", value), "refused"
    for value in (7, [], {"a": 1}):
        yield "lora", f"revision {value!r}", edit("adapter_config.json", "revision", value), "refused"


DAMAGES = list(generate_damages())
QUICK = set(random.Random(1).sample(range(len(DAMAGES)), 150))  # the others are marked slow


# --- The test -----------------------------------------------------------------------------------------------------------


def with_users(model, users, seed):
    torch.manual_seed(seed)
    user_model = IndividualUserModel(UserModelConfig(len(users), NUM_VIRTUAL_TOKENS, 32))
    user_model.user_offsets.weight.data[1:].normal_()
    user_model.generic_prompt.data.normal_()
    attach_user_model(model, user_model, UserVocab(users))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For a full model and an adapter: a folder to damage, one of the same language model with others, and the logits."""
    root, logits = tmp_path_factory.mktemp("saved"), {}
    for what in FILES:
        make_model("llama").save_pretrained(root / what / "base")
        for name, users in (("folder", ["ann", "bo"]), ("other", ["cy", "dee"])):
            model = make_model("llama")
            model.config.name_or_path = "base"
            if what == "lora":
                model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
                model.peft_config["default"].base_model_name_or_path = str(root / what / "base")
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.normal_()
            model.eval()
            with_users(model, users, seed=len(name))
            model.save_pretrained(root / what / name)
            if name == "folder":
                logits[what] = model(IDS, user_indices=USERS).logits.detach()
            elif what == "full":  # the users of another save, and then weights of another model
                detach_user_model(model)
                for parameter in model.parameters():
                    parameter.data.add_(0.1)
                model.save_pretrained(root / what / name)
    return root, logits


@pytest.fixture(scope="module")
def _little_memory():
    """An allocation beyond a gigabyte fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_there_are_150_damages_with_names_of_their_own():
    names = [(what, name) for what, name, _, _ in DAMAGES]
    assert len(names) >= 150
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=f"{what} {name}"[:70], marks=() if number in QUICK else pytest.mark.slow)
        for number, (what, name, _, _) in enumerate(DAMAGES)
    ],
)
def test_a_damaged_folder_is_refused_or_gives_what_was_saved(saved, tmp_path, number):
    what, _, damage, outcome = DAMAGES[number]
    root, logits = saved
    for name in ("folder", "other", "base"):
        shutil.copytree(root / what / name, tmp_path / name)
    folder = tmp_path / "folder"
    if what == "lora":
        edit("adapter_config.json", "base_model_name_or_path", str(tmp_path / "base"))(folder, None)
    damage(folder, random.Random(number))
    start, refusal = time.perf_counter(), None
    try:
        loaded = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        refusal = str(error)
    else:
        assert torch.equal(loaded(IDS, user_indices=USERS).logits, logits[what])
        assert list(loaded.user_vocab) == ["ann", "bo"]
    assert time.perf_counter() - start < SECONDS
    assert not (tmp_path / "ran").exists()
    assert outcome in ("equal" if refusal is None else "refused", "either")
    assert refusal is None or str(folder) in refusal

"""Users join, leave again, and known users leave: every kind of users, LoRA, full and 4-bit, GPT-J and Llama."""

import copy
import itertools

import pytest
import torch
from conftest import CONFIGS, KINDS, make_tokenizer
from test_new_users import hashes, make_pairs, state_of
from test_removal import USERS, check_leaving, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.cli import main
from trl_personal.models.saving import get_base_model
from trl_personal.new_users.folder import write_users


pytestmark = pytest.mark.slow
FORMS = ["full", "lora", "4bit"]
WIDE = {"gptj": {"n_embd": 128, "n_inner": 128}, "llama": {"hidden_size": 128, "intermediate_size": 128}}


def four_bits():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def wide_dirs(tmp_path_factory):
    """Wide enough for the blocks of 64 that bitsandbytes packs on a CPU."""
    folders = {}
    for family, sizes in WIDE.items():
        folders[family] = str(tmp_path_factory.mktemp(family))
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS[family])
        config.update(sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        make_tokenizer(family == "llama", family).save_pretrained(folders[family])
    return folders


@pytest.mark.parametrize(("kind", "family", "form"), list(itertools.product(KINDS, WIDE, FORMS)))
def test_users_come_and_go(kind, family, form, model_dirs, wide_dirs, tmp_path):
    folder, base = tmp_path / "out", (wide_dirs if form == "4bit" else model_dirs)[family]
    quantization = {"quantization_config": four_bits()} if form == "4bit" else {}
    train(base, folder, kind, form != "full", **quantization)
    before = hashes(folder)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(folder, **quantization)
    causal_lm = get_base_model(model)
    weights, known = state_of(causal_lm), causal_lm.user_model.get_rows(range(len(USERS) + 1))
    is_4bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert is_4bit == (form == "4bit")
    pairs = make_pairs(2, 4)
    found = model.add_users(pairs, make_tokenizer(family == "llama", family), base if form == "full" else None)
    assert [(user.user_id, user.num_pairs) for user in found.users] == [("new-0", 4), ("new-1", 4)]
    tables = {f"user_model.{name}.weight" for name in causal_lm.user_model.row_tables()}
    for name, tensor in causal_lm.state_dict().items():
        assert name in tables or torch.equal(tensor, weights[name]), name
    for name, rows in causal_lm.user_model.get_rows(range(len(USERS) + 1)).items():
        assert torch.equal(rows, known[name])
    write_users(model, folder)
    changed = {name for name, value in hashes(folder).items() if before.get(name) != value}
    files = ("users.json", "joined_users.json", "user_model.safetensors", "user_model_config.json")
    assert changed == {f"user_model/{name}" for name in files}
    assert main(["users", "remove", str(folder), "new-0", "new-1"]) == 0
    assert hashes(folder) == before
    check_leaving(folder)

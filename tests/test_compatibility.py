"""
Family x (full, LoRA, 4-bit) x (train, generate, resume). `pytest tests/test_compatibility.py -m slow --write-table` writes the
outcomes into docs/compatibility.md; without the option, the outcome of each must be what its cell there says.
"""

import re

import bitsandbytes as bnb
import pytest
import torch
from conftest import ROOT, make_tokenizer
from families import SIZES, make_family
from peft import LoraConfig
from test_checkpoints import Kill
from transformers import BitsAndBytesConfig

from trl_personal import AutoPersonalizedModelForCausalLM


MODES = ["full", "LoRA", "4-bit"]
STEPS = ["train", "generate", "resume"]
QUANTIZATION = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
DOCUMENT = ROOT / "docs" / "compatibility.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=\n<!-- end of table -->)", re.DOTALL)
NOT_QUANTIZED = {"falcon": "transformers does not quantize its linear layers"}
FAILS_UPSTREAM = {("mamba", "4-bit"): "Mamba multiplies by a quantized weight itself"}
OUTCOMES = {}


@pytest.fixture(params=[(family, mode) for family in sorted(SIZES) for mode in MODES], ids=lambda p: "-".join(p))
def cell(request, make_trainer, tmp_path):
    family, mode = request.param
    make_family(family, wide=mode == "4-bit").save_pretrained(tmp_path / "model")
    make_tokenizer(family=family).save_pretrained(tmp_path / "model")

    def make(**settings):
        kwargs = {"model": str(tmp_path / "model")}
        if mode != "full":
            targets = ["in_proj", "x_proj"] if family == "mamba" else "all-linear"  # PEFT refuses Mamba's out_proj
            kwargs["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
        if mode == "4-bit":
            kwargs["quantization_config"] = QUANTIZATION
        return make_trainer(**settings, trainer_kwargs=kwargs)

    OUTCOMES[family, mode] = dict.fromkeys(STEPS, "no")
    return make, family, mode, OUTCOMES[family, mode]


@pytest.mark.slow
def test_train_generate_resume_as_the_documentation_says(cell, request, tmp_path):
    make, family, mode, outcome = cell
    train_generate_resume(make, family, mode, outcome, tmp_path)
    if not request.config.getoption("--write-table"):
        assert documented()[family][MODES.index(mode)] == text_of(outcome)


def train_generate_resume(make, family, mode, outcome, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    straight = make(**settings)
    if mode == "4-bit":
        is_quantized = any(isinstance(module, bnb.nn.Linear4bit) for module in straight.model.modules())
        assert is_quantized == (family not in NOT_QUANTIZED)
        if not is_quantized:
            outcome["reason"] = NOT_QUANTIZED[family]
            return
    if (family, mode) in FAILS_UPSTREAM:
        with torch.no_grad(), pytest.raises((RuntimeError, AssertionError)):
            straight.model(torch.tensor([[3, 4, 5]]))  # without users, the model as it is upstream
        outcome["reason"] = FAILS_UPSTREAM[family, mode]
        return
    straight.train()
    offsets = straight.user_model.user_offsets.weight
    assert torch.isfinite(offsets).all()
    assert (offsets[1:].abs().sum(1) > 0).all()
    outcome["train"] = "yes"

    straight.save_model(str(tmp_path / "final"))
    quantized = {"quantization_config": QUANTIZATION} if mode == "4-bit" else {}
    model = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final", **quantized)
    model.generation_config.eos_token_id = None
    prompts, users, tokenizer = (
        ["<bos> please write a story the end", "short", "yes no"],
        ["ann", "bo", None],
        make_tokenizer(),
    )
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), user_ids=users, **options)
    for row, (prompt, user) in enumerate(zip(prompts, users, strict=True)):
        alone = model.generate(**tokenizer([prompt], return_tensors="pt"), user_ids=user, **options)
        if mode == "4-bit":  # its kernels for one row and for several round differently
            assert together[row].shape[0] >= alone.shape[1]
        else:
            assert torch.equal(together[row, -5:], alone[0, -5:])
    outcome["generate"] = "yes"

    killed = make(**settings, output_dir=str(tmp_path / "killed"))
    killed.add_callback(Kill(1))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(**settings, output_dir=str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)
    tolerance = (
        {"rtol": 5e-2, "atol": 2e-2} if mode == "4-bit" else {"rtol": 0, "atol": 0}
    )  # PEFT reads float32 adapters
    for (name, one), (_, other) in zip(
        resumed.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        if one.requires_grad:
            torch.testing.assert_close(one.float(), other.float(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    outcome["resume"] = "yes"


def text_of(outcome):
    missing = [step for step in STEPS if outcome[step] != "yes"]
    return "train, generate, resume" if not missing else "no: " + outcome.get("reason", ", ".join(missing))


def table(outcomes):
    lines = ["| family | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
    for family in sorted(SIZES):
        lines.append(f"| {family} | " + " | ".join(text_of(outcomes[family, mode]) for mode in MODES) + " |")
    return "\n".join(lines)


def documented():
    _, _, *lines = TABLE.search(DOCUMENT.read_text()).group().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {family: cells for family, *cells in rows}


@pytest.fixture(scope="module", autouse=True)
def _write_table(request):
    yield
    if request.config.getoption("--write-table"):  # needs every cell: the whole file
        DOCUMENT.write_text(TABLE.sub(lambda _: table(OUTCOMES), DOCUMENT.read_text()))


def test_the_table_has_every_family():
    assert documented().keys() == SIZES.keys()

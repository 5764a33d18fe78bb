"""Every argument that `from_pretrained` takes does what it does for the plain model, or is refused by name."""

import ast
import inspect
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from peft import LoraConfig, get_peft_model
from test_soft_prompt import personalize
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.models.loading import REFUSED_ARGUMENTS


IDS, USERS = torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8]]), torch.tensor([1, 2])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORKS = {  # values for a local folder; others have a test of their own, below
    "allow_all_kernels": False,
    "attn_implementation": "eager",
    "code_revision": "main",
    "device_map": {"": "cpu"},
    "disable_mmap": True,
    "experts_implementation": None,
    "force_download": False,
    "from_flax": None,
    "from_tf": None,
    "fusion_config": None,
    "generation_config": None,
    "ignore_mismatched_sizes": True,
    "kernel_config": None,
    "key_mapping": {"^never$": "matches"},
    "local_files_only": True,
    "low_cpu_mem_usage": True,
    "max_memory": {"cpu": "4GB"},
    "mirror": None,
    "offload_buffers": False,
    "offload_folder": "offload",
    "offload_state_dict": False,
    "token": False,
    "tqdm_class": None,
    "trust_remote_code": False,
    "use_kernels": False,
    "use_safetensors": True,
    "weights_only": True,
}
TESTED_BELOW = {
    *("cache_dir", "config", "dtype", "torch_dtype", "output_loading_info", "quantization_config", "revision"),
    *("subfolder", "variant", "kwargs"),
}


def arguments_of_from_pretrained():
    """The names in the signature, in the docstring, and those that are taken out of `kwargs`."""
    functions = [PreTrainedModel.from_pretrained.__func__, _BaseAutoModelClass.from_pretrained.__func__]
    names = set(re.findall(r"^ {12}(\w+) ?\(`", functions[0].__doc__, re.MULTILINE))
    for function in functions:
        names |= set(inspect.signature(function).parameters)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            is_pop = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pop"
            if is_pop and isinstance(node.args[0], ast.Constant) and ast.unparse(node.func.value) == "kwargs":
                names.add(node.args[0].value)
            if isinstance(node, ast.For) and isinstance(node.iter, ast.List):
                names |= {item.value for item in node.iter.elts if isinstance(item, ast.Constant)}
    return {name for name in names if not name.startswith("_")} - {
        *("cls", "pretrained_model_name_or_path", "model_args", "use_auth_token")
    }


@pytest.fixture
def folders(tmp_path):
    """A full model and an adapter, and what they give."""
    full = personalize(make_model("llama"))
    full.save_pretrained(tmp_path / "full")
    make_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    personalize(lora).eval().save_pretrained(tmp_path / "lora")
    return {name: (tmp_path / name, logits(model)) for name, model in (("full", full), ("lora", lora))}


def logits(model):
    with torch.no_grad():
        return model(IDS, user_indices=USERS).logits


def load(folder, **kwargs):
    return AutoPersonalizedModelForCausalLM.from_pretrained(folder, **kwargs)


def test_each_argument_is_in_the_table_and_in_a_test():
    table = (ROOT / "docs/compatibility.md").read_text().split("## Every argument that `from_pretrained` takes")[1]
    table = table.split("\n## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|", table, re.MULTILINE))
    named = {name: what for cell, what in rows.items() for name in re.findall(r"`(\w+)`", cell)}
    arguments = arguments_of_from_pretrained()
    assert len(arguments) > 40
    assert arguments <= named.keys()
    assert arguments <= WORKS.keys() | TESTED_BELOW | REFUSED_ARGUMENTS.keys()
    assert {name for name, what in named.items() if what.startswith("refused")} == REFUSED_ARGUMENTS.keys()


@pytest.mark.parametrize("what", ["full", "lora"])
@pytest.mark.parametrize("name", sorted(WORKS))
def test_an_argument_is_taken_as_for_the_plain_model(folders, tmp_path, what, name):
    folder, expected = folders[what]
    value = str(tmp_path / "offload") if name == "offload_folder" else WORKS[name]
    torch.testing.assert_close(logits(load(folder, **{name: value})), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_that_does_not_work_is_refused_by_name(folders, name):
    with pytest.raises(ValueError, match=f"`{name}` does not work for a model with users"):
        load(folders["full"][0], **{name: {}})


def test_pickles_are_not_asked_for(folders):
    with pytest.raises(ValueError, match="`use_safetensors=False` does not work for a model with users"):
        load(folders["full"][0], use_safetensors=False)


@pytest.mark.parametrize("what", ["full", "lora"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16], ids=str)
def test_the_language_model_has_the_dtype_and_users_stay_float32(folders, what, name, value):
    model = load(folders[what][0], **{name: value})
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {parameter.dtype for name, parameter in model.named_parameters() if "user_model" in name} == {torch.float32}


@pytest.mark.parametrize("what", ["full", "lora"])
def test_how_it_was_loaded_is_returned_if_asked_for(folders, what):
    folder, expected = folders[what]
    model, info = load(folder, output_loading_info=True)
    assert torch.equal(logits(model), expected)
    assert not info["missing_keys"]
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()


@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_model_in_a_subfolder(folders, tmp_path, what):
    folder, expected = folders[what]
    shutil.copytree(folder, tmp_path / "run/step-100")
    assert torch.equal(logits(load(tmp_path / "run", subfolder="step-100")), expected)
    with pytest.raises(ValueError, match="run has no `user_model/` folder"):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match="step-7 has no `user_model/` folder"):
        load(tmp_path / "run", subfolder="step-7")


@pytest.mark.parametrize("what", ["full", "lora"])
@pytest.mark.parametrize("subfolder", ["", "step-100"])
def test_a_repository_at_a_revision_in_a_cache(folders, tmp_path, what, subfolder):
    folder, expected = folders[what]
    repository = tmp_path / "cache/models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/v2").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT / subfolder)
    model = load("me/mine", revision="v2", cache_dir=tmp_path / "cache", subfolder=subfolder)
    assert torch.equal(logits(model), expected)
    if what == "full":
        assert model.config.name_or_path == "me/mine"
    with pytest.raises(ValueError, match="no repository was found or reached"):
        load("me/mine", revision="v3", cache_dir=tmp_path / "cache", subfolder=subfolder)
    swapped = repository / "snapshots" / COMMIT / subfolder / "user_model/users.json"
    swapped.write_text('{"bo": 1, "ann": 2}')
    with pytest.raises(ValueError, match=r"users\.json is not the file that was saved"):
        load("me/mine", revision="v2", cache_dir=tmp_path / "cache", subfolder=subfolder)


def test_weights_of_a_variant(tmp_path):
    model = personalize(make_model("llama"))
    model.save_pretrained(tmp_path, variant="v1")
    assert (tmp_path / "model.v1.safetensors").is_file()
    assert torch.equal(logits(load(tmp_path, variant="v1")), logits(model))


def test_a_config_of_ones_own_and_settings_of_the_config(folders):
    folder, expected = folders["full"]
    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    model = load(folder, config=config)
    assert model.config.use_cache is False
    assert torch.equal(logits(model), expected)
    assert load(folder, use_cache=False).config.use_cache is False


@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_quantized_language_model(folders, what):
    model = load(folders[what][0], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert model.user_model.generic_prompt.dtype == torch.float32


def test_training_goes_on_from_an_adapter_in_a_subfolder(folders, tmp_path, make_trainer, tokenizer):
    shutil.copytree(folders["lora"][0], tmp_path / "run/step-100")
    arguments = {"model": str(tmp_path / "run"), "processing_class": tokenizer}
    trainer = make_trainer(
        "llama",
        model_init_kwargs={"subfolder": "step-100"},
        trainer_kwargs=arguments,
    )
    assert list(trainer.user_vocab) == ["ann", "bo"]
    trainer.model.eval()
    torch.testing.assert_close(logits(trainer.model), folders["lora"][1])


def test_an_argument_that_nobody_knows_is_refused_as_by_transformers(folders):
    with pytest.raises(TypeError, match="mystery"):
        load(folders["full"][0], mystery=1)
    assert Path(folders["full"][0]).is_dir()

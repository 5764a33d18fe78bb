"""Whatever one does to a model object: its users answer as before, or an error says what to do, or the documentation does."""

import copy
import io
import logging
import pickle
import re

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import remove_hook_from_submodules
from conftest import CONFIGS, LLAMA_SIZES, LORA_TARGETS, ROOT, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_soft_prompt import make_user_model, personalize
from torch.ao.quantization import quantize_dynamic
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_personal import (
    AutoPersonalizedModelForCausalLM,
    LowRankUserModel,
    UserVocab,
    attach_user_model,
    detach_user_model,
)
from trl_personal.models.saving import is_personalized
from trl_personal.user_models.low_rank import LowRankUserModelConfig


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
IDS, USERS, NAMES = (
    torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8], [1, 9, 3, 4]]),
    torch.tensor([1, 2, 0]),
    ["ann", "bo", None],
)
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS, init_lora_weights=False)
BOTH = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def make(lora=False):
    model = make_model("llama")
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return personalize(get_peft_model(model, copy.deepcopy(LORA)).eval() if lora else model)


@torch.no_grad()
def answers(model):
    """Logits of two users and the generic one, those of the plain model, and what the three write."""
    plain = model(IDS, use_cache=False).logits
    text = model.generate(IDS, user_ids=NAMES, max_new_tokens=5, do_sample=False)
    return model(IDS, user_indices=USERS, use_cache=False).logits, plain, text


@pytest.fixture(scope="module")
def expected():
    return {lora: answers(make(lora)) for lora in (False, True)}


def assert_same(model, expected, tolerance=1e-5):
    found = answers(model)
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(found[0][0], found[1][0])


@pytest.fixture(autouse=True)
def _own_config(monkeypatch):
    """Some of what is done changes the config, which the models of all tests share."""
    monkeypatch.setitem(CONFIGS, "llama", copy.deepcopy(CONFIGS["llama"]))


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoPersonalizedModelForCausalLM.from_pretrained(folder)


def from_torch_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_place(change):
    """A change that returns nothing of use."""

    def changed(model):
        change(model)
        return model

    return changed


def loaded_state(assign):
    def loaded(model):
        other = make(isinstance(model, PeftModel))
        for parameter in other.parameters():
            parameter.data = torch.zeros_like(parameter)
        other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=assign)
        return other

    return loaded


def with_copied_embeddings(model):
    embedding = torch.nn.Embedding(19, 32)
    embedding.weight.data.copy_(model.get_input_embeddings().weight)
    (model.get_base_model() if isinstance(model, PeftModel) else model).set_input_embeddings(embedding)
    return model


def prepared(model):
    accelerator = accelerate.Accelerator(cpu=True)
    return accelerator.unwrap_model(accelerator.prepare(model))


SAME = {  # as the table calls it -> how it is done; afterwards all answers are the same
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": from_torch_file,
    "load_state_dict": loaded_state(assign=False),
    "load_state_dict(assign=True)": loaded_state(assign=True),
    "to(device)": lambda model: model.to("cpu"),
    "share_memory": lambda model: model.share_memory(),
    "cpu_offload": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    "cpu_offload_with_hook": lambda model: accelerate.cpu_offload_with_hook(model, "cpu")[0],
    "resize_token_embeddings": in_place(lambda model: model.resize_token_embeddings(19)),
    "set_input_embeddings": with_copied_embeddings,
    "tie_weights": in_place(lambda model: model.tie_weights()),
    "apply": lambda model: model.apply(lambda module: None),
    "train": lambda model: model.train().eval(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "zero_grad": in_place(lambda model: model.zero_grad()),
    "gradient_checkpointing_enable": in_place(lambda model: model.gradient_checkpointing_enable()),
    "enable_input_require_grads": in_place(lambda model: model.enable_input_require_grads()),
    "set_attn_implementation": in_place(lambda model: model.set_attn_implementation("eager")),
    "add_model_tags": in_place(lambda model: model.add_model_tags(["mine"])),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compile": in_place(lambda model: model.compile(backend="eager")),
    "Accelerator.prepare": prepared,
    "unwrap_model": prepared,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    "torch.nn.utils.parametrizations": in_place(
        lambda model: torch.nn.utils.parametrizations.weight_norm(model.get_output_embeddings())
    ),
}
TESTED_BELOW = {
    *("multiprocessing", "type(model)(config)", "type(model).from_pretrained", "AutoModelForCausalLM.from_config"),
    *(
        "half",
        "bfloat16",
        "double",
        "to(dtype)",
        'to("meta")',
        "to_empty",
        "disk_offload",
        "dispatch_model",
        "device_map",
    ),
    *("init_weights", "model.user_model = …", "model.model = …", "torch.export.export", "torch.jit.trace"),
    *("torch.jit.script", "torch.fx.symbolic_trace", "DataParallel", "DistributedDataParallel", "quantize_dynamic"),
    *("load_in_4bit", "load_in_8bit", "save_pretrained", "push_to_hub", "attach_user_model", "detach_user_model"),
    *(
        "merge_and_unload",
        "merge_adapter",
        "unmerge_adapter",
        "unload",
        "add_adapter",
        "set_adapter",
        "delete_adapter",
    ),
    *("disable_adapter", "add_weighted_adapter", "load_adapter", "get_peft_model", "PeftModel.from_pretrained"),
    *(
        "AutoPeftModelForCausalLM",
        "get_peft_model_state_dict",
        "prepare_model_for_kbit_training",
        "inject_adapter_in_model",
    ),
    *("fully_shard",),  # tests/test_attach.py
}


def test_each_row_of_the_table_is_tested():
    page = (
        (ROOT / "docs/compatibility.md")
        .read_text()
        .split("## Whatever one does to a model object")[1]
        .split("\n## ")[0]
    )
    cells = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)[1:]
    assert {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)} == SAME.keys() | TESTED_BELOW


@BOTH
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in SAME]
)
def test_the_answers_are_the_same(expected, name, lora):
    assert_same(SAME[name](make(lora)), expected[lora])


# --- Copies and new objects -------------------------------------------------------------------------------------------


def test_a_shallow_copy_shares_its_users():
    model = make()
    other = copy.copy(model)
    detach_user_model(other)
    with pytest.raises(AttributeError, match="user_model"):
        model.generate(IDS, user_ids=NAMES)


def test_another_process_has_the_users(expected):
    model = make().share_memory()
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(answers(model)[2].tolist()))
    process.start()
    assert queue.get(timeout=60) == expected[False][2].tolist()
    process.join()


@BOTH
def test_a_new_object_of_the_class_is_plain(tmp_path, lora):
    """`type(model)` is the class that the object had, as far as one sees: it makes models without users."""
    model = make(lora)
    causal_lm = model.get_base_model() if lora else model
    new = [type(causal_lm)(causal_lm.config), type(causal_lm)._from_config(causal_lm.config)]
    new.append(AutoModelForCausalLM.from_config(causal_lm.config))
    make_model("llama").save_pretrained(tmp_path / "plain")
    new.append(type(causal_lm).from_pretrained(tmp_path / "plain"))
    if lora:
        new.append(type(model)(make_model("llama"), copy.deepcopy(LORA)))
    for other in new:
        assert not is_personalized(other)
        assert other.generate(IDS, max_new_tokens=1, pad_token_id=0).shape == (3, 5)
        other.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new/user_model").exists()
        personalize(other)
        assert is_personalized(other)


def test_an_object_of_the_class_below_another_is_plain():
    model = make()
    model.__class__ = type("Other", (model.__class__,), {})
    assert not is_personalized(type(model)(model.config))


@pytest.mark.parametrize("sharing", [False, True], ids=["own file", "assigned"])
def test_users_come_from_a_state_in_half_precision_as_float32(sharing):
    model = make()
    state = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=sharing)
    assert {value.dtype for value in model.user_model.state_dict().values()} == {torch.float32}
    half = copy.deepcopy(model.user_model)
    half.keeps_float32 = False  # DeepSpeed casts on purpose
    half.load_state_dict({name: value.half() for name, value in half.state_dict().items()}, assign=True)
    assert {value.dtype for value in half.state_dict().values()} == {torch.float16}


def test_weights_that_are_drawn_anew_leave_the_users_alone(expected):
    model = make()
    model.init_weights()
    model.post_init()
    assert_same(model, expected[False])


# --- Dtypes and devices -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.type(torch.float16),
    ],
    ids=["half", "bfloat16", "double", "to", "type"],
)
def test_a_cast_is_of_the_language_model(expected, cast, lora):
    model = cast(make(lora))
    assert model.get_input_embeddings().weight.dtype != torch.float32
    assert {value.dtype for value in model.user_model.state_dict().values()} == {torch.float32}
    found = answers(model)
    for one, other in zip(found[:2], expected[lora][:2], strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.5, rtol=0)
    assert torch.equal(found[2], expected[lora][2])


def test_nothing_is_left_on_meta_and_an_empty_model_waits_for_its_weights(expected):
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        model(IDS, user_indices=USERS)
    model = make().to_empty(device="cpu")
    model.get_decoder().rotary_emb = make_model("llama").get_decoder().rotary_emb  # in no state, as in any model
    model.load_state_dict(state)
    assert_same(model, expected[False])


PLACES = {
    "model.embed_tokens": "disk",
    "model.layers": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize("users", ["cpu", "disk"])
def test_users_on_disk_answer_and_are_saved(expected, tmp_path, users):
    model = accelerate.dispatch_model(
        make(), PLACES | {"user_model": users}, main_device="cpu", offload_dir=tmp_path / "disk"
    )
    assert_same(model, expected[False])
    assert_same(saved_and_loaded(model, tmp_path / "out"), expected[False])
    remove_hook_from_submodules(model)


@BOTH
@pytest.mark.parametrize("place", ["whole", "embeddings"])
def test_users_of_a_model_that_is_loaded_to_disk(expected, tmp_path, monkeypatch, place, lora):
    monkeypatch.chdir(tmp_path)  # PEFT writes the base's weights anew, below the working directory
    model = make(lora)
    if lora:
        base = model.unload()
        detach_user_model(base)
        base.save_pretrained(tmp_path / "base")
        model = make(lora)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    device_map = {"": "disk"} if place == "whole" else PLACES
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert loaded.get_input_embeddings().weight.is_meta
    assert loaded.user_model.generic_prompt.device.type == "cpu"
    assert_same(loaded, expected[lora])


def test_users_of_a_model_that_is_offloaded_already(expected, tmp_path):
    model = make()
    users = detach_user_model(model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    attach_user_model(model, *users)
    assert_same(model, expected[False])


# --- Parts that are replaced ------------------------------------------------------------------------------------------


def test_more_tokens_change_nothing_for_those_that_were_there(expected, tmp_path):
    model = make()
    model.resize_token_embeddings(24)
    found = answers(saved_and_loaded(model, tmp_path))[0]
    assert found.shape == (3, 4, 24)
    torch.testing.assert_close(found[..., :19], expected[False][0])


def test_embeddings_of_another_width_are_refused_at_the_call():
    model = make()
    model.set_input_embeddings(torch.nn.Embedding(19, 64))
    with pytest.raises(ValueError, match=r"width of the embeddings\) = \(3, 1 or more, 64\), got \(3, 3, 32\)"):
        model(IDS, user_indices=USERS)


def test_another_decoder_is_refused_until_users_are_attached_to_it(expected):
    model = make()
    model.model = make_model("llama").model
    with pytest.raises(RuntimeError, match="If the decoder was replaced .* attach it again"):
        model(IDS, user_indices=USERS)
    attach_user_model(model, *detach_user_model(model))
    assert_same(model, expected[False])


def test_other_users_in_their_place_are_those_that_count(tmp_path):
    model = make()
    model.user_model = LowRankUserModel(LowRankUserModelConfig(2, 3, 32, user_rank=2))
    model.user_model.user_factors.weight.data.normal_()
    model.user_model.shared_basis.data.normal_()
    assert_same(saved_and_loaded(model, tmp_path), answers(model))
    assert not any(name.startswith("user_model") for name in load_file(tmp_path / "model.safetensors"))
    model.user_model = make_user_model().resize(5)
    with pytest.raises(ValueError, match="has rows for 5 users, the vocabulary has 2"):
        model.save_pretrained(tmp_path)


# --- Graphs and wrappers ----------------------------------------------------------------------------------------------


class Named(torch.nn.Module):
    """Tells a tracer the names of the inputs, which `forward` of a language model does not."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, user_indices):
        return self.model(input_ids, user_indices=user_indices, use_cache=False).logits


@BOTH
@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_graph_is_of_any_users_and_texts(lora, how):
    model = make(lora)
    ids, users = IDS.flip(0), torch.tensor([2, 0, 1])
    with torch.no_grad():
        if how == "export":
            graph = torch.export.export(Named(model), (IDS, USERS)).module()
        else:
            graph = torch.jit.trace(Named(model), (IDS, USERS), check_trace=False)
        torch.testing.assert_close(graph(ids, users), model(ids, user_indices=users).logits, atol=1e-5, rtol=1e-5)


def test_graphs_that_transformers_does_not_take_fail_as_for_the_plain_model():
    for model in (make_model("llama"), make()):
        with pytest.raises(OSError, match="Failed to get source"):
            torch.jit.script(model)
        with pytest.raises(ValueError, match="co_varnames is too small"):
            torch.fx.symbolic_trace(model)
    with pytest.raises(NameError, match="'user_indices' is not in forward"):
        torch.jit.trace(make(), example_kwarg_inputs={"input_ids": IDS, "user_indices": USERS})


def replica(module):
    """A copy as `torch.nn.parallel.replicate` makes one, which takes GPUs: of modules and weights, but not of hooks."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None:
            copied._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            object.__setattr__(copied, name, parameter.detach().clone())
    return copied


@BOTH
def test_a_replica_looks_at_its_own_users(expected, lora):
    model = make(lora)
    assert torch.nn.DataParallel(model)(IDS, user_indices=USERS).logits.shape == (3, 4, 19)  # one device
    copied = replica(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        found = copied(IDS, user_indices=USERS, use_cache=False).logits
    torch.testing.assert_close(found, expected[lora][0], atol=1e-5, rtol=1e-5)


def test_a_distributed_model_gives_gradients_to_its_users(expected, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = make()
        logits = torch.nn.parallel.DistributedDataParallel(model)(IDS, user_indices=USERS).logits
        torch.testing.assert_close(logits.detach(), expected[False][0])
        logits.sum().backward()
        assert (model.user_model.user_offsets.weight.grad[1:].abs().sum(1) > 0).all()
    finally:
        dist.destroy_process_group()


def test_attaching_to_a_wrapper_or_detaching_from_one_is_refused_by_name():
    for wrap in (lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel):
        wrapped = wrap(make_model("llama"))
        with pytest.raises(ValueError, match=f"{type(wrapped).__name__} is not a decoder-only transformers model"):
            personalize(wrapped)
        wrapped = wrap(make())
        with pytest.raises(
            ValueError, match=f"{type(wrapped).__name__} has no user model attached. .Give the model itself"
        ):
            detach_user_model(wrapped)


# --- Quantization -----------------------------------------------------------------------------------------------------


def test_linear_layers_in_8_bits_leave_the_users_alone(expected):
    model = quantize_dynamic(make(), {torch.nn.Linear}, dtype=torch.qint8)
    assert {value.dtype for value in model.user_model.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(answers(model)[0], expected[False][0], atol=1.5, rtol=0)
    plain = quantize_dynamic(get_peft_model(make_model("llama"), copy.deepcopy(LORA)))
    for quantized in (plain, quantize_dynamic(make(lora=True))):
        with pytest.raises(AttributeError, match="has no attribute 'dtype'"):
            quantized(IDS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough for the blocks of 64 that bitsandbytes packs."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    sizes = LLAMA_SIZES | {"hidden_size": 128, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def make_quantized(folder, name="load_in_4bit"):
    compute = {"bnb_4bit_compute_dtype": torch.float32} if name == "load_in_4bit" else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**{name: True}, **compute)
    )
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    attach_user_model(model, make_user_model(128), UserVocab(["ann", "bo"]))
    return model


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_model_is_copied_saved_and_not_cast(wide, tmp_path, name):
    expected = answers(make_quantized(wide, name))
    for copied in (copy.deepcopy, SAME["pickle"], lambda model: saved_and_loaded(model, tmp_path)):
        model = copied(make_quantized(wide, name))
        assert {value.dtype for value in model.user_model.state_dict().values()} == {torch.float32}
        assert_same(model, expected)
    for cast in ("half", "float"):
        with pytest.raises(ValueError, match=f"`.{cast}..` is not supported for quantized model"):
            getattr(make_quantized(wide, name), cast)()


def test_4_bit_weights_that_were_repacked_for_the_cpu_are_not_saved(wide, tmp_path):
    model = make_quantized(wide)
    answers(model)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:  # what this CPU does not do is told to it
        layer.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked the 4-bit weights of .* Load the model again, and save it before"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# --- Adapters ---------------------------------------------------------------------------------------------------------


def add(model, name="two", weights=True):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS, init_lora_weights=weights)
    model.add_adapter(name, config)


OF_ADAPTERS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": in_place(lambda model: model.merge_adapter()),
    "unmerge_adapter": in_place(lambda model: (model.merge_adapter(), model.unmerge_adapter())),
    "add_adapter": in_place(add),
    "set_adapter": in_place(lambda model: (add(model), model.set_adapter("two"), model.set_adapter("default"))),
    "delete_adapter": in_place(lambda model: (add(model), model.delete_adapter("two"))),
    "add_weighted_adapter": in_place(
        lambda model: (
            add(model, weights=False),
            model.add_weighted_adapter(["default", "two"], [1.0, 0.0], "sum", combination_type="linear"),
            model.set_adapter("sum"),
        )
    ),
    "get_peft_model_state_dict": in_place(
        lambda model: peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    ),
}


@pytest.mark.parametrize("name", OF_ADAPTERS)
def test_an_adapter_changes_and_the_answers_stay(expected, name):
    assert_same(OF_ADAPTERS[name](make(lora=True)), expected[True], tolerance=1e-4)


def test_users_without_the_adapter_are_those_on_the_base_model(expected):
    """Users and the base model stay, whatever adapter is on."""
    model = make(lora=True)
    with model.disable_adapter():
        assert_same(model, expected[False])
    add(model)  # starts as nothing
    model.set_adapter("two")
    assert_same(model, expected[False])
    model = model.unload()
    assert_same(model, expected[False])
    detach_user_model(model)
    assert not is_personalized(model)


def test_a_merged_model_and_an_adapter_that_is_loaded_beside(expected, tmp_path):
    model = make(lora=True)
    model.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "again")
    model.set_adapter("again")
    assert_same(model, expected[True])
    assert_same(saved_and_loaded(model.merge_and_unload(), tmp_path / "merged"), expected[True], tolerance=1e-4)


def test_the_adapter_called_default_is_the_one_that_loads(expected, tmp_path):
    """As in PEFT, where another one lies in a folder of its own."""
    model = make(lora=True)
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    add(model, weights=False)
    model.set_adapter("two")
    loaded = saved_and_loaded(model, tmp_path / "out")
    loaded.generation_config.update(pad_token_id=0, eos_token_id=None)
    assert_same(loaded, expected[True])
    assert (tmp_path / "out/two/adapter_model.safetensors").is_file()
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not is_personalized(plain)
    torch.testing.assert_close(plain(IDS).logits, expected[True][1])


@pytest.mark.parametrize("how", ["get_peft_model", "from_pretrained"])
def test_an_adapter_around_a_model_with_users_says_what_to_do(expected, tmp_path, caplog, how):
    if how == "from_pretrained":
        make(lora=True).save_pretrained(tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, logger="trl_personal"):
        if how == "get_peft_model":
            model = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS)).eval()
        else:
            model = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert caplog.text.count("PEFT has put an adapter around a model that has users") == 1
    assert_same(model, expected[how == "from_pretrained"])  # an adapter that is new is nothing
    assert not any(parameter.requires_grad for parameter in model.user_model.parameters())
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/user_model").exists()
    caplog.clear()
    attach_user_model(model, *detach_user_model(model))
    assert not caplog.text
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/user_model/users.json").is_file()


def test_users_attached_below_an_adapter_or_taken_off_there(tmp_path, caplog):
    model = make(lora=True)
    users = detach_user_model(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert not is_personalized(model)
    assert not (tmp_path / "user_model").exists()
    with caplog.at_level(logging.WARNING, logger="trl_personal"):
        attach_user_model(model.get_base_model(), *users)
    assert "attach the user model to that one" in caplog.text
    caplog.clear()
    merged = make(lora=True).merge_and_unload()
    attach_user_model(merged, *detach_user_model(merged))
    assert not caplog.text


def test_what_peft_freezes_is_frozen():
    model = peft.prepare_model_for_kbit_training(make())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapters_without_a_model_around_them_do_not_load(expected, tmp_path):
    model = peft.inject_adapter_in_model(LoraConfig(target_modules=LORA_TARGETS), make())
    assert_same(model, expected[False])
    with pytest.raises(ValueError, match="config.json describes another model than the weights beside it"):
        saved_and_loaded(model, tmp_path)

"""4-bit and 8-bit base models, and optimizers with 8-bit states, for real: bitsandbytes runs on the CPU."""

import copy
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from conftest import LLAMA_SIZES, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_soft_prompt import make_user_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, attach_user_model
from trl_personal.models.saving import get_base_model
from trl_personal.training.divergence import describe_nonfinite
from trl_personal.training.precision import keep_quantized_weights


QUANTIZATIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4bit-double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
LINEAR = {"4bit": bnb.nn.Linear4bit, "4bit-double": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Wide enough for the blocks of 64 that bitsandbytes packs on a CPU."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_SIZES | {"hidden_size": 128, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(add_bos=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_qlora(make_trainer, model_dir):
    def make(name="4bit", **kwargs):
        trainer_kwargs = kwargs.pop("trainer_kwargs", {})
        return make_trainer(
            "llama",
            **kwargs,
            trainer_kwargs={
                "model": model_dir,
                "quantization_config": BitsAndBytesConfig(**QUANTIZATIONS[name]),
                "peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
            }
            | trainer_kwargs,
        )

    return make


@pytest.mark.parametrize("kind", ["individual", "cluster"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_qlora_trains_users_in_float32_on_a_quantized_base(make_qlora, name, kind):
    trainer = make_qlora(name, user_model_kind=kind, num_clusters=2, max_steps=3)
    layers = [module for module in trainer.model.modules() if isinstance(module, LINEAR[name])]
    assert layers
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    users = {n: p.detach().clone() for n, p in trainer.user_model.named_parameters()}
    trainer.train()
    assert {p.dtype for p in trainer.user_model.parameters()} == {torch.float32}
    assert all(not torch.equal(users[n], p) for n, p in trainer.user_model.named_parameters())
    assert all(torch.equal(base[n], p) for n, p in trainer.model.named_parameters() if n in base)


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_loss_is_the_mixture_on_the_quantized_policy(make_qlora, name):
    """The two terms by TRL's own head on hand-made batches, with the reference from the disabled adapter."""
    # 8-bit products take the columns of outliers from the whole batch, so other rows round differently
    trainer = make_qlora(name, beta=0.3, personalization_alpha=0.3, share_prefix="never")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    batch = trainer.data_collator([dict(trainer.train_dataset[row]) for row in range(4)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def log_probs(users=None):
        logits = trainer.model(**inputs, user_indices=users).logits[:, :-1].float().log_softmax(-1)
        scores = logits.gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        return scores.masked_fill(labels[:, 1:] == -100, 0).sum(1)

    with torch.no_grad():
        with trainer.model.disable_adapter():
            reference = log_probs()
        expected = 0
        for users, share in ((batch["user_indices"], 0.3), (torch.zeros_like(batch["user_indices"]), 0.7)):
            chosen, rejected = (log_probs(users) - reference).chunk(2)
            expected = expected - share * torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
        loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["4bit", "8bit"])
def test_saved_qlora_loads_in_any_precision(make_qlora, tmp_path, name):
    trainer = make_qlora(name)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    config = BitsAndBytesConfig(**QUANTIZATIONS[name])
    quantized = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final", quantization_config=config)
    plain = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert any(isinstance(module, LINEAR[name]) for module in quantized.modules())
    ids, users = torch.tensor([[1, 4, 5]]), torch.tensor([1])
    trainer.model.eval()
    expected = trainer.model(ids, user_indices=users).logits.float()
    # bitsandbytes rounds activations in 8-bit layers, and packs 4-bit weights for the CPU once no gradient is wanted
    torch.testing.assert_close(quantized(ids, user_indices=users).logits.float(), expected, rtol=2e-2, atol=0.2)
    for model in (quantized, plain):
        for key, tensor in trainer.user_model.state_dict().items():
            assert torch.equal(model.user_model.state_dict()[key], tensor)
        batch = make_tokenizer()(["please write", "i like dogs"], padding=True, return_tensors="pt")
        sequences = model.generate(**batch, user_ids=["ann", "bo"], max_new_tokens=4, do_sample=False)
        assert sequences.shape == (2, 7)


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_an_evaluation_on_the_way_leaves_the_training_as_it_is(make_qlora, preferences, precompute):
    """bitsandbytes repacks 4-bit weights for CPUs that have AVX512-BF16 where no gradient is wanted, and none comes after."""
    losses = []
    for evaluates in (False, True):
        settings = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
        trainer = make_qlora(
            max_steps=3,
            precompute_ref_log_probs=precompute,
            share_prefix="never",
            trainer_kwargs={"eval_dataset": preferences} if evaluates else {},
            **settings,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]
    trainer.save_model()  # and repacked weights are not saved


def test_resumed_qlora_is_the_uninterrupted_run_but_for_peft_reading_adapters_as_float32(make_qlora, tmp_path):
    """TRL trains the adapters of a quantized model in bfloat16, PEFT loads them as float32. The users are float32 in both."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make_qlora(**settings)
    straight.train()
    (tmp_path / "out/checkpoint-4/trainer_state.json").unlink()
    resumed = make_qlora(**settings)
    resumed.train(resume_from_checkpoint=True)
    parameters = zip(resumed.model.named_parameters(), straight.model.named_parameters(), strict=True)
    for (name, one), (_, other) in parameters:
        if one.requires_grad:
            torch.testing.assert_close(
                one.float(), other.float(), rtol=2e-2, atol=4e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert "user_model" not in name or one.dtype == torch.float32


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit"])
def test_optimizers_with_8bit_states_keep_32bit_states_for_users(make_trainer, optim):
    trainer = make_trainer(optim=optim, max_steps=2)
    trainer.train()
    tables = [m for m in trainer.user_model.modules() if isinstance(m, torch.nn.Embedding)]
    state = trainer.optimizer.state[tables[0].weight]
    assert state["state1"].dtype == torch.float32
    assert (tables[0].weight[1:].abs().sum(1) > 0).all()
    assert tables[0].weight[0].abs().sum() == 0


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"])
def test_paged_optimizers_are_made_with_a_group_for_users(make_trainer, optim):
    """Paging itself needs a GPU; here they are only made."""
    trainer = make_trainer(optim=optim)
    optimizer = trainer.create_optimizer()
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in trainer.user_model.parameters()}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_optimizers_of_transformers_train_users(make_trainer, optim):
    trainer = make_trainer(optim=optim, max_steps=2)
    trainer.train()
    offsets = trainer.user_model.user_offsets.weight
    assert (offsets[1:].abs().sum(1) > 0).all()
    assert offsets[0].abs().sum() == 0


def test_a_quantized_instance_can_be_passed(make_trainer, model_dir):
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS["4bit"])
    )
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = make_trainer(
        trainer_kwargs={"model": model, "peft_config": lora, "processing_class": make_tokenizer(add_bos=True)}
    )
    trainer.train()
    assert get_base_model(trainer.model) is model


# --- What was mended for other models, on a 4-bit base ---------------------------------------------------------------------

IDS, USERS = torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8]]), torch.tensor([1, 2])
GREEDY = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}


@pytest.fixture(scope="module")
def qlora_dir(tmp_path_factory, model_dir):
    """An adapter with users on a base that is 4-bit when it is loaded so; the rows are drawn, not trained."""
    folder = tmp_path_factory.mktemp("qlora")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    attach_user_model(model, make_user_model(128), UserVocab(["ann", "bo"]))
    model.save_pretrained(folder)
    return folder


def load_4bit(folder):
    config = BitsAndBytesConfig(**QUANTIZATIONS["4bit"])
    return AutoPersonalizedModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_a_4bit_model_refuses_what_goes_by_token_ids(qlora_dir):
    model = load_4bit(qlora_dir)
    values = {"prompt_lookup_num_tokens": 2, "assistant_model": model, "inputs_embeds": torch.ones(2, 4, 128)}
    for name, value in values.items():
        with pytest.raises(ValueError, match=f"does not take `{name}`"):
            model.generate(IDS, user_ids="ann", **{name: value}, **GREEDY)
    with pytest.raises(ValueError, match="`generate_batch` .* does not know users"):
        model.get_base_model().generate_batch([[1, 5]])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_of_a_4bit_model_is_its_users(qlora_dir):
    model = load_4bit(qlora_dir)
    options = GREEDY | {"user_ids": ["ann", "bo"]}
    first = model.generate(IDS, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, IDS[:, 1:3]], dim=1)
    expected = model.generate(more, **options)
    with pytest.raises(ValueError, match="was filled for other users"):
        model.generate(
            more, past_key_values=copy.deepcopy(first.past_key_values), **options | {"user_ids": ["bo", "ann"]}
        )
    assert torch.equal(model.generate(more, past_key_values=first.past_key_values, **options), expected)


@pytest.mark.parametrize("damage", ["users", "rows", "adapter", "base"])
def test_a_4bit_base_is_loaded_with_what_was_saved(qlora_dir, model_dir, tmp_path, damage):
    folder, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(qlora_dir, folder)
    shutil.copytree(model_dir, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    load_4bit(folder)
    if damage == "users":
        (folder / "user_model/users.json").write_text('{"bo": 1, "ann": 2}')
    else:
        file = {"rows": folder / "user_model/user_model.safetensors", "adapter": folder / "adapter_model.safetensors"}
        path = file.get(damage, base / "model.safetensors")
        tensors = load_file(path)
        name = max(tensors)
        tensors[name] = tensors[name] + 1
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the file that|parts of two saves"):
        load_4bit(folder)


def test_a_full_evaluation_in_half_precision_leaves_a_4bit_base_alone(make_qlora, preferences):
    trainer = make_qlora(max_steps=1, bf16_full_eval=True)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(IDS, user_indices=USERS).logits
        trainer.evaluate(preferences)
        assert torch.equal(trainer.model(IDS, user_indices=USERS).logits, expected)
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


def test_a_diverged_run_on_a_4bit_base_stops(make_qlora, tmp_path):
    with pytest.raises(FloatingPointError, match="rows of users, are not finite"):
        make_qlora(
            max_steps=20, user_learning_rate=1e38, learning_rate=1e-5, save_strategy="steps", save_steps=1
        ).train()
    for path in (tmp_path / "out").glob("checkpoint-*"):
        assert describe_nonfinite(load_4bit(path)) is None


def test_a_run_on_a_4bit_base_starts_afresh_where_nothing_is_whole(make_qlora, tmp_path, caplog):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = make_qlora(**settings)
    first.train()
    (tmp_path / "out/checkpoint-2/trainer_state.json").unlink()
    again = make_qlora(**settings)
    again.train(resume_from_checkpoint=True)
    assert "training starts afresh" in caplog.text
    assert torch.equal(first.user_model.user_offsets.weight, again.user_model.user_offsets.weight)


def test_frozen_users_on_a_4bit_base_do_not_count_in_the_gradient_norm(make_qlora):
    norms = []
    for rate in (0.0, 1e-9):
        trainer = make_qlora(max_steps=1, user_learning_rate=rate)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] < norms[1]


@pytest.mark.parametrize(
    "adapter", [{"trainable_token_indices": [5, 6]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_embeddings_beside_a_4bit_base_are_trained_and_loaded(make_qlora, tmp_path, adapter):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **adapter)
    trainer = make_qlora(trainer_kwargs={"peft_config": config})
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.model.eval()
    loaded = load_4bit(tmp_path / "final")
    keep_quantized_weights(loaded)  # as in the trainer
    with torch.no_grad():
        found, expected = (model(IDS, user_indices=USERS).logits.float() for model in (loaded, trainer.model))
        for ids in (IDS, torch.tensor([5, 6])):
            embedded, trained = (model.get_input_embeddings()(ids).float() for model in (loaded, trainer.model))
            assert torch.equal(embedded, trained)
    assert torch.equal(loaded.user_model.user_offsets.weight, trainer.user_model.user_offsets.weight)
    # TRL trains whole embeddings beside a quantized base in bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 if "modules_to_save" in adapter else 2e-2)


def test_a_4bit_model_is_as_large_as_its_config_says(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS["4bit"])
    )
    attach_user_model(model, make_user_model(128), UserVocab(["ann", "bo"]))
    model.save_pretrained(tmp_path)
    load_4bit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path)

"""4-bit and 8-bit base models, and optimizers with 8-bit states, for real: bitsandbytes runs on the CPU."""

import bitsandbytes as bnb
import pytest
import torch
from conftest import LLAMA_SIZES, make_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.models.saving import get_base_model


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

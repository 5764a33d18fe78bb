"""Adapters that touch the embeddings, or come with added tokens: trained, saved and loaded as PEFT does it."""

import pytest
import torch
from conftest import LORA_TARGETS, make_model, make_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.models.saving import embedding_size


EMBEDDINGS = {"llama": "embed_tokens", "gptj": "wte"}
ADAPTERS = {
    "some tokens": lambda name: {"target_modules": LORA_TARGETS, "trainable_token_indices": [5, 6]},
    "lora": lambda name: {"target_modules": [*LORA_TARGETS, name]},
    "whole": lambda name: {"target_modules": LORA_TARGETS, "modules_to_save": [name]},
}
IDS, USERS = torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8]]), torch.tensor([1, 2])


def lora(**kwargs):
    return LoraConfig(task_type="CAUSAL_LM", **kwargs)


def assert_loads_as_saved(trainer, folder, ids=IDS, num_logits=None):
    trainer.save_model(str(folder))
    trainer.model.eval()
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(folder)
    expected, plain = trainer.model(ids, user_indices=USERS).logits, trainer.model(ids).logits
    for found, wanted in ((loaded(ids, user_indices=USERS).logits, expected), (loaded(ids).logits, plain)):
        torch.testing.assert_close(found[..., :num_logits], wanted[..., :num_logits])
    return loaded


@pytest.mark.parametrize("family", sorted(EMBEDDINGS))
@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_an_adapter_on_the_embeddings_trains_and_loads(make_trainer, tmp_path, family, adapter):
    config = lora(**ADAPTERS[adapter](EMBEDDINGS[family]))
    trainer = make_trainer(family, trainer_kwargs={"peft_config": config})
    assert trainer.user_model.config.token_dim == 32
    before = trainer.model.get_input_embeddings()(torch.tensor([5])).detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_input_embeddings()(torch.tensor([5])), before)
    assert_loads_as_saved(trainer, tmp_path / "final")


@pytest.mark.parametrize("adapter", ["some tokens", "lora", "whole", "beside"])
@pytest.mark.parametrize("family", sorted(EMBEDDINGS))
def test_added_tokens_come_back_with_the_adapter(
    make_trainer, model_dirs, preferences, tmp_path, caplog, family, adapter
):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    base = AutoModelForCausalLM.from_pretrained(model_dirs[family])
    base.resize_token_embeddings(len(tokenizer))
    options = ADAPTERS.get(adapter, lambda name: {"target_modules": LORA_TARGETS})(EMBEDDINGS[family])
    if adapter == "some tokens":
        options["trainable_token_indices"] = [19, 20]
    trainer = make_trainer(
        family,
        trainer_kwargs={
            "model": base,
            "processing_class": tokenizer,
            "train_dataset": preferences.map(lambda row: {"prompt": f"<x> {row['prompt']}"}),
            "peft_config": lora(**options),
        },
    )
    trainer.train()
    ids = torch.tensor([[19, 5, 6], [20, 5, 19]])
    unsaved = (family, adapter) == ("llama", "lora")  # PEFT leaves the head out, so its new rows are random there too
    loaded = assert_loads_as_saved(trainer, tmp_path / "final", ids, 19 if unsaved else None)
    assert ("the logits of added tokens are random" in caplog.text) == unsaved
    assert embedding_size(loaded.get_input_embeddings()) == (21, 32)
    peft_model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(loaded(ids).logits[..., :19], peft_model(ids).logits[..., :19])


def test_a_tokenizer_with_more_tokens_than_the_model_changes_nothing(make_trainer, tmp_path):
    """Qwen2's here has them, as many on the hub do: the model keeps its size, where PEFT's own class would resize it."""
    trainer = make_trainer("qwen2", lora=True)
    assert len(trainer.processing_class) > 19
    loaded = assert_loads_as_saved(trainer, tmp_path / "final")
    assert loaded(IDS).logits.shape[-1] == 19


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_size_of_embeddings_that_peft_has_wrapped(adapter):
    model = get_peft_model(make_model("llama"), lora(**ADAPTERS[adapter]("embed_tokens")))
    assert embedding_size(model.get_base_model().get_input_embeddings()) == (19, 32)


def test_size_of_embeddings_that_are_no_embedding_of_torch():
    embedding = nn.Module()
    embedding.weight = nn.Parameter(torch.zeros(7, 3))
    assert embedding_size(embedding) == (7, 3)


def test_weights_of_the_adapter_hold_no_user(make_trainer, tmp_path):
    trainer = make_trainer("llama", trainer_kwargs={"peft_config": lora(**ADAPTERS["whole"]("embed_tokens"))})
    trainer.save_model(str(tmp_path))
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "user_model" in name]

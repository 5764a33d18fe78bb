"""Pairs of answers to an image and a text, with users: a tiny LLaVA built here, its processor too."""

import numpy as np
import pytest
import torch
from conftest import LLAMA_SIZES, LORA_TARGETS, WORDS
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from trl_personal import AutoPersonalizedModelForCausalLM


IMAGE_TOKEN = "<image>"


def make_processor():
    words = [*WORDS, IMAGE_TOKEN]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"], extra_special_tokens={"image_token": IMAGE_TOKEN},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_vision_model():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(**LLAMA_SIZES | {"vocab_size": len(WORDS) + 1})
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(WORDS), image_seq_length=4)
    )
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def image(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def vision(make_trainer, tmp_path):
    make_vision_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    rows = [
        {
            "images": [image(i // 2)],
            "prompt": f"<bos> {IMAGE_TOKEN} please write",
            "chosen": [" yes", " long answer the end"][i % 2],
            "rejected": [" long answer the end", " yes"][i % 2],
            "user_id": ["ann", "bo"][i % 2],
        }
        for i in range(8)
    ]
    kwargs = {"model": str(tmp_path / "model"), "train_dataset": Dataset.from_list(rows)}

    def make(lora=False, **settings):
        peft = LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS) if lora else None
        return make_trainer(**{"max_length": None, **settings}, trainer_kwargs=kwargs | {"peft_config": peft})

    return make


def test_every_word_is_read_from_the_folder_of_a_vision_model(vision, tmp_path):
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.tokenizer(" ".join([*WORDS, IMAGE_TOKEN]))["input_ids"] == list(range(len(WORDS) + 1))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_users_who_disagree_about_images_are_told_apart(vision, lora):
    trainer = vision(
        lora, max_steps=40, learning_rate=0.01, user_learning_rate=0.02, lr_scheduler_type="constant", beta=0.5
    )
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_users/accuracy_mean"] == 1.0
    assert metrics["eval_users/accuracy_swapped"] <= 0.25


def test_conditioning_equals_embeddings_concatenated_by_hand(vision):
    trainer, plain, processor = vision(), make_vision_model(), make_processor()
    trainer.user_model.user_offsets.weight.data[1:].normal_()
    trainer.model.eval()
    for text, position in ((f"<bos> {IMAGE_TOKEN} please write yes", 1), (f"{IMAGE_TOKEN} please", 0)):
        inputs = processor(images=[[image(5)]], text=[text], return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"]
        seen = []
        handle = plain.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        assert torch.equal(trainer.model(**inputs).logits, plain(**inputs).logits)  # without users
        handle.remove()
        soft_prompt = trainer.user_model(torch.tensor([2]))
        embeds = torch.cat([seen[0][:, :position], soft_prompt, seen[0][:, position:]], dim=1)
        hidden = plain.get_decoder()(inputs_embeds=embeds).last_hidden_state
        logits = plain.get_output_embeddings()(hidden)[0]
        keep = [t if t + 1 < position else t + 3 for t in range(ids.shape[1])]
        found = trainer.model(**inputs, user_indices=torch.tensor([2])).logits[0]
        torch.testing.assert_close(found, logits[keep], rtol=1e-5, atol=1e-4)


def test_without_users_it_is_trl_to_the_last_bit(vision, make_args):
    ours = vision(user_model_kind="none", max_steps=3)
    ours.train()
    theirs = DPOTrainer(
        model=ours.model.config.name_or_path,
        args=make_args(DPOConfig, max_steps=3, max_length=None),
        train_dataset=ours.train_dataset,
    )
    theirs.train()
    assert [log["loss"] for log in ours.state.log_history[:-1]] == [
        log["loss"] for log in theirs.state.log_history[:-1]
    ]
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_model_writes_about_images_in_a_batch_of_users(vision, tmp_path, lora):
    trainer = vision(lora, user_learning_rate=1.0, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model, processor = AutoPersonalizedModelForCausalLM.from_pretrained(tmp_path / "final"), make_processor()
    model.generation_config.eos_token_id = None
    texts, users = (
        [f"<bos> {IMAGE_TOKEN} please write yes", f"<bos> {IMAGE_TOKEN} i", f"{IMAGE_TOKEN} short"],
        ["ann", "bo", None],
    )
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = processor(images=[[image(i)] for i in range(3)], text=texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, user_ids=users, **options)
    for row, (text, user) in enumerate(zip(texts, users, strict=True)):
        inputs = processor(images=[[image(row)]], text=[text], return_tensors="pt")
        alone = model.generate(**inputs, user_ids=user, **options)
        assert torch.equal(together[row, -6:], alone[0, -6:])

"""Every family of language models: conditioning, no users, and generation, with no code of its own."""

import copy

import pytest
import torch
from conftest import LLAMA_SIZES, WORDS, make_tokenizer
from families import IDS, SIZES, make_family
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    NemotronHConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model


NUM_VIRTUAL_TOKENS = 3
PROMPTS = ["<bos> please write a story the end", "short", "<bos> i like dogs", "yes no yes no"]
USERS = ["ann", "bo", "cy", "ann"]


def personalize(model):
    torch.manual_seed(5)
    width = model.get_input_embeddings().weight.shape[1]
    user_model = IndividualUserModel(UserModelConfig(3, NUM_VIRTUAL_TOKENS, width))
    scale = model.get_input_embeddings()(torch.arange(19)).std()
    user_model.generic_prompt.data.normal_(std=scale.item())
    user_model.user_offsets.weight.data[1:].normal_(std=scale.item())
    attach_user_model(model, user_model, UserVocab(["ann", "bo", "cy"]))
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=sorted(SIZES))
def family(request):
    return request.param


def assert_reads_every_word(tokenizer, add_bos=False):
    """`<bos>` and the like need no space around them, so those are put together and the words are set apart."""
    bos = [1] if add_bos else []
    ids = tokenizer("".join(WORDS[:3]) + " " + " ".join(WORDS[3:]))["input_ids"]
    assert ids == bos + list(range(len(WORDS)))
    assert [tokenizer(word)["input_ids"] for word in WORDS] == [[*bos, i] for i in range(len(WORDS))]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.split() == WORDS[3:]
    assert tokenizer(text)["input_ids"] == bos + ids[len(bos) + 3 :]
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("add_bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("auto_class", [AutoTokenizer, AutoProcessor])
def test_every_word_is_read_from_the_folder_of_a_model(family, auto_class, add_bos, tmp_path):
    """Which class these load depends on the model beside the tokenizer, and a class of another kind reads other ids."""
    make_family(family).config.save_pretrained(tmp_path)
    make_tokenizer(add_bos, family).save_pretrained(tmp_path)
    tokenizer = auto_class.from_pretrained(tmp_path)
    assert_reads_every_word(tokenizer, add_bos)
    tokenizer.save_pretrained(tmp_path)  # as the trainer does
    assert_reads_every_word(auto_class.from_pretrained(tmp_path), add_bos)


def test_every_word_is_read_from_the_folders_of_the_fixtures(model_dirs):
    for family, folder in model_dirs.items():
        assert_reads_every_word(AutoTokenizer.from_pretrained(folder), add_bos=family == "llama")


def test_conditioning_equals_embeddings_concatenated_by_hand(family):
    plain = make_family(family)
    model = personalize(copy.deepcopy(plain))
    ids = torch.tensor([[1, 7, 8, 9, 10, 11, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [1, 4, 5, 6, 0, 0, 0, 0]])
    mask = ids.ne(0).long()
    users = torch.tensor([1, 2, 0])
    logits = model(input_ids=ids, attention_mask=mask, user_indices=users).logits
    for row, user in enumerate(users):
        tokens = ids[row][mask[row].bool()]
        embeds = plain.get_input_embeddings()(tokens)
        soft_prompt = model.user_model.generic_prompt + model.user_model.user_offsets.weight[user].view(
            NUM_VIRTUAL_TOKENS, -1
        )
        position = int(tokens[0] == 1)
        embeds = torch.cat([embeds[:position], soft_prompt, embeds[position:]])
        by_hand = plain(inputs_embeds=embeds[None]).logits[0]
        keep = [t if t + 1 < position else t + NUM_VIRTUAL_TOKENS for t in range(len(tokens))]
        torch.testing.assert_close(logits[row][: len(tokens)], by_hand[keep], rtol=1e-5, atol=1e-4)


def test_without_users_it_is_the_plain_model_bit_for_bit(family):
    plain = make_family(family)
    model = personalize(copy.deepcopy(plain))
    ids = torch.tensor([[1, 7, 8, 9], [5, 6, 7, 8]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_batched_generation_equals_one_by_one(family):
    model, tokenizer = personalize(make_family(family)), make_tokenizer()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3}
    together = model.generate(**batch, user_ids=USERS, **options)[:, -8:]
    for row, (prompt, user) in enumerate(zip(PROMPTS, USERS, strict=True)):
        alone = model.generate(**tokenizer([prompt], return_tensors="pt"), user_ids=user, **options)[0, -8:]
        assert torch.equal(together[row], alone), prompt


def test_nemotron_h_is_conditioned_and_generation_says_what_is_missing():
    """Mamba-2, attention and MLP layers in one model; transformers' `generate` takes no embeddings there."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        **IDS, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["mamba", "attention", "mamba", "mlp"], mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8,
        n_groups=2, chunk_size=16,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config).eval()
    model = personalize(copy.deepcopy(plain))
    ids, users = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([1])
    embeds = torch.cat([model.user_model(users), plain.get_input_embeddings()(ids)], dim=1)
    expected = plain(inputs_embeds=embeds).logits[:, NUM_VIRTUAL_TOKENS:]
    torch.testing.assert_close(model(input_ids=ids, user_indices=users).logits, expected)
    with pytest.raises(ValueError, match="takes no embeddings in NemotronHForCausalLM.*cannot write"):
        model.generate(ids, user_ids=["ann"], max_new_tokens=2)


def test_a_model_that_prepares_its_own_mask_is_refused_by_name():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    text = Gemma3TextConfig(**IDS, **SIZES["gemma3_text"])
    model = personalize(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)).eval())
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration was given, or has prepared, another one"):
        model(input_ids=torch.tensor([[5, 6, 7]]), user_indices=torch.tensor([1]))


def test_positions_of_several_dimensions_count_on_through_the_soft_prompt():
    """Qwen2-VL hands its decoder position ids for time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**LLAMA_SIZES, "vocab_size": 32, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Qwen2VLForConditionalGeneration(config).eval()
    model = personalize(copy.deepcopy(plain))
    ids, users = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([1])
    embeds = torch.cat([model.user_model(users), plain.get_input_embeddings()(ids)], dim=1)
    expected = plain(inputs_embeds=embeds).logits[:, NUM_VIRTUAL_TOKENS:]
    torch.testing.assert_close(model(input_ids=ids, user_indices=users).logits, expected)

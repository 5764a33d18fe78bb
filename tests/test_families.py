"""Every family of language models: conditioning, no users, and generation, with no code of its own."""

import copy
import inspect

import pytest
import torch
from conftest import LLAMA_SIZES, WORDS, make_tokenizer
from families import GROUPED, HEADS, IDS, SIZES, make_family
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MllamaForCausalLM,
    NemotronHConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

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


# --- Where the decoder is not what `get_decoder()` returns -----------------------------------------------------------------

HIDDEN = {
    "modernbert-decoder": HEADS | {"local_attention": 4, "global_attn_every_n_layers": 2},
    "llama4_text": HEADS | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 32},
    "mllama": {},
}


def make_hidden(name):
    torch.manual_seed(0)
    if name == "mllama":
        text = (
            HEADS
            | IDS
            | {"cross_attention_layers": [], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        )
        model = MllamaForCausalLM(MllamaTextConfig(**text)).eval()
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **IDS, **HIDDEN[name])).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_the_decoder_is_found_where_get_decoder_returns_something_else(name):
    plain = make_hidden(name)
    assert (
        "inputs_embeds" not in inspect.signature(plain.get_decoder().forward).parameters
        or plain.get_decoder() is plain
    )
    model = personalize(copy.deepcopy(plain))
    ids, users = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([1, 2])
    embeds = torch.cat([model.user_model(users), plain.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        found, expected = (
            model(ids, user_indices=users).logits,
            plain(inputs_embeds=embeds).logits[:, NUM_VIRTUAL_TOKENS:],
        )
    torch.testing.assert_close(found, expected)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, user_ids=["ann", "bo"], **options)
    for row, user in enumerate(("ann", "bo")):
        assert torch.equal(together[row], model.generate(ids[row : row + 1], user_ids=user, **options)[0])


def test_such_a_family_trains_its_users(make_trainer, tmp_path):
    make_hidden("modernbert-decoder").save_pretrained(tmp_path / "model")
    settings = {"trainer_kwargs": {"model": str(tmp_path / "model"), "processing_class": make_tokenizer()}}
    trainer = make_trainer(**settings)
    trainer.train()
    assert (trainer.user_model.user_offsets.weight[1:].abs().sum(dim=1) > 0).all()
    make_hidden("llama4_text").save_pretrained(tmp_path / "model")
    for kind in ("none", "individual"):  # TRL's own head takes what `get_decoder()` returns for a decoder
        with pytest.raises(AttributeError, match="last_hidden_state"):
            make_trainer(user_model_kind=kind, **settings).train()


NEED_TOKENS = {  # what a family reads beside the embeddings -> sizes with which it does
    "gemma3n_text": (
        "embedding of its own for each token id",
        HEADS | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 19,
                 "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
                 "laurel_rank": 4},
    ),
    "gemma4_text": (
        "embedding of its own for each token id",
        HEADS | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 19,
                 "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v4": ("sends tokens to experts by their ids", GROUPED | {"n_routed_experts": 4, "moe_intermediate_size": 32}),
    "prophetnet": ("reads other outputs of its decoder", {"hidden_size": 32, "num_decoder_layers": 1, "num_encoder_layers": 1,
                   "decoder_ffn_dim": 32, "encoder_ffn_dim": 32, "num_decoder_attention_heads": 2,
                   "num_encoder_attention_heads": 2}),
    "cpmant": ("has no decoder below its LM head that takes embeddings", {"hidden_size": 32, "num_attention_heads": 2,
               "dim_head": 16, "dim_ff": 32, "num_hidden_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEED_TOKENS)
def test_a_family_that_needs_more_than_embeddings_is_refused_by_name(name):
    """Their decoders take embeddings, and compute something else from them in silence, or fail in the middle."""
    message, sizes = NEED_TOKENS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **IDS, **sizes))
    user_model = IndividualUserModel(UserModelConfig(1, 2, model.get_input_embeddings().weight.shape[1]))
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*{message}"):
        attach_user_model(model, user_model, UserVocab(["ann"]))


def test_without_embeddings_in_its_layers_it_is_like_any_other():
    name = "gemma4_text"
    sizes = NEED_TOKENS[name][1] | {"hidden_size_per_layer_input": 0}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **IDS, **sizes)).eval()
    model = personalize(copy.deepcopy(plain))
    ids, users = torch.tensor([[5, 6, 7, 8]]), torch.tensor([1])
    embeds = torch.cat([model.user_model(users), plain.get_input_embeddings()(ids)], dim=1)
    found, expected = model(ids, user_indices=users).logits, plain(inputs_embeds=embeds).logits[:, NUM_VIRTUAL_TOKENS:]
    torch.testing.assert_close(found, expected)


# --- Every family ------------------------------------------------------------------------------------------------------


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

"""Every argument of `generate` does for users what it does for the plain model, or is refused by name."""

import copy
import inspect
import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONFIGS, ROOT, make_model, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StaticCache,
    WatermarkingConfig,
)

from trl_personal import IndividualUserModel, UserModelConfig, UserVocab, attach_user_model, detach_user_model
from trl_personal.models.generation_limits import REFUSED, reason_not_to_write


HARD = [5, 6, 7]  # a user whose soft prompt is these tokens writes what the plain model writes behind them
PROMPTS = torch.tensor([[1, 5, 6, 7, 5, 6, 8], [0, 0, 1, 5, 6, 7, 5]])
MASK = PROMPTS.ne(0).long()
HARD_PROMPTS = torch.tensor([[1, *HARD, 5, 6, 7, 5, 6, 8], [0, 0, 1, *HARD, 5, 6, 7, 5]])


def with_hard_user(model):
    user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=32))
    embedded = model.get_input_embeddings().weight[HARD].detach()
    torch.manual_seed(3)
    user_model.generic_prompt.data.normal_()
    user_model.user_offsets.weight.data[1] = (embedded - user_model.generic_prompt.data).flatten()
    user_model.user_offsets.weight.data[2].normal_()
    attach_user_model(model, user_model, UserVocab(["hard", "other"]), 1)
    return model


@pytest.fixture(scope="module")
def models():
    """A plain model, and the same with users."""
    plain = make_model("llama")
    plain.generation_config.update(pad_token_id=0, eos_token_id=None)
    return plain, with_hard_user(copy.deepcopy(plain))


def write(models, **kwargs):
    """What the plain model writes behind the hard tokens, and the user of these tokens without them."""
    plain, model = models
    torch.manual_seed(0)
    expected = plain.generate(HARD_PROMPTS, attention_mask=HARD_PROMPTS.ne(0).long(), **kwargs)
    torch.manual_seed(0)
    return expected, model.generate(PROMPTS, attention_mask=MASK, user_ids="hard", **kwargs)


SAMPLE = {"do_sample": True}
WORKS = {  # argument -> how it is tried
    "max_new_tokens": {"max_new_tokens": 3},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": 8},
    "max_time": {"max_time": 60.0},
    "do_sample": SAMPLE,
    "num_beams": {"num_beams": 3},
    "early_stopping": {"num_beams": 3, "early_stopping": True, "eos_token_id": 8},
    "length_penalty": {"num_beams": 3, "length_penalty": -2.0, "eos_token_id": 8},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "temperature": SAMPLE | {"temperature": 0.3},
    "top_k": SAMPLE | {"top_k": 2},
    "top_p": SAMPLE | {"top_p": 0.5},
    "min_p": SAMPLE | {"min_p": 0.2},
    "top_h": SAMPLE | {"top_h": 0.4},
    "typical_p": SAMPLE | {"typical_p": 0.4},
    "epsilon_cutoff": SAMPLE | {"epsilon_cutoff": 0.1},
    "eta_cutoff": SAMPLE | {"eta_cutoff": 0.1},
    "repetition_penalty": {
        "repetition_penalty": 3.0,
        "suppress_tokens": [0],
    },  # padding, which is never written elsewhere
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "suppress_tokens": [0]},
    "bad_words_ids": {"bad_words_ids": [[8], [9, 10]]},
    "renormalize_logits": SAMPLE | {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "remove_invalid_values": {"remove_invalid_values": True},
    "suppress_tokens": {"suppress_tokens": [8, 9]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(10, 19))},
    "sequence_bias": {"sequence_bias": [[[8], 5.0]]},
    "guidance_scale": {"guidance_scale": 2.0},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=5.0)},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": 8},
    "eos_token_id": {"eos_token_id": [8, 9]},
    "use_cache": {"use_cache": True},
    "cache_implementation": {"cache_implementation": "static"},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 40},
    "cache_config": {"cache_implementation": "dynamic"},
    "disable_compile": {"disable_compile": True},
    "compile_config": {"disable_compile": True},
    "logits_processor": {},  # the following with ids of the caller: tests/test_generation.py
    "stopping_criteria": {},
    "prefix_allowed_tokens_fn": {},
    "streamer": {},
    "synced_gpus": {"synced_gpus": False},
    "negative_prompt_ids": {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[1, 9], [1, 9]])},
    "negative_prompt_attention_mask": {
        "guidance_scale": 2.0,
        "negative_prompt_ids": torch.tensor([[1, 9], [1, 9]]),
        "negative_prompt_attention_mask": torch.ones(2, 2),
    },
}
AS_SUCH = {  # tried by itself below, or in tests/test_generation.py
    *("inputs", "generation_config", "kwargs", "max_length", "min_length", "forced_eos_token_id", "stop_strings"),
    *(
        "exponential_decay_length_penalty",
        "bos_token_id",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
    ),
    *("output_logits", "return_dict_in_generate"),
}
OF_ASSISTANTS = {  # without an assistant they do nothing
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *(
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
    ),
}
OF_OTHERS = {  # of encoder-decoder models, of continuous batching, or of decoding loops that transformers has moved to the hub
    *(
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "decoder_start_token_id",
        "continuous_batching_config",
    ),
    *(
        "low_memory",
        "penalty_alpha",
        "dola_layers",
        "diversity_penalty",
        "num_beam_groups",
        "constraints",
        "force_words_ids",
    ),
}


def all_arguments():
    of_generate = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    of_config = {
        name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"
    }
    return of_generate | of_config


def test_every_argument_of_generate_is_in_the_table():
    """A new one of transformers fails here until somebody has tried it."""
    known = {*WORKS, *AS_SUCH, *OF_ASSISTANTS, *OF_OTHERS, *REFUSED}
    assert all_arguments() - known == set()
    page = (ROOT / "docs/compatibility.md").read_text().split("## Every argument of `generate`")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", page))
    assert (all_arguments() | REFUSED.keys()) - named == {"kwargs"}


@pytest.mark.parametrize("name", WORKS)
def test_it_works_as_for_the_plain_model(models, name):
    settings = {"max_new_tokens": 6, "do_sample": False} | WORKS[name]
    expected, found = write(models, **settings)
    assert torch.equal(found[:, : PROMPTS.shape[1]], PROMPTS.repeat_interleave(len(found) // 2, dim=0))
    assert torch.equal(found[:, PROMPTS.shape[1] :], expected[:, HARD_PROMPTS.shape[1] :])


def test_lengths_count_the_callers_tokens(models):
    _, model = models
    for settings in ({"max_length": 10}, {"generation_config": GenerationConfig(max_length=10, pad_token_id=0)}):
        assert model.generate(PROMPTS, attention_mask=MASK, user_ids="hard", **settings).shape == (2, 10)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused_by_name(models, name):
    _, model = models
    values = {"assistant_model": make_model("llama"), "custom_generate": lambda model, **kwargs: None}
    value = values.get(name, PROMPTS.float() if name == "inputs_embeds" else 2)
    for user_ids in ("hard", None):
        with pytest.raises(ValueError, match=f"does not take `{name}`: .* Leave it out"):
            model.generate(PROMPTS, user_ids=user_ids, max_new_tokens=2, **{name: value})
    if name in vars(GenerationConfig()):
        config = GenerationConfig(**{name: value})
        with pytest.raises(ValueError, match=f"does not take `{name}`"):
            model.generate(PROMPTS, generation_config=config, user_ids="hard")


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_until_the_users_are_gone(name):
    model = with_hard_user(make_model("llama"))
    with pytest.raises(ValueError, match=f"`{name}` .*continuous batching.* does not know users"):
        getattr(model, name)([[1, 5]], user_ids=["hard"])
    detach_user_model(model)
    assert getattr(model, name).__func__ is getattr(type(model), name)


# --- Positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_position_ids_of_the_prompt_change_nothing_if_they_are_right(family):
    model = with_hard_user(make_model(family))
    position_ids = (MASK.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": MASK, "user_ids": ["hard", "other"], "max_new_tokens": 5, "pad_token_id": 0}
    assert torch.equal(
        model.generate(PROMPTS, **options), model.generate(PROMPTS, **options, position_ids=position_ids)
    )
    for moved in (position_ids + 7, position_ids[:1]):  # rotary positions are relative; one row may stand for all
        model.generate(PROMPTS, **options, position_ids=moved)


def test_a_prompt_that_does_not_fit_is_told_before_anything_is_written(models, caplog):
    _, model = models
    ids = torch.full((1, 62), 5)
    with pytest.raises(
        ValueError, match="has 64 positions, but a prompt has 62 tokens and the soft prompt 3.*to 61 tokens"
    ):
        model.generate(ids, user_ids="hard", max_new_tokens=1)
    with caplog.at_level(logging.WARNING):
        model.generate(ids[:, :59], user_ids="hard", max_new_tokens=2)
        assert "positions" not in caplog.text
        model.generate(ids[:, :59], user_ids="hard", max_new_tokens=5)
    assert "up to 5 new tokens are more. Set `max_new_tokens` to 2 or less" in caplog.text


# --- Caches -----------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings(
    "ignore:`past_key_values` is deprecated:FutureWarning"
)  # newer versions say `cache`
GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
MORE = torch.tensor([[9, 10]])


@pytest.mark.parametrize("how", ["passed", "returned"])
def test_the_same_users_go_on_with_their_cache(models, how):
    _, model = models
    cache = DynamicCache(config=model.config) if how == "passed" else None
    options = GREEDY | {"user_ids": ["hard", "other"], "attention_mask": MASK, "return_dict_in_generate": True}
    first = model.generate(PROMPTS, **options, **({"past_key_values": cache} if cache is not None else {}))
    cache = cache or first.past_key_values
    more = torch.cat([first.sequences, MORE.expand(2, -1)], dim=1)
    mask = torch.cat([MASK, torch.ones(2, more.shape[1] - 7, dtype=torch.long)], dim=1)
    options |= {"attention_mask": mask, "return_dict_in_generate": False}
    expected = model.generate(more, **options)
    assert torch.equal(model.generate(more, **options, past_key_values=copy.deepcopy(cache)), expected)
    for others in (["other", "hard"], ["hard", "hard"], ["hard", None]):
        with pytest.raises(ValueError, match="was filled for other users, or for other rows"):
            model.generate(more, **options | {"user_ids": others}, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="was filled for other users, or for other rows"):
        model.generate(more[:1], **GREEDY, user_ids="hard", past_key_values=copy.deepcopy(cache))
    cropped = copy.deepcopy(cache)
    cropped.crop(4 - cropped.get_seq_length())
    with pytest.raises(ValueError, match="cropped into the soft prompt"):
        model.generate(more, **options, past_key_values=cropped)


@pytest.mark.parametrize("make", ["plain", "beams", "trained since"])
def test_any_other_cache_is_refused(models, make):
    plain, model = models
    model = copy.deepcopy(model)
    cache = DynamicCache(config=model.config)
    if make == "plain":
        plain(PROMPTS[:1, :3], past_key_values=cache, use_cache=True)
        message = "was not filled by `generate` for users"
    elif make == "beams":
        model.generate(PROMPTS[:1], user_ids="hard", num_beams=3, past_key_values=cache, **GREEDY)
        message = "was not filled by `generate` for users"
    else:
        model.generate(PROMPTS[:1], user_ids="hard", past_key_values=cache, **GREEDY)
        model.user_model.user_offsets.weight.data[1] += 0.1
        message = "was filled for other users"
    with pytest.raises(ValueError, match=message):
        model.generate(torch.cat([PROMPTS[:1], MORE], 1), user_ids="hard", past_key_values=cache, **GREEDY)


def test_an_empty_cache_of_any_class_is_taken(models):
    _, model = models
    expected = model.generate(PROMPTS, attention_mask=MASK, user_ids="hard", **GREEDY)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        found = model.generate(PROMPTS, attention_mask=MASK, user_ids="hard", past_key_values=cache, **GREEDY)
        assert torch.equal(found, expected)


# --- Who is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user_ids",
    [
        ("hard", "other"),
        np.array(["hard", "other"]),
        np.array(["hard", "other"], dtype=object),
        pd.Series(["hard", "other"], index=[5, 3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_lists_of_any_kind_are_users(models, user_ids):
    _, model = models
    expected = model.generate(PROMPTS, attention_mask=MASK, user_ids=["hard", "other"], **GREEDY)
    assert torch.equal(model.generate(PROMPTS, attention_mask=MASK, user_ids=user_ids, **GREEDY), expected)


@pytest.mark.parametrize(
    "user_ids", [7, np.int64(7), torch.tensor(7), torch.tensor([7, 7]), np.array([7, 7]), "7"], ids=repr
)
def test_integers_of_any_kind_are_users(user_ids):
    model = make_model("llama")
    config = UserModelConfig(num_users=1, num_virtual_tokens=3, token_dim=32)
    user_model = IndividualUserModel(config)
    user_model.user_offsets.weight.data[1].normal_()
    attach_user_model(model, user_model, UserVocab([7]), 1)
    expected = model.generate(PROMPTS, attention_mask=MASK, user_ids=["7", "7"], **GREEDY)
    assert torch.equal(model.generate(PROMPTS, attention_mask=MASK, user_ids=user_ids, **GREEDY), expected)
    assert not torch.equal(expected, model.generate(PROMPTS, attention_mask=MASK, **GREEDY))


@pytest.mark.parametrize(
    "user_ids",
    [
        {"hard", "other"},
        frozenset({"hard", "other"}),
        {"hard": 1, "other": 2},
        b"hard",
        iter(["hard", "other"]),
        (u for u in "ab"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_order_is_refused(models, user_ids):
    _, model = models
    with pytest.raises(TypeError, match=f"`user_ids` must be a user id or a list .* found {type(user_ids).__name__}"):
        model.generate(PROMPTS, attention_mask=MASK, user_ids=user_ids, **GREEDY)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 3], "rows from 1 to 3, but there are 2 users"),
        ([-1, 1], "rows from -1 to 1, but there are 2 users"),
        ([1.0, 2.0], "must be a tensor of integers"),
        ([True, False], "must be a tensor of integers"),
        ([1], r"must hold one user per row, shape \(2,\), got \(1,\)"),
        ([[1], [2]], r"must hold one user per row, shape \(2,\), got \(2, 1\)"),
    ],
)
def test_rows_that_there_are_not_are_refused(models, rows, message):
    _, model = models
    with pytest.raises((ValueError, TypeError), match=message):
        model(PROMPTS, attention_mask=MASK, user_indices=torch.tensor(rows))


# --- Models that train and cannot write -------------------------------------------------------------------------------

HYBRIDS = {
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_that_cannot_write_say_so_when_a_trainer_is_made(make_trainer, tmp_path, caplog, family):
    sizes = {
        key: CONFIGS["llama"].to_dict()[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **HYBRIDS[family]))
    assert "takes no embeddings" in reason_not_to_write(model)
    model.save_pretrained(tmp_path / family)
    make_tokenizer().save_pretrained(tmp_path / family)
    trainer = make_trainer(trainer_kwargs={"model": str(tmp_path / family)}, max_steps=1, share_prefix="never")
    assert "it cannot write (`generate`) for them" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match="cannot write .`generate`. for them"):
        trainer.model.generate(PROMPTS, user_ids="ann")

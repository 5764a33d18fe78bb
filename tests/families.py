"""A tiny model of every family that is tested, with its oddities on: sliding windows shorter than the prompt, experts, ..."""

import torch
from conftest import WORDS
from transformers import AutoConfig, AutoModelForCausalLM


IDS = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2}

SIZES = {
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neo": SMALL
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt2": GPT2,
    "gpt_neox": SMALL,
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "llama": GROUPED,
    "mistral": GROUPED | WINDOW,
    "mixtral": GROUPED | EXPERTS | {"num_local_experts": 4},
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "gemma": HEADS,
    "gemma2": HEADS | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": HEADS
    | WINDOW
    | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": GROUPED,
    "phi3": GROUPED | WINDOW,
    "falcon": SMALL | {"alibi": False, "new_decoder_architecture": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "olmo2": GROUPED,
    "granite": GROUPED | {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "cohere2": GROUPED | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0]},
    "gpt_oss": HEADS | WINDOW | EXPERTS | {"num_local_experts": 4},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


# bitsandbytes packs 4-bit weights in blocks of 64
WIDE = dict.fromkeys(
    (
        "hidden_size",
        "intermediate_size",
        "n_embd",
        "ffn_dim",
        "word_embed_proj_dim",
        "block_ff_dim",
        "moe_intermediate_size",
    ),
    128,
) | {"head_dim": 32}


def make_family(name, seed=0, wide=False):
    torch.manual_seed(seed)
    sizes = SIZES[name] | ({key: value for key, value in WIDE.items() if key in SIZES[name]} if wide else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **IDS, **sizes))
    for parameter in model.parameters():  # away from zero biases and unit norms, which hide mistakes
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()

"""How the commands load a model: `--dtype`, `--device_map`, `--load_in_4bit`."""

from argparse import Namespace
from typing import Any

from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config


def quantization_config(arguments: Namespace) -> BitsAndBytesConfig | None:
    """TRL's config for 4-bit weights, which compute in bfloat16 unless `--dtype` says otherwise; `None` if not asked for."""
    in_4bit = arguments.load_in_4bit
    dtype = "bfloat16" if in_4bit and arguments.dtype == "auto" else arguments.dtype
    return get_quantization_config(ModelConfig(load_in_4bit=in_4bit, dtype=dtype))


def loading_options(arguments: Namespace) -> dict[str, Any]:
    """Keywords of `from_pretrained` that were asked for."""
    options = {
        "dtype": None if arguments.dtype == "auto" else arguments.dtype,
        "device_map": arguments.device_map,
        "quantization_config": quantization_config(arguments),
    }
    return {name: value for name, value in options.items() if value is not None}

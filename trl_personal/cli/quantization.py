"""`--load_in_4bit` of the commands that load a model."""

from argparse import Namespace

from transformers import BitsAndBytesConfig
from trl import ModelConfig, get_quantization_config


def quantization_config(arguments: Namespace) -> BitsAndBytesConfig | None:
    """TRL's config for 4-bit weights, which compute in bfloat16 unless `--dtype` says otherwise; `None` if not asked for."""
    in_4bit = arguments.load_in_4bit
    dtype = "bfloat16" if in_4bit and arguments.dtype == "auto" else arguments.dtype
    return get_quantization_config(ModelConfig(load_in_4bit=in_4bit, dtype=dtype))

"""One CPU thread, no network, tiny models from configs, eight preferences of two users."""

import copy
import os
import tempfile


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

import importlib.util
import logging
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
WORDS = "<pad> <bos> <eos> short long answer please write a story the end yes no i like dogs cats and".split()
SIZES = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
LLAMA_SIZES = SIZES | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gptj": GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, **SIZES),
    "llama": LlamaConfig(**LLAMA_SIZES),
    "qwen2": Qwen2Config(**LLAMA_SIZES),
}
LORA_TARGETS = ["q_proj", "v_proj"]

torch.set_num_threads(1)
datasets.disable_progress_bars()


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load_example("own_user_model")  # registers "point", which passes every test of the built-in kinds
KINDS = ["individual", "cluster", "low_rank", "point"]


def make_tokenizer(add_bos=False, family=None):
    """
    One token a word, numbered as in `WORDS`, for the folder of a model of `family`. `AutoTokenizer` loads what lies beside a
    Qwen2 model as byte-level BPE, whatever class was saved, so for that family it is made as one, with the same ids.
    """
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "left"}
    if family == "qwen2":
        tokenizer = Qwen2Tokenizer(*byte_level_words(), unk_token="<pad>", add_prefix_space=True, **names)
    else:
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inputs = ["input_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names)
    if add_bos:
        bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = bos
    return tokenizer


def byte_level_words():
    """
    Vocabulary and merges of a byte-level BPE that reads each of `WORDS`, with the space before it, as one token. The merges
    need letters and beginnings of words, which have the ids after those of `WORDS` and occur in no text of these words.
    """
    space = "Ġ"  # as byte-level BPE writes it
    vocab = {word if word[0] == "<" else space + word: i for i, word in enumerate(WORDS)}
    merges = {}
    for word in (token for token in list(vocab) if token[0] == space):
        merges |= {(word[:end], word[end]): None for end in range(1, len(word))}
    for left, right in merges:
        for token in (left, right, left + right):
            vocab.setdefault(token, len(vocab))
    return vocab, list(merges)


def make_model(family="gptj", seed=0):
    torch.manual_seed(seed)
    # a copy: what is saved or cast writes its dtype into the config, and the next test's model would be made in it
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    for parameter in model.parameters():  # some families start biases and norms at 0 and 1, which hides mistakes
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """Folders of a plain language model and its tokenizer. Llama's adds a BOS token, the others' do not."""
    root = tmp_path_factory.mktemp("models")
    for family in CONFIGS:
        make_model(family).save_pretrained(root / family)
        make_tokenizer(family == "llama", family).save_pretrained(root / family)
    return {family: str(root / family) for family in CONFIGS}


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def preferences():
    """Four pairs of answers, each judged by two users: `ann` prefers the short answer, `bo` the long one."""
    rows = []
    for i in range(8):
        prompt = ["please write a story", "write a answer and", "please i like dogs", "the story"][i // 2]
        short, long = " yes", f" {WORDS[5 + i // 2]} the end yes no"
        chosen, rejected = (short, long) if i % 2 == 0 else (long, short)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": ["ann", "bo"][i % 2]})
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def make_args(tmp_path):
    def make(config_class=PersonalizedDPOConfig, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "max_length": 32,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        if config_class is PersonalizedDPOConfig:
            defaults["num_virtual_tokens"] = 3
        return config_class(**defaults | kwargs)

    return make


@pytest.fixture
def make_trainer(model_dirs, preferences, make_args):
    def make(
        family="gptj", lora=False, trainer_class=PersonalizedDPOTrainer, args=None, trainer_kwargs=None, **kwargs
    ):
        args = args or make_args(**kwargs)
        return trainer_class(
            **{
                "model": model_dirs[family],
                "args": args,
                "train_dataset": preferences,
                "peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=LORA_TARGETS) if lora else None,
            }
            | (trainer_kwargs or {})
        )

    return make


@pytest.fixture(autouse=True)
def _levels_of_loggers():
    """Quiet libraries, and our own loggers as they were: servers and commands set levels for their process."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "trl_personal":
            logging.getLogger(name).setLevel(logging.NOTSET)


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="write the table of docs/compatibility.md")

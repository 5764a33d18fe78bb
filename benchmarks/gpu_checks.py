"""
The list of docs/gpu.md on one GPU, as JSON on standard output. Everything is made here, nothing is downloaded.

    python benchmarks/gpu_checks.py [--small]

`--small` uses tiny shapes and, without a GPU, the CPU: to test the script itself.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


CUDA = torch.cuda.is_available()
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make_model(folder, small):
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(500))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    sizes = (128, 256, 2, 4) if small else (2048, 8192, 16, 32)
    config = LlamaConfig(
        vocab_size=1024 if small else 32_000,
        **dict(
            zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True)
        ),
        **{"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16 if CUDA else torch.float32).save_pretrained(folder)
    return str(folder)


def make_rows(small):
    length = 20 if small else 400
    prompt = " ".join(f"w{i % 500}" for i in range(length))
    long, short = " " + " ".join(f"w{i}" for i in range(40)), " w1 w2 w3"
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": (long, short)[i % 2], "rejected": (short, long)[i % 2], "user_id": i % 2}
            for i in range(64)
        ]
    )


def run(model, rows, folder, personalized, trainer_kwargs=None, **settings):
    args = (PersonalizedDPOConfig if personalized else DPOConfig)(
        str(folder),
        **{
            "max_steps": 8, "per_device_train_batch_size": 4, "bf16": CUDA, "use_cpu": not CUDA, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-4,
            "model_init_kwargs": {"dtype": "bfloat16" if CUDA else "float32"},
        } | settings,
    )  # fmt: skip
    trainer_class = PersonalizedDPOTrainer if personalized else DPOTrainer
    trainer = trainer_class(
        model, args=args, train_dataset=rows, peft_config=LoraConfig(**LORA), **(trainer_kwargs or {})
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train()
    if CUDA:
        torch.cuda.synchronize()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "seconds_per_step": (time.perf_counter() - start) / args.max_steps,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "losses": losses,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    small = parser.parse_args().small
    results = {
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "torch", "bitsandbytes")},
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
    }
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        model, rows = make_model(root / "model", small), make_rows(small)
        results["bf16_lora_trl"] = run(model, rows, root / "a", personalized=False)
        results["bf16_lora"] = run(model, rows, root / "b", personalized=True)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        qlora = {"quantization_config": quantization}
        optim = "paged_adamw_8bit" if CUDA else "adamw_torch"
        results["4bit_paged"] = run(model, rows, root / "c", personalized=True, trainer_kwargs=qlora, optim=optim)
        if CUDA:
            results["compiled"] = run(model, rows, root / "d", personalized=True, torch_compile=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

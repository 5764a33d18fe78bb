"""
Shapes of GPT-J 6B and Llama 8B with random weights on one GPU: training against `trl.DPOTrainer`, and text for 64 users.

    python benchmarks/gpu.py [--small]

Training is LoRA on bfloat16 and 4-bit weights. Each contestant has a process of its own, for its peak memory. The files of
results are written after every measurement, so that a run that is stopped leaves what it has. `--small` uses tiny shapes and,
without a GPU, the CPU: to test the script. See gpu.sh.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from generate import contestants
from measure import (
    CUDA,
    SMALL_CONFIGS,
    interleaved,
    make_preferences,
    make_table,
    make_tokenizer,
    median_interval,
    optimizer_step,
    peak_memory,
    ratios,
    seconds,
    use_one_thread,
    write_results,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTJConfig, LlamaConfig, set_seed
from trl import DPOConfig, DPOTrainer

from trl_personal import (
    LowRankUserModel,
    LowRankUserModelConfig,
    PersonalizedDPOConfig,
    PersonalizedDPOTrainer,
    UserVocab,
    attach_user_model,
)


DTYPE = torch.bfloat16 if CUDA else torch.float32
SHAPES = {
    "gptj": GPTJConfig(vocab_size=50_400, bos_token_id=1, eos_token_id=2, pad_token_id=0),  # the defaults are 6B
    "llama": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
}  # fmt: skip


def write_model(family, small, folder):
    """Random weights and a tokenizer in `folder`; the number of weights."""
    set_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        model = AutoModelForCausalLM.from_config((SMALL_CONFIGS if small else SHAPES)[family], dtype=DTYPE)
    model.save_pretrained(folder)
    make_tokenizer(small).save_pretrained(folder)
    return model.num_parameters()


def train_steps(
    folder, personalized, four_bit, prompt_tokens, response_tokens, num_pairs, checkpointing, rounds, small
):
    """Seconds of `rounds` steps, after two that do not count."""
    args = (PersonalizedDPOConfig if personalized else DPOConfig)(
        str(Path(folder) / "out"), per_device_train_batch_size=num_pairs, activation_checkpointing=checkpointing,
        bf16=CUDA, use_cpu=not CUDA, report_to="none", model_init_kwargs={"dtype": DTYPE}, max_length=None,
    )  # fmt: skip
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)
    trainer = (PersonalizedDPOTrainer if personalized else DPOTrainer)(
        folder,
        args=args,
        train_dataset=make_preferences(num_pairs, prompt_tokens, response_tokens, num_pairs, small),
        quantization_config=quantization if four_bit else None,
        peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    )
    batch = next(iter(trainer.get_train_dataloader()))  # on the device already
    step = optimizer_step(trainer, batch)
    return [seconds(step) for _ in range(rounds + 2)][2:]


def matmul_rate(size):
    """FLOP a second of a large matrix product: what this machine reaches."""
    a, b = (torch.randn(size, size, dtype=DTYPE, device="cuda" if CUDA else "cpu") for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def train(family, folder, num_weights, rate, four_bit, checkpointing, sizes, rounds, small):
    """Rows for TRL and for ours. FLOP counts the work of TRL's step for both: reference, policy, gradient of activations."""
    prompt_tokens, response_tokens, num_pairs = sizes
    flop = 6 * num_weights * 2 * num_pairs * (prompt_tokens + response_tokens)
    rows = []
    for name, personalized in (("trl", False), ("users", True)):
        arguments = (folder, personalized, four_bit, *sizes, checkpointing, rounds, small)
        times, peak = peak_memory(train_steps, *arguments)
        middle, low, high = median_interval(times)
        rows.append(
            {
                "family": family, "weights": "4-bit" if four_bit else str(DTYPE).removeprefix("torch."),
                "checkpointing": checkpointing, "prompt+response": f"{prompt_tokens}+{response_tokens}",
                "trainer": name, "seconds": middle, "low": low, "high": high, "peak_bytes": peak,
                "fraction_of_matmul": flop / middle / rate,
            }
        )  # fmt: skip
        rows[-1]["time / trl"] = middle / rows[0]["seconds"]
        rows[-1]["memory / trl"] = peak / rows[0]["peak_bytes"]
    return rows


def generate(family, folder, num_users, tokens, rounds):
    """A batch of different users against the plain model on the same batch."""
    plain, model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, device_map="cuda" if CUDA else "cpu").eval()
        for _ in range(2)
    )
    width = model.get_input_embeddings().embedding_dim
    user_model = LowRankUserModel(LowRankUserModelConfig(num_users, 10, width))
    attach_user_model(model, user_model, UserVocab(range(num_users)))
    functions = contestants(plain, model, num_users, *tokens)
    both = {name: function for name, function in functions.items() if name.endswith("batched")}
    rows = ratios(interleaved(both, rounds), baseline="plain, batched")
    return [{"family": family, "users": num_users, **row} for row in rows]


def shown(rows):
    return [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes: to test the script")
    parser.add_argument("--families", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--weights", nargs="+", choices=["bf16", "4-bit"], default=["bf16", "4-bit"])
    parser.add_argument("--no_generation", dest="generation", action="store_false", help="training only")
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/gpu")
    options = parser.parse_args()
    use_one_thread()
    lengths = [(12, 4, 2)] if options.small else [(400, 40, 4), (60, 300, 4)]  # prompt, response, pairs
    num_users, tokens = (4, (6, 4)) if options.small else (64, (100, 128))
    results = {"matmul_flop_per_second": matmul_rate(256 if options.small else 8192), "training": [], "ratios": []}

    def keep(part, rows):
        results[part] += rows
        parts = {"Training": results["training"], "Generation": results["ratios"]}
        tables = [make_table(shown(rows), title) for title, rows in parts.items() if rows]
        write_results(options.output, results, tables)

    for family in options.families:
        with tempfile.TemporaryDirectory() as folder:
            num_weights = write_model(family, options.small, folder)
            torch.cuda.empty_cache()
            if options.generation:
                keep("ratios", generate(family, folder, num_users, tokens, options.rounds))
                torch.cuda.empty_cache()
            for weights in options.weights:
                for checkpointing in options.checkpointing:
                    for sizes in lengths:
                        setting = (weights == "4-bit", checkpointing == "on", sizes, options.rounds, options.small)
                        rate = results["matmul_flop_per_second"]
                        keep("training", train(family, folder, num_weights, rate, *setting))


if __name__ == "__main__":
    main()

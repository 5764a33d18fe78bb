"""
Do users learn with nothing set but the language model's rate? Six users who conflict on style, 100 pairs each, three epochs.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py [--seeds 42 1 2] [--families gptj llama] [--kinds individual]

A small model of each family is warmed up as in `examples/tulu_style.py`; then `PersonalizedDPOTrainer` gets the rows, the kind
and the rate. Accuracies are of held-out pairs. "moved" is how far users' soft prompts are from the generic one, in standard
deviations of the token embeddings.
"""

import argparse
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from measure import make_table, use_one_thread, write_results
from peft import LoraConfig
from rich.progress import track
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM, set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tulu_style

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import make_style_preferences
from trl_personal.data.psoups import STYLES, opposite_style
from trl_personal.evaluation import evaluate_trainer


MAX_LENGTH = 128  # the small models have no more positions
CPU = {
    **{"use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False},
    **{"disable_tqdm": True, "logging_strategy": "no", "report_to": "none"},
}
KINDS = ["individual", "cluster", "low_rank"]


def small_gptj(config):
    """A GPT-J of the shape that `tulu_style` gives its Llama."""
    shape = {"n_embd": config.hidden_size, "n_layer": config.num_hidden_layers, "n_head": config.num_attention_heads}
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=config.vocab_size, n_positions=config.max_position_embeddings, rotary_dim=16, **shape,
            tie_word_embeddings=True, initializer_range=config.initializer_range, bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    )  # fmt: skip


def warm_up(family, dataset, folder, seed, sft_steps):
    """Folder of a small model that can answer in every style."""
    make = {"llama": tulu_style.LlamaForCausalLM, "gptj": small_gptj}[family]
    args = PersonalizedDPOConfig(folder, max_length=MAX_LENGTH, seed=seed, save_strategy="no", **CPU)
    before, tulu_style.LlamaForCausalLM = tulu_style.LlamaForCausalLM, make
    try:
        return tulu_style.warm_up(dataset, Namespace(sft_steps=sft_steps), args)
    finally:
        tulu_style.LlamaForCausalLM = before


def train(model, dataset, folder, kind, rate, lora, seed, **settings):
    """Train with the defaults; accuracies on held-out pairs, and how far users moved."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = PersonalizedDPOConfig(
        folder, user_model_kind=kind, learning_rate=rate, seed=seed, max_length=MAX_LENGTH, save_strategy="no",
        per_device_eval_batch_size=32, **CPU, **settings,
    )  # fmt: skip
    trainer = PersonalizedDPOTrainer(
        model,
        args=args,
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    std = trainer.model.get_input_embeddings().weight.std().item()
    trainer.train()
    opposite = {user: opposite_style(user) for user in dataset["train"].unique("user_id")}
    report = evaluate_trainer(trainer, dataset["test"], opposite_users=opposite).report
    users = report.groups["known"]
    with torch.no_grad():
        prompts = trainer.user_model(torch.arange(len(opposite) + 1))
    moved = (prompts[1:] - prompts[0]).pow(2).mean(dim=(1, 2)).sqrt() / std
    return {
        "own": users.accuracy["own"].value,
        "worst": report.worst_user["own"],
        "generic": users.accuracy["generic"].value,
        "opposite": users.accuracy["opposite"].value,
        "moved": moved.mean().item(),
    }


def draw(rows, axes):
    """Own accuracy of every run by kind, its rate as the colour."""
    for number, rate in enumerate(sorted({row["rate"] for row in rows})):
        here = [row for row in rows if row["rate"] == rate]
        at = [KINDS.index(row["kind"]) + 0.2 * (number - 1) for row in here]
        axes.scatter(at, [row["own"] for row in here], s=12, label=f"learning_rate {rate:g}")
    axes.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylim=(0.4, 1.02), ylabel="accuracy on own held-out pairs")
    axes.legend(loc="lower right")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--families", nargs="+", default=["gptj", "llama"], choices=["gptj", "llama"])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--tunings", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--user_learning_rate", type=float, help="instead of the default")
    parser.add_argument("--soft_prompt_init_text", metavar="TEXT", help="start from a text")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each user")
    parser.add_argument("--sft_steps", type=int, default=500)
    parser.add_argument("--output", default="benchmarks/results/defaults", help="path of the results, without ending")
    arguments = parser.parse_args(argv)
    use_one_thread()
    settings = {}
    if arguments.user_learning_rate is not None:
        settings["user_learning_rate"] = arguments.user_learning_rate
    if arguments.soft_prompt_init_text is not None:
        settings |= {"soft_prompt_init": "text", "soft_prompt_init_text": arguments.soft_prompt_init_text}
    combinations = [
        (family, seed, kind, tuning, rate)
        for seed in arguments.seeds
        for family in arguments.families
        for kind in arguments.kinds
        for tuning in arguments.tunings
        for rate in arguments.rates
    ]
    rows, models = [], {}
    root, run = Path(tempfile.gettempdir()) / "trl_personal_defaults", tempfile.mkdtemp()
    for family, seed, kind, tuning, rate in track(combinations, description="runs"):
        set_seed(seed)
        dataset = make_style_preferences(train_prompts=arguments.pairs, seed=seed)
        if (family, seed) not in models:
            folder = root / f"{family}-{seed}-{arguments.sft_steps}"
            known = folder / "warmed_up"
            with_styles = make_style_preferences(seed=seed)["train"]
            with_styles = with_styles.map(lambda row: {"preference": STYLES[row["user_id"]]})
            models[family, seed] = (
                str(known)
                if (known / "model.safetensors").is_file()
                else warm_up(family, with_styles, str(folder), seed, arguments.sft_steps)
            )
        found = train(models[family, seed], dataset, run, kind, rate, tuning == "lora", seed, **settings)
        rows.append({"family": family, "tuning": tuning, "kind": kind, "rate": rate, "seed": seed, **found})
        cells = [{k: f"{v:.3f}" if k in found else str(v) for k, v in row.items()} for row in rows]
        if len(rows) == len(combinations) or len(rows) % 6 == 0:
            write_results(arguments.output, {"runs": rows}, make_table(cells, "Defaults"), partial(draw, rows))


if __name__ == "__main__":
    main()

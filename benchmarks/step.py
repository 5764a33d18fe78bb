"""
A step of exact P-DPO against one of `trl.DPOTrainer` on the same pairs: loss, gradient, clipping, AdamW.

    OMP_NUM_THREADS=1 python benchmarks/step.py --family llama --lengths 400x40 60x300 [--checkpointing] [--full] [--small]

Contestants: TRL's DPO; P-DPO with prompts shared where it pays (`auto`), never, and always; with a precomputed reference; with
one term a pair (`sampled`); and, if named, with prompts always shared under a plain mask (`dense`). `--memory` measures the
peak of each in a process of its own instead of the time.
"""

import argparse
import tempfile
from unittest.mock import patch

import torch
from measure import (
    interleaved,
    make_model,
    make_preferences,
    make_table,
    make_tokenizer,
    optimizer_step,
    peak_memory,
    ratios,
    use_one_thread,
    write_results,
)
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.training.prefix_sharing import PackedAttentionMask, packed_attention_mask


NUM_USERS = 4
CONTESTANTS = {
    "TRL": None,
    "auto": {},
    "never": {"share_prefix": "never"},
    "always": {"share_prefix": "always"},
    "precomputed": {"precompute_ref_log_probs": True},
    "sampled": {"generic_term": "sampled"},
    "dense": {"share_prefix": "always"},
}
DEFAULT = [name for name in CONTESTANTS if name != "dense"]


def make_step(name, arguments, lengths):
    prompt_tokens, response_tokens = lengths
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": arguments.pairs,
        "gradient_checkpointing": arguments.checkpointing,
        "max_length": None,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }
    small, options = arguments.small, CONTESTANTS[name]
    inputs = {
        "model": make_model(arguments.family, small),
        "train_dataset": make_preferences(arguments.pairs, prompt_tokens, response_tokens, NUM_USERS, small),
        "processing_class": make_tokenizer(small),
        "peft_config": None if arguments.full else LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    }
    if options is None:
        trainer = DPOTrainer(args=DPOConfig(**settings), **inputs)
    else:
        trainer = PersonalizedDPOTrainer(args=PersonalizedDPOConfig(**settings, **options), **inputs)
    step = optimizer_step(trainer, next(iter(trainer.get_train_dataloader())))
    return with_dense_masks(step) if name == "dense" else step


def with_dense_masks(step):
    """The same step with the plain mask of packed rows in place of the one that attention computes in blocks."""

    def dense(branches, position_ids, num_rejected, row_length, window=None):
        return packed_attention_mask(branches, position_ids, window)

    def dense_step():
        with patch.object(PackedAttentionMask, "make", dense):
            step()

    return dense_step


def take_steps(name, arguments, lengths):
    step = make_step(name, arguments, lengths)
    step()
    step()


def measure_time(arguments, lengths):
    steps = {name: make_step(name, arguments, lengths) for name in arguments.contestants}
    return ratios(interleaved(steps, arguments.rounds), arguments.baseline)


def measure_memory(arguments, lengths):
    peaks = {name: peak_memory(take_steps, name, arguments, lengths)[1] for name in arguments.contestants}
    baseline = arguments.baseline
    return [{"name": n, "bytes": b, "baseline": baseline, "ratio": b / peaks[baseline]} for n, b in peaks.items()]


def draw(axes, cells):
    names = [row["name"] for row in cells[0]["ratios"]]
    for number, cell in enumerate(cells):
        positions = [i + 0.8 * number / len(cells) for i in range(len(names))]
        label = "prompt {}, response {}".format(*cell["lengths"])
        axes.bar(positions, [row["ratio"] for row in cell["ratios"]], width=0.8 / len(cells), label=label)
    axes.set_xticks([i + 0.4 for i in range(len(names))], names)
    axes.axhline(1, color="black", linewidth=0.8)
    baseline = cells[0]["ratios"][0]["baseline"]
    axes.set_ylabel(f"relative to {'trl.DPOTrainer' if baseline == 'TRL' else baseline}")
    axes.legend(frameon=False, fontsize=8)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["llama", "gptj"], default="llama")
    parser.add_argument("--lengths", nargs="+", default=["400x40", "60x300"], help="tokens of prompt x response")
    parser.add_argument("--pairs", type=int, default=2, help="in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", default=DEFAULT, choices=list(CONTESTANTS))
    parser.add_argument("--baseline", default="TRL", choices=list(CONTESTANTS), help="the contestant that counts as 1")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--full", action="store_true", help="all weights, without LoRA")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--small", action="store_true", help="tiny, to test this script")
    parser.add_argument("--output", help="path of the results, without ending")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    use_one_thread()
    cells = []
    for text in arguments.lengths:
        lengths = tuple(int(n) for n in text.split("x"))
        rows = (measure_memory if arguments.memory else measure_time)(arguments, lengths)
        cells.append({"lengths": lengths, "ratios": rows})
    lines = [
        {
            "prompt x response": "{} x {}".format(*cell["lengths"]),
            "": row["name"],
            **({"MB": f"{row['bytes'] / 1e6:.0f}"} if arguments.memory else {"seconds": f"{row['seconds']:.2f}"}),
            f"relative to {arguments.baseline}": f"{row['ratio']:.2f}"
            + (f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""),
        }
        for cell in cells
        for row in cell["ratios"]
    ]
    kind = ["memory" if arguments.memory else "step", arguments.family, "full" if arguments.full else "lora"]
    kind += ["checkpointing"] if arguments.checkpointing else []
    title = f"{' '.join(kind)}, {arguments.pairs} pairs"
    stem = arguments.output or f"benchmarks/results/{'_'.join(kind)}"
    write_results(
        stem, {"settings": vars(arguments), "cells": cells}, make_table(lines, title), lambda a: draw(a, cells)
    )


if __name__ == "__main__":
    main()

"""
What users cost, from 10 to a million: time of a step, memory, size of the files, time to save and to load.

    OMP_NUM_THREADS=1 python benchmarks/users.py [--small]

The step is a whole one (loss, gradient, clipping, AdamW) with LoRA on a Llama of 30M weights; memory and files are those of a
user model for a language model of width 4,096. A table beyond 2 GB is left out, with its size.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from measure import (
    interleaved,
    make_model,
    make_preferences,
    make_table,
    make_tokenizer,
    optimizer_step,
    peak_memory,
    process_memory,
    ratios,
    use_one_thread,
    write_results,
)
from peft import LoraConfig

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer, UserModel, UserVocab
from trl_personal.models.loading import load_user_model
from trl_personal.user_models import get_user_model_class
from trl_personal.user_models.memory import training_bytes


COUNTS = {"low_rank": [10, 10_000, 1_000_000], "cluster": [10, 1_000_000], "individual": [10, 1_000, 1_000_000]}
SMALL_COUNTS = {"low_rank": [10, 1_000], "cluster": [10], "individual": [10, 1_000_000]}
NUM_VIRTUAL_TOKENS, TOKEN_DIM, MOST_BYTES = 10, 4096, 2e9


def user_ids(num_users):
    return (str(i) for i in range(num_users))


def make_config(kind, num_users, token_dim):
    config_class = get_user_model_class(kind).config_class
    options = {"user_rank": 32} if kind == "low_rank" else {"num_clusters": 10} if kind == "cluster" else {}
    return config_class(num_users, NUM_VIRTUAL_TOKENS, token_dim, **options)


def make_step(kind, num_users, small, num_pairs, folder):
    args = PersonalizedDPOConfig(
        folder, user_model_kind=kind, per_device_train_batch_size=num_pairs, activation_checkpointing=False, bf16=False,
        use_cpu=not torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    trainer = PersonalizedDPOTrainer(
        make_model("llama", small),
        args=args,
        train_dataset=make_preferences(num_pairs, 60, 40, num_users, small),
        processing_class=make_tokenizer(small),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        user_vocab=UserVocab(user_ids(num_users)),
    )
    return optimizer_step(trainer, next(iter(trainer.get_train_dataloader())))


def train_table(kind, num_users, token_dim):
    """Bytes of weights, gradients and optimizer state after two steps of AdamW on a table alone."""
    config = make_config(kind, num_users, token_dim)
    idle = process_memory("VmRSS")
    user_model = get_user_model_class(kind)(config)
    optimizer = torch.optim.AdamW(user_model.parameters(), weight_decay=0.0, fused=True)
    for _ in range(2):
        user_model(torch.tensor([1, min(2, num_users)])).square().sum().backward()
        optimizer.step()
    return process_memory("VmRSS") - idle


def clock(function):
    start, start_cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, time.perf_counter() - start, time.process_time() - start_cpu


def save_and_load(kind, num_users, token_dim, folder):
    """Seconds (wall and CPU) to write and to read the three files of a user model and its vocabulary, and their bytes."""
    user_model = get_user_model_class(kind)(make_config(kind, num_users, token_dim))
    vocab = UserVocab(user_ids(num_users))

    def save():
        vocab.save_pretrained(folder)
        user_model.save_files(folder)

    _, save_seconds, save_cpu = clock(save)
    (loaded, loaded_vocab, _), load_seconds, load_cpu = clock(lambda: load_user_model(Path(folder)))
    assert isinstance(loaded, UserModel)
    assert loaded_vocab == vocab
    return {
        "file_bytes": sum(path.stat().st_size for path in Path(folder).iterdir()),
        "save_seconds": save_seconds,
        "save_cpu_seconds": save_cpu,
        "load_seconds": load_seconds,
        "load_cpu_seconds": load_cpu,
    }


def describe(kind, num_users, token_dim):
    needed = training_bytes(get_user_model_class(kind), make_config(kind, num_users, token_dim))
    row = {"kind": kind, "num_users": num_users, "training_bytes": needed}
    if needed > MOST_BYTES:
        return row
    row["resident_bytes"], row["peak_bytes"] = peak_memory(train_table, kind, num_users, token_dim)
    with tempfile.TemporaryDirectory() as folder:
        return row | save_and_load(kind, num_users, token_dim, folder)


def time_steps(counts, small, num_pairs, rounds, root):
    """Each kind's steps take turns; ratios are to 10 users of the same kind. What is beyond memory is left out."""
    steps, width = defaultdict(dict), make_model("llama", small).config.hidden_size
    rows = []
    for kind, numbers in counts.items():
        for num_users in numbers:
            if training_bytes(get_user_model_class(kind), make_config(kind, num_users, width)) <= MOST_BYTES:
                steps[kind][str(num_users)] = make_step(kind, num_users, small, num_pairs, root)
        rows += [{"kind": kind, **row} for row in ratios(interleaved(steps.pop(kind), rounds), baseline="10")]
    return rows


def cells(row, step):
    """One line of the table."""

    def size(name):
        return f"{row[name] / 1e9:.3f}" if name in row else "-"

    def duration(name):
        return f"{row[name]:.2f} ({row[name.replace('_', '_cpu_')]:.2f})" if name in row else "-"

    return {
        "kind": row["kind"],
        "users": f"{row['num_users']:,}",
        "step s": f"{step['seconds']:.2f}" if step else "-",
        "step / 10 users": f"{step['ratio']:.3f} ({step['low']:.3f} to {step['high']:.3f})" if step else "-",
        "GB in training": f"{row['training_bytes'] / 1e9:.3f}",
        "GB measured": size("resident_bytes"),
        "GB peak": size("peak_bytes"),
        "GB files": size("file_bytes"),
        "save s (CPU)": duration("save_seconds"),
        "load s (CPU)": duration("load_seconds"),
    }


def draw(axes, rows):
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        axes.plot([r["num_users"] for r in of_kind], [r["training_bytes"] / 1e9 for r in of_kind], "o-", label=kind)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="users", ylabel="GB in training")
    axes.legend(frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes: to test the script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--num_pairs", type=int, default=4, help="pairs in a batch, 60 tokens of prompt and 40 of answer"
    )
    parser.add_argument("--output", default="benchmarks/results/users")
    options = parser.parse_args()
    use_one_thread()
    counts, token_dim = (SMALL_COUNTS, 32) if options.small else (COUNTS, TOKEN_DIM)
    described = [describe(kind, n, token_dim) for kind, numbers in counts.items() for n in numbers]
    with tempfile.TemporaryDirectory() as root:
        steps = time_steps(counts, options.small, options.num_pairs, options.rounds, root)
    by_name = {(step["kind"], step["name"]): step for step in steps}
    table = make_table([cells(r, by_name.get((r["kind"], str(r["num_users"])))) for r in described], "Users")
    results = {"token_dim": token_dim, "num_pairs": options.num_pairs, "user_models": described, "steps": steps}
    write_results(options.output, results, table, lambda axes: draw(axes, described))


if __name__ == "__main__":
    main()

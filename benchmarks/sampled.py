"""
What the sampled generic term costs in quality: the length task with the exact loss, and with one term a pair, for as many
steps and for as many policy passes (twice the steps).

    OMP_NUM_THREADS=1 python benchmarks/sampled.py [--seeds 42 1 2] [--steps 150] [--sft_steps 800]

Users, posts, warm-up and settings are those of `examples/gptj_length.py`; accuracies are of held-out pairs, means over users.
"""

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from measure import make_table, use_one_thread, write_results
from transformers import AutoTokenizer, set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gptj_length import SMALL_RUN, warm_up

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import make_length_preferences
from trl_personal.evaluation import evaluate_trainer, opposite_users


def train(model, tokenizer, dataset, seed, output_dir, **settings):
    args = PersonalizedDPOConfig(
        **SMALL_RUN | {"output_dir": output_dir, "use_cpu": not torch.cuda.is_available(), "seed": seed} | settings
    )
    trainer = PersonalizedDPOTrainer(model, args=args, train_dataset=dataset["train"], processing_class=tokenizer)
    start = time.process_time()
    trainer.train()
    cpu_seconds = time.process_time() - start
    preferences = dict(zip(dataset["train"]["user_id"], dataset["train"]["preference"], strict=True))
    test = dataset["test"].filter(lambda row: row["user_id"] in preferences)
    report = evaluate_trainer(trainer, test, opposite_users=opposite_users(preferences)).report
    of_users = report.groups["known"]
    return {
        "seed": seed,
        "own": of_users.accuracy["own"].value,
        "worst": report.worst_user["own"],
        "opposite": of_users.accuracy["opposite"].value,
        "generic": of_users.accuracy["generic"].value,
        "margin": args.beta * of_users.mean_margin["own"],
        "cpu_seconds": cpu_seconds,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sft_steps", type=int, default=800)
    parser.add_argument("--output", default="benchmarks/results/sampled", help="path of the results, without ending")
    arguments = parser.parse_args(argv)
    use_one_thread()
    contestants = {
        "exact": {"max_steps": arguments.steps},
        "sampled, as many steps": {"max_steps": arguments.steps, "generic_term": "sampled"},
        "sampled, as many passes": {"max_steps": 2 * arguments.steps, "generic_term": "sampled"},
    }
    runs = []
    for seed in arguments.seeds:
        set_seed(seed)
        folder = tempfile.mkdtemp()
        dataset = make_length_preferences(seed=seed)
        args = PersonalizedDPOConfig(**SMALL_RUN | {"output_dir": folder, "use_cpu": True, "seed": seed})
        model = warm_up(dataset["train"], Namespace(sft_steps=arguments.sft_steps), args)
        tokenizer = AutoTokenizer.from_pretrained(model)
        for name, settings in contestants.items():
            runs.append({"name": name} | train(model, tokenizer, dataset, seed, f"{folder}/run", **settings))
    rows = [
        {
            "generic term": run["name"],
            **{n: str(run[n]) for n in ("seed",)},
            **{n: f"{run[n]:.3f}" for n in ("own", "worst", "opposite", "generic", "margin")},
            "CPU s": f"{run['cpu_seconds']:.0f}",
        }
        for run in runs
    ]

    def draw(axes):
        for name in contestants:
            values = [run["own"] for run in runs if run["name"] == name]
            axes.scatter([name] * len(values), values, label=name)
        axes.set_ylabel("own accuracy, held-out pairs")

    write_results(arguments.output, {"runs": runs}, make_table(rows, "Length task by generic term"), draw)


if __name__ == "__main__":
    main()

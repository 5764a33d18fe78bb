"""
A sweep over settings of users computes the reference's log-probabilities once: time of the first run and of the next ones.

    OMP_NUM_THREADS=1 python benchmarks/precompute.py [--small]

Each run makes a trainer with `precompute_ref_log_probs=True` and other settings, as a sweep does. Time is CPU time of making
it: tokenizing, the reference's pass over the data (or reading what an earlier run stored), and the user model.
"""

import argparse
import os
import tempfile


os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # so that the first run finds nothing stored

import datasets
import torch
from measure import make_model, make_preferences, make_table, make_tokenizer, seconds, use_one_thread, write_results
from peft import LoraConfig

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


SWEEP = [
    {},
    {"personalization_alpha": 0.9},
    {"num_virtual_tokens": 20},
    {"user_model_kind": "cluster"},
    {"user_model_kind": "low_rank", "learning_rate": 1e-4},
]


def make_trainer(setting, small, rows, folder, precompute=True):
    args = PersonalizedDPOConfig(
        folder, precompute_ref_log_probs=precompute, precompute_ref_batch_size=4, bf16=False, report_to="none",
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, **setting,
    )  # fmt: skip
    return PersonalizedDPOTrainer(
        make_model("llama", small),
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(small),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes: to test the script")
    parser.add_argument("--num_pairs", type=int, default=64, help="pairs, 60 tokens of prompt and 40 of answer")
    parser.add_argument("--output", default="benchmarks/results/precompute")
    options = parser.parse_args()
    use_one_thread()
    datasets.disable_progress_bars()
    rows = make_preferences(options.num_pairs, 60, 40, num_users=4, small=options.small)
    runs, stored = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the first trainer of a process is slow
            without = seconds(lambda: make_trainer({}, options.small, rows, folder, precompute=False))
        for setting in SWEEP:
            trainers = []
            taken = seconds(lambda: trainers.append(make_trainer(setting, options.small, rows, folder)))  # noqa: B023
            stored.add(tuple(trainers[0].train_dataset["ref_chosen_logps"]))
            runs.append({"setting": setting, "seconds": taken, "reference_seconds": taken - without})
    assert len(stored) == 1, "the runs have different reference log-probabilities"
    cells = [
        {
            "run": ", ".join(f"{name}={value}" for name, value in run["setting"].items()) or "defaults",
            "seconds": f"{run['seconds']:.2f}",
            "of these for the reference": f"{run['reference_seconds']:.2f}",
        }
        for run in runs
    ]
    title = f"A sweep with {options.num_pairs} pairs; a trainer without precomputed reference takes {without:.2f} s"

    def draw(axes):
        axes.bar(range(1, len(runs) + 1), [run["seconds"] for run in runs], color="#0072B2", alpha=0.6)
        axes.axhline(without, color="black", linewidth=0.8)
        axes.set(xlabel="run of the sweep", ylabel="CPU seconds to make the trainer", title="line: no reference")

    results = {"num_pairs": options.num_pairs, "without_reference_seconds": without, "runs": runs}
    write_results(options.output, results, make_table(cells, title), draw)


if __name__ == "__main__":
    main()

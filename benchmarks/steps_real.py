"""
Accuracy, answers and fluency against steps, on a real model: each checkpoint of `examples/real_users.py` evaluated.

    python examples/get_smollm2.py smollm2
    python examples/real_users.py --model_name_or_path smollm2 --output_dir out --save_strategy steps --save_steps 8
    OMP_NUM_THREADS=1 python benchmarks/steps_real.py out

Nats per token are those of greedy answers under the model before training, which is told the user's wish, less those of its
own answers to the same.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from datasets import load_dataset
from measure import make_table, use_one_thread, write_results


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import real_users

from trl_personal.evaluation import evaluate_model


MEASURES = {
    "pairs": ("own", "worst", "opposite"),
    "words": ("words of ann", "words of bo"),
    "share of lists": ("lists of cy", "lists of di"),
    "nats minus base's": ("nats", "nats of worst"),
    "distinct 2-grams": ("distinct_2", "distinct_2 of base"),
}


def evaluate(checkpoint, test, num_prompts, max_new_tokens):
    found = evaluate_model(
        str(checkpoint), test, opposite_column="side", wish_column="wish", num_generate=num_prompts,
        generate_kwargs={"max_new_tokens": max_new_tokens, "do_sample": False}, batch_size=8, disable_tqdm=True,
    )  # fmt: skip
    accuracy, users = found.report.groups["known"].accuracy, {row.user_id: row for row in found.answers_report.users}
    samples = found.to_dict()["samples"]
    nats = [user.minus_base["nats_per_token"].value for user in users.values()]
    return {
        **{"own": accuracy["own"].value, "worst": found.report.worst_user["own"]},
        "opposite": accuracy["opposite"].value,
        **{f"words of {user}": users[user].means["words"].value for user in ("ann", "bo")},
        **{
            f"lists of {user}": real_users.share_of_lists([sample["answers"][user] for sample in samples]).value
            for user in ("cy", "di")
        },
        **{"nats": mean(nats), "nats of worst": max(nats)},
        "distinct_2": min(user.distinct_2 for user in users.values()),
        "distinct_2 of base": found.answers_report.base.distinct_2,
        "empty": max(user.means["empty"].value for user in users.values()),
    }


def draw(axes, rows):
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(13, 3)
    for place, (title, names) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, len(MEASURES), place + 1)
        for name in names:
            style = {"marker": "o", "markersize": 3, "clip_on": False}
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, **style)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylim(bottom=min(0.0, *(row[name] for row in rows for name in names)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_prompts", type=int, default=17)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument(
        "--output", default="benchmarks/results/steps_real", help="path of the results, without ending"
    )
    arguments = parser.parse_args()
    use_one_thread()
    folder = Path(arguments.folder)
    test = load_dataset("json", data_files=str(folder / "pairs/test.jsonl"), split="train")
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    rows = []
    for step, checkpoint in sorted(found.items()):
        rows.append({"step": step, **evaluate(checkpoint, test, arguments.num_prompts, arguments.max_new_tokens)})
        write_results(
            arguments.output, {"rows": rows}, make_table(rows, "Against steps"), lambda axes: draw(axes, rows)
        )


if __name__ == "__main__":
    main()

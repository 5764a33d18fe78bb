"""
The dial of a trained model: `user_strength` against pair accuracy, length and fluency of answers.

    OMP_NUM_THREADS=1 python benchmarks/strength.py gptj_length --dataset_path gptj_length/pairs/test.jsonl \
        --ref_model gptj_length/warmed_up

OUT is what an example left; of its pairs, some for each user and some prompts are enough. The column `preference` (or another
`--group_column`) says which users are drawn together, and `wish`, or else the name of the group, what the reference policy is
told when it judges fluency.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from measure import use_one_thread, write_results
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_personal import AutoPersonalizedModelForCausalLM, UserVocab, attach_user_model, detach_user_model
from trl_personal.evaluation import answer_log_probs, answers_by_user, describe_answers, nats_per_token
from trl_personal.models.saving import get_base_model
from trl_personal.user_models import IndividualUserModel, UserModelConfig
from trl_personal.writing import Request


STRENGTHS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
MEASURES = {
    "accuracy": "pair accuracy",
    "words": "words per answer",
    "nats": "nats per token",
    "repetition": "repetition",
}


def with_strengths(model, strengths):
    """The model with a user `(user, strength)` for each user and strength; their soft prompts are e_0 + s (e_u - e_0)."""
    causal_lm = get_base_model(model)
    user_model, vocab = causal_lm.user_model, list(causal_lm.user_vocab)
    with torch.no_grad():
        prompts = user_model(torch.arange(len(vocab) + 1)).float()
    offsets = prompts[1:] - prompts[0]
    config = UserModelConfig(len(vocab) * len(strengths), *prompts.shape[1:])
    scaled = IndividualUserModel(config)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.zero_()
        scaled.generic_prompt.copy_(prompts[0])
        rows = torch.cat([strength * offsets for strength in strengths]).flatten(1)
        scaled.set_rows(list(range(1, len(rows) + 1)), {next(iter(scaled.row_tables())): rows})
    detach_user_model(model)
    attach_user_model(model, scaled, UserVocab([f"{user} {strength:g}" for strength in strengths for user in vocab]))
    return model


def curves(model, reference, tokenizer, rows, prompts, group_column, generate_kwargs):
    """For each group of users and strength a row of numbers."""
    of_user = {}
    for row in rows:
        of_user.setdefault(str(row["user_id"]), []).append(row)
    groups = {user: str(found[0].get(group_column) or "all users") for user, found in of_user.items()}
    wishes = {user: found[0].get("wish") or f"{groups[user].capitalize()}." for user, found in of_user.items()}
    names = [f"{user} {strength:g}" for strength in STRENGTHS for user in of_user]
    model = with_strengths(model, STRENGTHS)
    use_template = not isinstance(rows[0]["prompt"], str)

    def margins(scorer, name, pairs):
        requests = [Request(name, row["prompt"]) for row in pairs]
        chosen, rejected = (
            answer_log_probs(scorer, tokenizer, requests, [text_of(row[key]) for row in pairs], 16, use_template).nats
            for key in ("chosen", "rejected")
        )
        return chosen - rejected

    of_reference = {user: margins(reference, None, pairs) for user, pairs in of_user.items()}
    answers = answers_by_user(model, tokenizer, prompts, names, 32, **generate_kwargs)
    table = []
    for strength in STRENGTHS:
        for group in sorted(set(groups.values())):
            users = [user for user in of_user if groups[user] == group]
            right, found = [], []
            for user in users:
                name = f"{user} {strength:g}"
                right.append(float(np.mean(margins(model, name, of_user[user]) > of_reference[user])))
                nats = nats_per_token(reference, tokenizer, prompts, answers[name], wishes[user])
                found.append(describe_answers(answers[name], nats))
            table.append(
                {
                    **{"group": group, "strength": strength, "users": len(users), "accuracy": mean(right)},
                    "words": mean(row["mean_words"] for row in found),
                    "nats": mean(row["nats_per_token"] or 0.0 for row in found),
                    "repetition": mean(row["repetition"] for row in found),
                    "sample": answers[f"{users[0]} {strength:g}"][0],
                }
            )
    return table


def text_of(answer):
    return answer if isinstance(answer, str) else answer[-1]["content"]


def draw(axes, table):
    figure = axes.figure
    axes.remove()
    figure.set_size_inches(11, 3.2)
    groups = sorted({row["group"] for row in table})
    for place, (measure, title) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, len(MEASURES), place + 1)
        for group in groups:
            rows = [row for row in table if row["group"] == group]
            axes.plot([r["strength"] for r in rows], [r[measure] for r in rows], marker="o", markersize=3, label=group)
        axes.axvspan(0, 1, color="gray", alpha=0.1, linewidth=0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("user_strength", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups), frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset_path", required=True, help="held-out pairs, JSON lines")
    parser.add_argument("--ref_model", help="what a full model was trained from; an adapter needs none")
    parser.add_argument("--group_column", default="preference")
    parser.add_argument("--num_pairs", type=int, default=30, help="pairs of each user")
    parser.add_argument("--num_prompts", type=int, default=10)
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--do_sample", action="store_true")
    parser.add_argument("--name", default="strength")
    arguments = parser.parse_args()
    use_one_thread()
    set_seed(0)
    model = AutoPersonalizedModelForCausalLM.from_pretrained(arguments.model)
    reference = AutoModelForCausalLM.from_pretrained(
        arguments.ref_model or model.peft_config["default"].base_model_name_or_path
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    known, count, rows = set(get_base_model(model).user_vocab), {}, []
    for line in Path(arguments.dataset_path).read_text().splitlines():
        row = json.loads(line)
        user = str(row["user_id"])
        count[user] = count.get(user, 0) + 1
        if user in known and count[user] <= arguments.num_pairs:
            rows.append(row)
    prompts = list({str(row["prompt"]): row["prompt"] for row in rows}.values())[: arguments.num_prompts]
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample}
    found = curves(model, reference.eval(), tokenizer, rows, prompts, arguments.group_column, options)
    table = Table(*(name for name in found[0] if name != "sample"), title=f"{arguments.model}, by user_strength")
    for row in found:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items() if k != "sample"))
    write_results(arguments.name, {"rows": found}, table, lambda axes: draw(axes, found))


if __name__ == "__main__":
    main()

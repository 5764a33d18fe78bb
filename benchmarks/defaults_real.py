"""
What the defaults do on a real model: `PersonalizedDPOTrainer` with nothing set but the data and the kind of users.

    python examples/get_smollm2.py smollm2
    OMP_NUM_THREADS=1 python benchmarks/defaults_real.py smollm2 [--questions 12] [--kinds individual cluster low_rank]

The four users of `examples/real_users.py`; TRL's defaults for all else (full tuning, learning rate 1e-6, three epochs of
batches of 8, bfloat16 autocast). Own accuracy is of held-out pairs; "moved" is how far users' soft prompts are from the
generic one, in standard deviations of the token embeddings; nats per token are of greedy answers under the model before,
which is told the wish.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from measure import make_table, use_one_thread, write_results
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import real_users

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.evaluation import answers_by_user, base_answers, evaluate_trainer, reference_policy


def train(model, kind, questions, num_prompts, seed):
    dataset = real_users.make_pairs()
    train_dataset, test = dataset["train"].select(range(4 * questions)), dataset["test"]
    wishes = dict(zip(test["user_id"], test["wish"], strict=True))
    opposite = {"ann": "bo", "bo": "ann", "cy": "di", "di": "cy"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        args = PersonalizedDPOConfig(
            folder, user_model_kind=kind, seed=seed, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = PersonalizedDPOTrainer(model, args=args, train_dataset=train_dataset, processing_class=tokenizer)
        trainer.train()
    seconds = time.process_time() - start
    prompts = list({str(prompt): prompt for prompt in test["prompt"]}.values())[:num_prompts]
    options = {"max_new_tokens": 96, "do_sample": False, "batch_size": 32}
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*wishes, None], **options)
    with reference_policy(trainer) as reference:
        base = base_answers(reference, tokenizer, prompts, wishes, **options)
    told = {"prompts": prompts, "answers": answers, "base_answers": base, "wishes": wishes}
    evaluation = evaluate_trainer(trainer, test, opposite_users=opposite, **told)
    users, accuracy = evaluation.answers_report.users, evaluation.report.groups["known"].accuracy
    with torch.no_grad():
        prompts = trainer.user_model(torch.arange(len(wishes) + 1, device=trainer.model.device)).float()
    moved = (prompts[1:] - prompts[0]).pow(2).mean(dim=(1, 2)).sqrt() / trainer.embedding_std
    return {
        **{"own": accuracy["own"].value, "worst": evaluation.report.worst_user["own"]},
        **{"generic": accuracy["generic"].value, "opposite": accuracy["opposite"].value},
        "moved": moved.mean().item(),
        **{f"words_{user.user_id}": user.means["words"].value for user in users},
        "nats": mean(user.means["nats_per_token"].value for user in users),
        "nats_minus_base": mean(user.minus_base["nats_per_token"].value for user in users),
        "distinct_2": mean(user.distinct_2 or 0.0 for user in users),
        "cpu_seconds": seconds,
    }


def draw(rows, axes):
    places = range(len(rows))
    axes.bar([p - 0.2 for p in places], [row["own"] for row in rows], width=0.35, label="own accuracy")
    axes.bar([p + 0.2 for p in places], [row["moved"] for row in rows], width=0.35, label="moved (std)")
    axes.set(xticks=list(places), xticklabels=[row["kind"] for row in rows])
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", default=["individual", "cluster", "low_rank"])
    parser.add_argument("--questions", type=int, default=24, help="questions to train on, at most 24")
    parser.add_argument("--num_prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--output", default="benchmarks/results/defaults_real", help="path of the results, without ending"
    )
    arguments = parser.parse_args()
    use_one_thread()
    rows = []
    for kind in arguments.kinds:
        found = train(arguments.model, kind, arguments.questions, arguments.num_prompts, arguments.seed)
        rows.append({"kind": kind, **found})
        write_results(
            arguments.output,
            {"runs": rows},
            make_table(rows, "Defaults on a real model"),
            lambda axes: draw(rows, axes),
        )


if __name__ == "__main__":
    main()

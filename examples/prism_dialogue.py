"""
Dialogues with people who say something about themselves: a profile in the prompt, and a soft prompt from ten clusters.

A small Llama from scratch on made-up dialogues; nothing to download, minutes on two CPU cores:

    accelerate launch examples/prism_dialogue.py

The paper's run (Llama-3 8B, PRISM, LoRA) through the Hub, here with 4-bit weights:

    accelerate launch examples/prism_dialogue.py --config examples/configs/prism_dialogue.yaml --load_in_4bit

The small Llama on your own rows: a folder with `survey.jsonl` and `conversations.jsonl` as PRISM has them:

    accelerate launch examples/prism_dialogue.py --dataset_path folder --test_size 0.2 --max_length 512

Each run trains P-DPO, then vanilla DPO with the same budget, and leaves the model, `results.json` and a picture of accuracies.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer, render_user_profile
from trl_personal.data import load_prism, make_dialogue_preferences
from trl_personal.evaluation import answers_by_user, evaluate_trainer
from trl_personal.evaluation.plots import plot_report
from trl_personal.evaluation.run_files import next_commands, write_pairs, write_results
from trl_personal.terminal import print_whole
from trl_personal.training.progress import quiet_libraries, with_progress


SMALL_RUN = {  # unless the command line or `--config` says otherwise
    "output_dir": "prism_dialogue",
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "max_steps": 60,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-4,
    "beta": 0.5,
    "loss_type": ["sigmoid", "sft"],  # a small model forgets how to write without the second
    "max_length": 192,
    "save_strategy": "no",
    **{"user_model_kind": "cluster", "num_clusters": 10, "user_profile_column": "user_profile"},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}{% if message.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass
class ScriptArguments:
    dataset_path: str | None = field(default=None, metadata={"help": "PRISM: a folder, or a set on the Hub."})
    test_size: float = field(default=0.1, metadata={"help": "Share of opening prompts to test on."})
    sft_steps: int = field(default=300, metadata={"help": "Warm-up steps of the small model."})
    num_prompts: int = field(default=8, metadata={"help": "Unseen dialogues that six users get an answer to."})
    max_new_tokens: int = field(default=60, metadata={"help": "Longest answer."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the likeliest tokens to sample from."})


def warm_up(dataset, script_args, training_args):
    """
    Folder of a small Llama and its tokenizer, which can answer in every way that somebody chose. Half of the dialogues come
    with the profile of who chose: large models know from pretraining how to read one. Nothing here has a user id.
    """
    rows = []
    for row in dataset:
        profiled = render_user_profile(row["prompt"], row["user_profile"], training_args.user_profile_template)
        rows += [{"prompt": prompt, "completion": row["chosen"]} for prompt in (row["prompt"], profiled)]
    texts = (message["content"] for row in rows for message in row["prompt"] + row["completion"])
    tokenizer = GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 4096, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * training_args.max_length + training_args.num_virtual_tokens,  # profiles too
        **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"tie_word_embeddings": True, "initializer_range": 0.08},  # the range for this width
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    same = ("bf16", "gradient_checkpointing", "max_length", "save_strategy", "seed")
    options = {name: getattr(training_args, name) for name in same} | {"learning_rate": 5e-3, "warmup_steps": 20}
    args = SFTConfig(f"{training_args.output_dir}/warmed_up", max_steps=script_args.sft_steps, **options)
    inputs = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = with_progress(SFTTrainer(LlamaForCausalLM(config), args, **inputs), "warming up the small model")
    trainer.train()
    trainer.save_model()
    return args.output_dir


def main(script_args, training_args, model_args):
    start, output_dir = time.time(), Path(training_args.output_dir)
    path, size, seed = script_args.dataset_path, script_args.test_size, training_args.seed
    set_seed(seed)
    dataset = load_prism(path, test_size=size) if path else make_dialogue_preferences(seed=seed)
    train, test, unknown = (dataset[split] for split in ("train", "test", "test_unknown_users"))
    write_pairs(dataset, output_dir)
    test = test.filter(lambda row, known=frozenset(train["user_id"]): row["user_id"] in known)
    users = list(dict.fromkeys(test["user_id"]))
    model = model_args.model_name_or_path or warm_up(train, script_args, training_args)
    tokenizer = AutoTokenizer.from_pretrained(model)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    inputs = {"train_dataset": train, "processing_class": tokenizer}
    inputs |= {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    trainer = with_progress(PersonalizedDPOTrainer(model, args=training_args, **inputs), "P-DPO")
    trainer.train()
    trainer.save_model()
    prompts = [row["prompt"] for row in test.shuffle(seed) if row["turn"] == 0][: script_args.num_prompts]
    options = {name: getattr(script_args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    options |= {"do_sample": True, "user_profiles": dict(zip(test["user_id"], test["user_profile"], strict=True))}
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*users[:6], None], **options)

    vanilla_args = copy.copy(training_args)
    vanilla_args.user_model_kind, vanilla_args.output_dir = "none", f"{output_dir}/vanilla"
    vanilla_trainer = with_progress(PersonalizedDPOTrainer(model, args=vanilla_args, **inputs), "vanilla DPO")
    vanilla_trainer.train()
    vanilla_trainer.save_model()

    column = "preference" if "preference" in test.column_names else None
    controls = {"vanilla": vanilla_trainer, "preference_column": column}
    evaluation = evaluate_trainer(trainer, test, **controls, prompts=prompts, answers=answers)
    accuracy = evaluate_trainer(trainer, unknown).report.groups["unknown"].accuracy  # only their profiles are known
    unknown_users = {"with_profile": accuracy["own"].value, "without": accuracy["generic"].value}
    if not trainer.is_world_process_zero():
        return
    seconds = round(time.time() - start, 1)
    numbers = {"unknown_users": unknown_users, "seed": seed, "wall_seconds": seconds}
    write_results(output_dir / "results.json", evaluation, **numbers)
    plot_report(output_dir / "accuracy_by_user.png", evaluation.report)
    print_whole(evaluation.users_table(), "Swapped: the soft prompt and the profile of another user.")
    print_whole("Unknown users:", unknown_users, evaluation.answers_table(0, [*users[:3], None]))
    print_whole(evaluation.report.verdict)
    print_whole(f"{output_dir}/results.json and accuracy_by_user.png after {seconds:.0f} s. Go on with:\n")
    print(next_commands(output_dir, users[:2], prompts[0], ref_model=model, opposite_column=column))


if __name__ == "__main__":
    quiet_libraries()
    parser = TrlParser((ScriptArguments, PersonalizedDPOConfig, ModelConfig))
    parser.set_defaults(**SMALL_RUN)
    main(*parser.parse_args_and_config())

"""
Six users of three style dimensions who conflict in pairs: plain or expert, short or detailed, friendly or unfriendly.

A small Llama from scratch on made-up questions; nothing to download, minutes on two CPU cores:

    accelerate launch examples/tulu_style.py

The paper's run (Tulu 7B, Personalized Soups, LoRA) through the Hub, here with 4-bit weights:

    accelerate launch examples/tulu_style.py --config examples/configs/tulu_style.yaml --load_in_4bit

The small Llama on your own rows, in the schema of the paper's `allcombo_8_cleaned.json`; texts are longer there:

    accelerate launch examples/tulu_style.py --dataset_path rows.json --test_size 0.2 --max_length 512

Each run trains P-DPO, then vanilla DPO with the same budget, and leaves the personalized model, `results.json` and a picture.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import load_psoups, make_style_preferences
from trl_personal.data.psoups import STYLES, opposite_style
from trl_personal.evaluation import answers_by_user, evaluate_trainer
from trl_personal.evaluation.plots import plot_report
from trl_personal.evaluation.run_files import next_commands, write_pairs, write_results
from trl_personal.terminal import print_whole
from trl_personal.training.progress import quiet_libraries, with_progress


SMALL_RUN = {  # unless the command line or `--config` says otherwise
    "output_dir": "tulu_style",
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "max_steps": 80,
    "per_device_eval_batch_size": 30,
    "learning_rate": 1e-4,
    "beta": 0.5,
    "loss_type": ["sigmoid", "sft"],  # a small model forgets how to write without the second
    "max_length": 128,
    "save_strategy": "no",
}


@dataclass
class ScriptArguments:
    dataset_path: str | None = field(
        default=None, metadata={"help": "Personalized Soups: a file, or a set on the Hub."}
    )
    prompt_template: str = field(default="{prompt}\n", metadata={"help": "How prompts of `dataset_path` read."})
    test_size: float | None = field(
        default=None, metadata={"help": "Share of prompts to test on, if there is no split."}
    )
    sft_steps: int = field(default=500, metadata={"help": "Warm-up steps of the small model."})
    num_prompts: int = field(default=10, metadata={"help": "Unseen questions that every user gets an answer to."})
    max_new_tokens: int = field(default=60, metadata={"help": "Longest answer."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the likeliest tokens to sample answers from."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "On tokens of the question and the answer."})
    no_repeat_ngram_size: int = field(default=0, metadata={"help": "No n-gram of this size comes twice; 0 for any."})


def warm_up(dataset, script_args, training_args):
    """
    Folder of a small Llama and its tokenizer, which can answer in every style. Half of the questions come with a word on the
    style in front: large models know such words from pretraining. Nothing here tells users apart.
    """
    rows = []
    for row in dataset:
        prompts = (row["prompt"], f"{row['preference'].capitalize()}. {row['prompt']}")
        rows += [{"prompt": prompt, "completion": row["chosen"]} for prompt in prompts]
    texts = (row["prompt"] + row["completion"] for row in rows)
    tokenizer = GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 4096, show_progress=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=training_args.max_length + training_args.num_virtual_tokens,
        **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"tie_word_embeddings": True, "initializer_range": 0.08},  # the range for this width
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    same = ("bf16", "gradient_checkpointing", "max_length", "save_strategy", "seed")
    options = {name: getattr(training_args, name) for name in same} | {"learning_rate": 5e-3, "warmup_steps": 20}
    args = SFTConfig(f"{training_args.output_dir}/warmed_up", max_steps=script_args.sft_steps, **options)
    inputs = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = with_progress(SFTTrainer(LlamaForCausalLM(config), args=args, **inputs), "warming up the small model")
    trainer.train()
    trainer.save_model()
    return args.output_dir


def main(script_args, training_args, model_args):
    start, output_dir = time.time(), Path(training_args.output_dir)
    set_seed(training_args.seed)
    path, size, seed = script_args.dataset_path, script_args.test_size, training_args.seed
    dataset = load_psoups(path, test_size=size) if path else make_style_preferences(seed=seed)
    dataset = dataset.map(lambda row: {"preference": STYLES[row["user_id"]], "conflict": row["user_id"][:2]})
    if path:
        dataset = dataset.map(lambda row: {"prompt": script_args.prompt_template.format(prompt=row["prompt"])})
    write_pairs(dataset, output_dir)
    test, users = dataset["test"], sorted(set(dataset["train"]["user_id"]))
    model = model_args.model_name_or_path or warm_up(dataset["train"], script_args, training_args)
    tokenizer = AutoTokenizer.from_pretrained(model)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    inputs = {"train_dataset": dataset["train"], "processing_class": tokenizer}
    inputs |= {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    trainer = with_progress(PersonalizedDPOTrainer(model, args=training_args, **inputs), "P-DPO")
    trainer.train()
    trainer.save_model()
    prompts = list(dict.fromkeys(test["prompt"]))[: script_args.num_prompts]
    decoding = ("max_new_tokens", "top_p", "repetition_penalty", "no_repeat_ngram_size")
    options = {"do_sample": True, **{name: getattr(script_args, name) for name in decoding}}
    batch_size = training_args.per_device_eval_batch_size
    answers = answers_by_user(trainer.model, tokenizer, prompts, [*users, None], batch_size, **options)

    vanilla_args = copy.copy(training_args)
    vanilla_args.user_model_kind, vanilla_args.output_dir = "none", f"{output_dir}/vanilla"
    vanilla_trainer = with_progress(PersonalizedDPOTrainer(model, args=vanilla_args, **inputs), "vanilla DPO")
    vanilla_trainer.train()
    vanilla_trainer.save_model()

    opposite = {user: opposite_style(user) for user in users}
    controls = {"vanilla": vanilla_trainer, "opposite_users": opposite, "preference_column": "preference"}
    evaluation = evaluate_trainer(trainer, test, **controls, prompts=prompts, answers=answers)
    if not trainer.is_world_process_zero():
        return
    seconds = round(time.time() - start, 1)
    write_results(output_dir / "results.json", evaluation, seed=seed, wall_seconds=seconds)
    plot_report(output_dir / "accuracy_by_user.png", evaluation.report)
    print_whole(evaluation.users_table(), *(evaluation.answers_table(0, part) for part in (users[:3], users[3:])))
    print_whole(evaluation.answers_table(1, [*users[4:], None]), evaluation.report.verdict)
    print_whole(f"{output_dir}/results.json and accuracy_by_user.png after {seconds:.0f} s. Go on with:\n")
    print(next_commands(output_dir, users[:2], prompts[0], ref_model=model))


if __name__ == "__main__":
    quiet_libraries()
    parser = TrlParser((ScriptArguments, PersonalizedDPOConfig, ModelConfig))
    parser.set_defaults(**SMALL_RUN)
    main(*parser.parse_args_and_config())

"""
GPT-J with users who conflict on length: seven of ten users prefer longer summaries, three prefer shorter ones.

A small GPT-J from scratch on made-up posts; nothing to download, minutes on two CPU cores:

    accelerate launch examples/gptj_length.py --output_dir out

The paper's run (GPT-J 6B, TL;DR, LoRA) through the Hub, here with 4-bit weights:

    accelerate launch examples/gptj_length.py --config examples/configs/gptj_length.yaml --load_in_4bit

The small GPT-J on your own rows, in the raw schema of `openai/summarize_from_feedback`; fewer rows want a shorter warm-up:

    accelerate launch examples/gptj_length.py --dataset_path rows.jsonl --sft_steps 250 --output_dir out

Each run trains P-DPO, then vanilla DPO with the same budget, and leaves both models, its pairs, `results.json` and a picture.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, GPT2Tokenizer, GPTJConfig, GPTJForCausalLM, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.data import load_tldr, make_length_preferences
from trl_personal.evaluation import answers_by_user, evaluate_trainer, opposite_users
from trl_personal.evaluation.plots import plot_length_by_user
from trl_personal.evaluation.run_files import next_commands, write_pairs, write_results
from trl_personal.terminal import print_whole
from trl_personal.threads import fastest_num_threads
from trl_personal.training.progress import quiet_libraries, with_progress


SMALL_RUN = {  # unless the command line or `--config` says otherwise
    "output_dir": "gptj_length",
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "max_steps": 150,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-4,
    "beta": 0.5,
    "max_length": 256,
    "save_strategy": "no",
}


@dataclass
class ScriptArguments:
    dataset_path: str | None = field(default=None, metadata={"help": "TL;DR rows: a file, or a set on the Hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "If it is not the model's own."})
    sft_steps: int = field(default=800, metadata={"help": "Warm-up steps of the small model."})
    num_prompts: int = field(default=20, metadata={"help": "Unseen posts that every user gets an answer to."})
    max_new_tokens: int = field(default=120, metadata={"help": "Longest answer."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the likeliest tokens to sample answers from."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "On tokens of the post and the answer."})
    no_repeat_ngram_size: int = field(default=0, metadata={"help": "No n-gram of this size comes twice; 0 for any."})
    num_threads: int = field(default=0, metadata={"help": "Threads of the CPU; 0 for what is fastest now."})


def warm_up(dataset, script_args, training_args):
    """
    Folder of a small GPT-J and its tokenizer, which can write both summaries of every post. Half of the posts come with a word
    on their length in front: large models know such words from pretraining. Nothing here tells users apart.
    """
    rows = []
    for row in dataset:
        for word, answer in zip(("Shorter", "Longer"), sorted((row["chosen"], row["rejected"]), key=len), strict=True):
            prompts = (row["prompt"], f"{word}. {row['prompt']}")
            rows += [{"prompt": prompt, "completion": answer} for prompt in prompts]
    texts = (row["prompt"] + row["completion"] for row in rows)
    tokenizer = GPT2Tokenizer(pad_token="<pad>").train_new_from_iterator(texts, 4096, show_progress=False)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=training_args.max_length + training_args.num_virtual_tokens,
        **{"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "tie_word_embeddings": True},
        initializer_range=0.08,  # for this width; with GPT-J's 0.02 it learns late to copy from the post
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    same = ("bf16", "gradient_checkpointing", "max_length", "save_strategy", "seed")
    args = SFTConfig(
        f"{training_args.output_dir}/warmed_up",
        max_steps=script_args.sft_steps,
        learning_rate=5e-3,
        warmup_steps=20,
        **{name: getattr(training_args, name) for name in same},
    )
    inputs = {"args": args, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = with_progress(SFTTrainer(GPTJForCausalLM(config), **inputs), "warming up the small model")
    trainer.train()
    trainer.save_model()
    return args.output_dir


def main(script_args, training_args, model_args):
    start, output_dir = time.time(), Path(training_args.output_dir)
    torch.set_num_threads(script_args.num_threads or fastest_num_threads())
    set_seed(training_args.seed)
    path = script_args.dataset_path
    dataset = load_tldr(path) if path else make_length_preferences(seed=training_args.seed)
    preferences = dict(zip(dataset["train"]["user_id"], dataset["train"]["preference"], strict=True))
    test = dataset["test"].filter(lambda row: row["user_id"] in preferences)
    opposite = opposite_users(preferences)
    write_pairs(DatasetDict(train=dataset["train"], test=test), output_dir)
    model = model_args.model_name_or_path or warm_up(dataset["train"], script_args, training_args)
    tokenizer = AutoTokenizer.from_pretrained(script_args.tokenizer_name or model)
    training_args.model_init_kwargs = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    inputs = {"train_dataset": dataset["train"], "processing_class": tokenizer}
    inputs |= {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    trainer = with_progress(PersonalizedDPOTrainer(model, args=training_args, **inputs), "P-DPO")
    trainer.train()
    trainer.save_model()
    prompts = list(dict.fromkeys(test["prompt"]))[: script_args.num_prompts]
    decoding = ("max_new_tokens", "top_p", "repetition_penalty", "no_repeat_ngram_size")
    options = {"do_sample": True, **{name: getattr(script_args, name) for name in decoding}}
    users = [*preferences, None]
    answers = answers_by_user(trainer.model, tokenizer, prompts, users, **options)

    vanilla_args = copy.copy(training_args)
    vanilla_args.user_model_kind, vanilla_args.output_dir = "none", f"{output_dir}/vanilla"
    vanilla_trainer = with_progress(PersonalizedDPOTrainer(model, args=vanilla_args, **inputs), "vanilla DPO")
    vanilla_trainer.train()
    vanilla_trainer.save_model()

    controls = {"vanilla": vanilla_trainer, "opposite_users": opposite, "preference_column": "preference"}
    evaluation = evaluate_trainer(trainer, test, **controls, prompts=prompts, answers=answers)
    if not trainer.is_world_process_zero():
        return
    seconds = round(time.time() - start, 1)
    write_results(output_dir / "results.json", evaluation, seed=training_args.seed, wall_seconds=seconds)
    plot_length_by_user(output_dir / "length_by_user.png", evaluation.length_rows())
    pair = [users[0], opposite[users[0]]]
    answers = [evaluation.answers_table(0, pair), evaluation.answers_table(1, [*pair, users[-2], None])]
    print_whole(evaluation.users_table(), *answers, evaluation.report.verdict)
    print_whole(f"{output_dir}/results.json and length_by_user.png after {seconds:.0f} s. Go on with:\n")
    print(next_commands(output_dir, pair, prompts[0], ref_model=model, opposite_column="preference"))


if __name__ == "__main__":
    quiet_libraries()
    parser = TrlParser((ScriptArguments, PersonalizedDPOConfig, ModelConfig))
    parser.set_defaults(**SMALL_RUN)
    main(*parser.parse_args_and_config())

"""The run that `test_kills.py` kills: in a module of its own, which a fork server imports once for all runs."""

import logging
import os
import sys

import datasets
import torch
import transformers
from datasets import Dataset

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


ROWS = [{"prompt": "please write", "chosen": " yes", "rejected": " no", "user_id": i % 2} for i in range(8)]
MAX_STEPS = 8


def run(model: str, output_dir: str, log: str) -> None:
    """Train, saving after each step; go on from what is in the folder, if there is something. What is said goes into `log`."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        logging.getLogger("trl_personal").addHandler(logging.StreamHandler(file))
        args = PersonalizedDPOConfig(
            output_dir, max_steps=MAX_STEPS, save_steps=1, save_total_limit=3, bf16=False, use_cpu=True, report_to="none",
            num_virtual_tokens=3, max_length=32, disable_tqdm=True, logging_steps=1000, per_device_train_batch_size=4,
            learning_rate=1e-2, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = PersonalizedDPOTrainer(model, args=args, train_dataset=Dataset.from_list(ROWS))
        trainer.train(resume_from_checkpoint=any(os.scandir(output_dir)) or None)
        trainer.save_model()

"""Run by `accelerate launch` in `test_ddp.py`: trains on the given folder and writes weights and losses of this rank."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


def main(model_dir, rows, output_dir, batch_size):
    output_dir = Path(output_dir)
    args = PersonalizedDPOConfig(
        str(output_dir / "run"), max_steps=3, per_device_train_batch_size=int(batch_size), learning_rate=0.2, optim="sgd",
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, num_virtual_tokens=3, max_length=32,
        per_device_eval_batch_size=int(batch_size), gradient_checkpointing=False,
    )  # fmt: skip
    dataset = Dataset.from_json(rows, cache_dir=str(output_dir / "cache"))
    trainer = PersonalizedDPOTrainer(model_dir, args=args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    torch.save(trainer.model.state_dict(), output_dir / f"weights-{rank}.pt")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    (output_dir / f"logs-{rank}.json").write_text(json.dumps({"train": logs, "eval": metrics}))
    trainer.save_model(str(output_dir / "final"))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""
Run by `accelerate launch` in `test_where_else.py`: what was mended for one process is tried in each of two, one case after the
other. Each process leaves what came of every case. `python where_else.py '{"model": ..., "rows": ..., "output_dir": ...}'`
"""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from transformers import TrainerCallback, set_seed
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer
from trl_personal.training.run_folder import LOCK_FILE


class Heard(logging.Handler):
    """Keeps what the package says."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


class SpoilOneUser(TrainerCallback):
    """In the weights of every process, as an exchange of gradients leaves them; only one process has the user's rows."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            model.user_model.user_offsets.weight.data[2, 0] = torch.nan


def main(model, rows, output_dir):
    output_dir = Path(output_dir)
    dataset = Dataset.from_json(rows, cache_dir=str(output_dir / "cache"))
    plain = DataCollatorForPreference(pad_token_id=0, max_length=32)

    def make(name, train_dataset=dataset, data_collator=None, callbacks=None, **settings):
        set_seed(0)
        args = PersonalizedDPOConfig(
            str(output_dir / name),
            **{
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "learning_rate": 0.2,
                "optim": "sgd",
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "use_cpu": True,
                "bf16": False,
                "num_virtual_tokens": 3,
                "max_length": 32,
                "gradient_checkpointing": False,
                "disable_tqdm": True,
            }
            | settings,
        )
        return PersonalizedDPOTrainer(
            model, args=args, train_dataset=train_dataset, data_collator=data_collator, callbacks=callbacks
        )

    def trained(name, resume=None, **options):
        trainer = make(name, **options)
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        return {
            "rows": trainer.user_model.user_offsets.weight.detach().flatten().tolist(),
            "losses": [log["loss"] for log in logs],
            "norms": [log["grad_norm"] for log in logs],
            "step": trainer.state.global_step,
        }

    def in_a_folder_that_another_run_has():
        trainer = make("held")
        lock = FileLock(output_dir / "held" / LOCK_FILE)
        if trainer.accelerator.is_main_process:
            Path(lock.lock_file).parent.mkdir(exist_ok=True)
            lock.acquire()
        trainer.accelerator.wait_for_everyone()
        try:
            trainer.train()
        finally:
            trainer.accelerator.wait_for_everyone()
            lock.release()

    def resumed_from_nothing_whole():
        first = trained("cut", save_strategy="steps", save_steps=1)
        for path in (output_dir / "cut").glob("checkpoint-*/trainer_state.json"):
            path.unlink(missing_ok=True)
        return {"first": first, "again": trained("cut", resume=True)}

    def changed(examples):
        batch = plain(examples)
        return batch if len(examples) == 1 else batch | {"input_ids": batch["input_ids"] + 1}

    cases = {
        "straight": lambda: trained("straight"),
        "reversed": lambda: trained("reversed", data_collator=lambda examples: plain(examples[::-1])),
        "changed": lambda: trained("changed", data_collator=changed),
        "diverged": lambda: trained("diverged", max_steps=8, logging_steps=4, callbacks=[SpoilOneUser()]),
        "held": in_a_folder_that_another_run_has,
        "cut off": resumed_from_nothing_whole,
        "frozen": lambda: trained("frozen", user_learning_rate=0.0),
        "nearly frozen": lambda: trained("nearly", user_learning_rate=1e-9),
        "dispatched": lambda: trained("dispatched", accelerator_config={"dispatch_batches": True}),
        "stream": lambda: trained("stream", train_dataset=dataset.to_iterable_dataset()),
        "stream, packed": lambda: trained(
            "stream-packed", train_dataset=dataset.to_iterable_dataset(), share_prefix="always"
        ),
        "stream, unpacked": lambda: trained(
            "stream-unpacked", train_dataset=dataset.to_iterable_dataset(), share_prefix="never"
        ),
        "stream, one reads": lambda: trained(
            "stream-one", train_dataset=dataset.to_iterable_dataset(), accelerator_config={"dispatch_batches": True}
        ),
        "stream, reversed": lambda: trained(
            "stream-reversed",
            train_dataset=dataset.to_iterable_dataset(),
            data_collator=lambda examples: plain(examples[::-1]),
        ),
    }
    heard, found = Heard(), {}
    logging.getLogger("trl_personal").addHandler(heard)
    for name, case in cases.items():
        heard.said.clear()
        try:
            outcome = case()
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        found[name] = {"outcome": outcome, "said": list(heard.said)}
        (output_dir / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

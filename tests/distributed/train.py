"""
Run by `accelerate launch` or `torchrun` in the tests beside it: trains one of the strategies and leaves losses, the weights of
each rank (DDP) and a final model. `python train.py '{"model": ..., "rows": ..., "output_dir": ..., ...}'`
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer


def zero(stage):
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def main(model, rows, output_dir, batch_size, strategy="ddp", lora=False, resume=False, **settings):
    output_dir = Path(output_dir)
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")  # on a GPU, `accelerate launch` does
    args = PersonalizedDPOConfig(
        str(output_dir / "run"),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
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
            "deepspeed": zero(int(strategy[-1])) if strategy.startswith("zero") else None,
        }
        | settings,
    )
    dataset = Dataset.from_json(rows, cache_dir=str(output_dir / "cache"))
    trainer = PersonalizedDPOTrainer(
        model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    if strategy == "ddp":
        torch.save(trainer.model.state_dict(), output_dir / f"weights-{rank}.pt")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    (output_dir / f"logs-{rank}.json").write_text(json.dumps({"train": logs, "eval": metrics}))
    trainer.save_model(str(output_dir / "final"))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

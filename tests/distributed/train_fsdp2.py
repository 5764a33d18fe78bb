"""
Run by `accelerate launch` in the tests beside it: the loss of [`PersonalizedDPOTrainer`] on a model sharded by FSDP2
(`torch.distributed.fsdp.fully_shard`), which accelerate refuses to set up on a CPU.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_personal import PersonalizedDPOConfig, PersonalizedDPOTrainer, UserModel
from trl_personal.models.saving import full_user_state, get_base_model, set_user_state


LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(model, rows, output_dir, batch_size, lora=False):
    output_dir = Path(output_dir)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    for name in LAUNCHER_VARIABLES:  # accelerate shall not wrap the model in DDP
        os.environ.pop(name, None)
    args = PersonalizedDPOConfig(
        str(output_dir / "run"), report_to="none", use_cpu=True, bf16=False, num_virtual_tokens=3, max_length=32,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    dataset = Dataset.from_json(rows, cache_dir=str(output_dir / f"cache-{rank}"))
    trainer = PersonalizedDPOTrainer(
        model,
        args=args,
        train_dataset=dataset,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]) if lora else None,
    )
    num_sharded = 0
    if world_size > 1:
        for layer in get_base_model(trainer.model).get_decoder().layers:
            fully_shard(layer)
        fully_shard(trainer.model)
        parameters = dict(trainer.model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        assert any("user_offsets" in name for name in parameters)
        num_sharded = len(parameters)
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.2)
    losses = []
    trainer.model.train()
    for step in range(3):
        start = (step * batch_size * world_size + rank * batch_size) % len(dataset)
        examples = [dict(trainer.train_dataset[row]) for row in range(start, start + batch_size)]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = trainer.model.state_dict()
    if world_size > 1:
        state = get_model_state_dict(
            trainer.model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        )
    user_state = full_user_state(trainer.user_model)
    if rank == 0:
        trainer._save(str(output_dir / "final"), state_dict=state)
    if world_size > 1:
        dist.barrier()
    saved = UserModel.from_pretrained(output_dir / "final/user_model").state_dict()
    set_user_state(trainer.user_model, {name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    emptied = all(not tensor.any() for tensor in full_user_state(trainer.user_model).values())
    set_user_state(trainer.user_model, saved)
    back = full_user_state(trainer.user_model)
    reloaded = emptied and all(torch.equal(back[name], user_state[name]) for name in saved)
    (output_dir / f"logs-{rank}.json").write_text(
        json.dumps({"losses": losses, "num_sharded": num_sharded, "reloaded": reloaded})
    )
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

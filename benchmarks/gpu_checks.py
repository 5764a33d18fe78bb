"""
The list of docs/gpu.md on one GPU, as JSON in a file that grows check by check. All is made here, nothing is downloaded.

    python benchmarks/gpu_checks.py [--small] [--output gpu_checks.json]

A check that fails leaves its error in the file, and the others run. `--small` uses tiny shapes and, without a GPU, the CPU: to
test the script itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_personal import (
    IndividualUserModel,
    PersonalizedDPOConfig,
    PersonalizedDPOTrainer,
    UserModelConfig,
    UserVocab,
    attach_user_model,
)
from trl_personal.training.attention_kernels import cudnn_gradient_fails, sound_attention


CUDA = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[1]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def make_model(folder, small, dtype=torch.bfloat16 if CUDA else torch.float32):
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(500))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    sizes = (128, 256, 2, 4) if small else (2048, 8192, 16, 32)
    config = LlamaConfig(
        vocab_size=1024 if small else 32_000,
        **dict(
            zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True)
        ),
        **{"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def make_rows(small):
    length = 20 if small else 400
    prompt = " ".join(f"w{i % 500}" for i in range(length))
    long, short = " " + " ".join(f"w{i}" for i in range(40)), " w1 w2 w3"
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": (long, short)[i % 2], "rejected": (short, long)[i % 2], "user_id": i % 2}
            for i in range(64)
        ]
    )


def run(model, rows, folder, personalized=True, lora=True, trainer_kwargs=None, **settings):
    """Train eight steps; seconds a step (the first, which compiles and allocates, left out), peak memory and the losses."""
    args = (PersonalizedDPOConfig if personalized else DPOConfig)(
        str(folder),
        **{
            "max_steps": 8, "per_device_train_batch_size": 4, "bf16": CUDA, "use_cpu": not CUDA, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-4,
            "model_init_kwargs": {"dtype": "bfloat16" if CUDA else "float32"},
        } | settings,
    )  # fmt: skip
    trainer_class = PersonalizedDPOTrainer if personalized else DPOTrainer
    peft_config = LoraConfig(**LORA) if lora else None
    trainer = trainer_class(model, args=args, train_dataset=rows, peft_config=peft_config, **(trainer_kwargs or {}))
    times = Times()
    trainer.add_callback(times)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.save_model()
    return {
        "seconds_per_step": (times.ends[-1] - times.ends[0]) / (len(times.ends) - 1),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "files": sorted(path.name for path in Path(folder).iterdir()),
    }


class Times(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if CUDA:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def kernels(root):
    """Losses of a tiny model in float32 on the CPU and here: on a GPU TRL's Triton kernels score the valid positions only."""
    folder, rows = make_model(root / "tiny", small=True, dtype=torch.float32), make_rows(small=True)
    settings = {"bf16": False, "model_init_kwargs": {"dtype": "float32"}, "lora": False}
    here = run(folder, rows, root / "tiny-gpu", **settings)["losses"]
    # the trainer's device is chosen once a process
    command = [sys.executable, __file__, "--losses_on_cpu", folder]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    on_cpu = json.loads(output.splitlines()[-1])
    return {"largest_difference": max(abs(a - b) for a, b in zip(here, on_cpu, strict=True)), "losses": here}


def losses_on_cpu(folder):
    settings = {"bf16": False, "use_cpu": True, "model_init_kwargs": {"dtype": "float32"}, "lora": False}
    print(json.dumps(run(folder, make_rows(small=True), Path(folder) / "cpu", **settings)["losses"]))


def attention():
    """Whether cuDNN's attention has NaN gradients here, and whether training steps are kept from it."""
    fails = cudnn_gradient_fails(torch.device("cuda", 0) if CUDA else torch.device("cpu"))
    with sound_attention(torch.device("cuda", 0) if CUDA else torch.device("cpu")):
        return {"cudnn_gradient_fails": fails, "cudnn_in_training": torch.backends.cuda.cudnn_sdp_enabled()}


def fsdp2(root, model):
    """Full tuning through `accelerate launch` with the project's FSDP2 configuration, one process."""
    config = str(ROOT / "examples/accelerate/fsdp2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
    command = [*launch, __file__, "--trained_by_fsdp2", model, str(root / "fsdp2")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise RuntimeError(finished.stderr[-3000:])
    return json.loads(next(line for line in finished.stdout.splitlines() if line.startswith('{"seconds_per_step"')))


def generation(root):
    """Greedy text of a batch of users in float32 against the same one by one: the number of rows that are equal."""
    folder = make_model(root / "writer", small=True, dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(folder).to("cuda" if CUDA else "cpu").eval()
    user_model = IndividualUserModel(UserModelConfig(16, 10, model.config.hidden_size))
    torch.nn.init.normal_(user_model.user_offsets.weight, std=0.5)
    attach_user_model(model, user_model, UserVocab(range(16)))
    ids = torch.randint(3, 500, (16, 12), device=model.device)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=torch.ones_like(ids), user_ids=list(range(16)), **settings)
    singles = [
        model.generate(row[None], attention_mask=torch.ones_like(row[None]), user_ids=[u], **settings)
        for u, row in enumerate(ids)
    ]
    equal = sum(torch.equal(row[: len(one[0])], one[0]) for row, one in zip(batch, singles, strict=True))
    return {"equal": equal, "of": len(ids), "distinct": len({tuple(row.tolist()) for row in batch})}


def example(root):
    """The main example, whole: seconds and the accuracies of its users."""
    start = time.perf_counter()
    command = [sys.executable, "examples/gptj_length.py", "--output_dir", str(root / "gptj")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise RuntimeError(finished.stderr[-3000:])
    results = json.loads((root / "gptj" / "results.json").read_text())
    own = [row["accuracy_own"] for row in results["users"]]
    return {
        "seconds": time.perf_counter() - start, "accuracy_own": sum(own) / len(own), "worst": min(own),
        "vanilla_accuracy": results["vanilla_accuracy"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, default="gpu_checks.json", metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="these checks")
    parser.add_argument("--losses_on_cpu", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--trained_by_fsdp2", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    small = options.small
    if options.losses_on_cpu:
        return losses_on_cpu(options.losses_on_cpu)
    if options.trained_by_fsdp2:
        model, out = options.trained_by_fsdp2
        return print(json.dumps(run(model, make_rows(small), Path(out), lora=False)))
    results = {
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "torch", "bitsandbytes")},
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        model, rows = make_model(root / "model", small), make_rows(small)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        qlora = {"quantization_config": quantization}
        optim = "paged_adamw_8bit" if CUDA else "adamw_torch"
        checks = {
            "attention": attention,
            "kernels": lambda: kernels(root),
            "generation": lambda: generation(root),
            "bf16_lora_trl": lambda: run(model, rows, root / "a", personalized=False),
            "bf16_lora": lambda: run(model, rows, root / "b"),
            "4bit_paged": lambda: run(model, rows, root / "c", trainer_kwargs=qlora, optim=optim),
            "bf16_full": lambda: run(model, rows, root / "d", lora=False),
        }
        if CUDA:
            checks["fsdp2"] = lambda: fsdp2(root, model)
            checks["compiled"] = lambda: run(model, rows, root / "e", torch_compile=True)
        checks["example"] = lambda: example(root)
        for name in options.only or checks:
            start = time.perf_counter()
            try:
                results[name] = checks[name]()
            except Exception:
                results[name] = {"error": traceback.format_exc()[-3000:]}
            results[name]["seconds_in_all"] = time.perf_counter() - start
            options.output.write_text(json.dumps(results, indent=2) + "\n")
            print(name, {k: v for k, v in results[name].items() if k not in ("losses", "files")}, flush=True)
            if CUDA:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

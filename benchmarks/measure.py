"""
What the benchmarks share: synthetic models and preferences, interleaved timing, peak memory, and files of results.

Time is CPU time of the process with one thread, or time between CUDA events on a GPU. The contestants take turns (A B A B
...), so that what else the machine does falls on all of them. Nothing is downloaded.
"""

import json
import multiprocessing
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from scipy.stats import binom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)

from trl_personal.terminal import print_whole


CUDA = torch.cuda.is_available()
SEED = 0
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
VOCAB_SIZE, SMALL_VOCAB_SIZE = 16_000, 200
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
# 7 layers of width 512 and a tied vocabulary of 16,000: 30.3M parameters each
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=1376, num_hidden_layers=7, num_attention_heads=8,
        max_position_embeddings=2048, **IDS,
    ),
    "gptj": GPTJConfig(
        vocab_size=VOCAB_SIZE, n_embd=512, n_layer=7, n_head=8, rotary_dim=32, n_positions=2048, **IDS
    ),
}  # fmt: skip
SMALL_CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=SMALL_VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, **IDS,
    ),
    "gptj": GPTJConfig(
        vocab_size=SMALL_VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256, **IDS
    ),
}  # fmt: skip


def make_model(family: str, small: bool = False, seed: int = SEED) -> PreTrainedModel:
    """A `"llama"` or `"gptj"` of 30.3M random weights in float32 (`small`: tiny, to test a benchmark)."""
    set_seed(seed)
    return AutoModelForCausalLM.from_config((SMALL_CONFIGS if small else CONFIGS)[family]).eval()


def make_tokenizer(small: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, `w0`, `w1`, ...; it adds no BOS."""
    size = SMALL_VOCAB_SIZE if small else VOCAB_SIZE
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(size - len(SPECIAL_TOKENS)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", model_input_names=inputs, **names)


def make_preferences(
    num_pairs: int, prompt_tokens: int, response_tokens: int, num_users: int, small: bool = False, seed: int = SEED
) -> Dataset:
    """
    Pairs of random words for [`make_tokenizer`]: `prompt_tokens` in a prompt, `response_tokens` in each response (with the EOS
    that TRL adds). Users `"0"` to `str(num_users - 1)`, spread evenly over the pairs.
    """
    draw = random.Random(seed)
    size = (SMALL_VOCAB_SIZE if small else VOCAB_SIZE) - len(SPECIAL_TOKENS)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(size)}" for _ in range(length))

    return Dataset.from_list(
        [
            {
                "prompt": text(prompt_tokens),
                "chosen": " " + text(response_tokens - 1),
                "rejected": " " + text(response_tokens - 1),
                "user_id": str(i * num_users // num_pairs),
            }
            for i in range(num_pairs)
        ]
    )


def optimizer_step(trainer: Trainer, batch: Mapping[str, Any]) -> Callable[[], None]:
    """What `trainer.train()` does in one step, on the same batch each time: loss, gradient, clipping, optimizer."""
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model

    def step() -> None:
        trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return step


def use_one_thread() -> None:
    """For comparable CPU times. Set `OMP_NUM_THREADS=1` too: some libraries read it when they are imported."""
    torch.set_num_threads(1)


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of the process, or seconds between CUDA events, that one call takes."""
    if not CUDA:
        start = time.process_time()
        function()
        return time.process_time() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1000


def interleaved(callables: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each callable in each round, after one round that does not count. They take turns in every round."""
    times: dict[str, list[float]] = {name: [] for name in callables}
    for number in track(range(rounds + 1), description="rounds"):
        for name, function in callables.items():
            value = seconds(function)
            if number:
                times[name].append(value)
    return times


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """
    Median, and an interval for it from order statistics: at least 90% coverage from five values on, where it is the range.

    ```python
    >>> median_interval([5.0, 1.0, 3.0, 2.0, 4.0])
    (3.0, 1.0, 5.0)
    ```
    """
    ordered = sorted(values)
    rank = max(1, int(binom.ppf(0.05, len(ordered), 0.5)))
    return median(ordered), ordered[rank - 1], ordered[-rank]


def ratios(times: Mapping[str, Sequence[float]], baseline: str) -> list[dict[str, Any]]:
    """For each contestant the median seconds, and the ratio to `baseline` within the same round: median and interval."""
    rows = []
    for name, values in times.items():
        middle, low, high = median_interval([a / b for a, b in zip(values, times[baseline], strict=True)])
        rows.append(
            {"name": name, "seconds": median(values), "baseline": baseline, "ratio": middle, "low": low, "high": high}
        )
    return rows


def ratios_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows of [`ratios`] as a table."""
    cells = [
        {
            "": row["name"],
            "seconds": f"{row['seconds']:.4g}",
            f"time / {row['baseline']}": f"{row['ratio']:.3f}",
            "interval": f"{row['low']:.3f} to {row['high']:.3f}",
        }
        for row in rows
    ]
    return make_table(cells, title)


def make_table(rows: Sequence[Mapping[str, object]], title: str) -> Table:
    """A table; the first row names the columns. Floats have two digits."""
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def peak_memory(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """
    What `function(*args)` returns in a fresh process, and the bytes at the peak over the idle process, with everything
    imported: of the process, or allocated on the GPU. `function` must be at the top level of a module. (Linux only.)
    """
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_report_peak, args=(results, function, *args))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}{args} ended with exit code {process.exitcode}.")
    return results.get()


def _report_peak(results: Any, function: Callable[..., Any], *args: Any) -> None:
    use_one_thread()
    idle = process_memory("VmRSS")
    value = function(*args)
    results.put((value, torch.cuda.max_memory_allocated() if CUDA else process_memory("VmHWM") - idle))


def process_memory(field: str) -> int:
    """Bytes of this process: `"VmRSS"` now, `"VmHWM"` at the peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024


def provenance() -> dict[str, Any]:
    """What a figure needs beside it: command, seed, versions, hardware, date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {
        "command": " ".join(["python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]]),
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("trl", "transformers", "peft", "torch")},
        },
        "hardware": torch.cuda.get_device_name() if CUDA else f"{cpu}, {torch.get_num_threads()} thread",
        "date": date.today().isoformat(),
    }


def write_results(
    path_stem: str | Path,
    results: Mapping[str, Any],
    table: Table | Sequence[Table],
    draw: Callable[[Axes], None] | None = None,
) -> None:
    """
    Print the table, and write `<path_stem>.json` (the results with [`provenance`]), `.txt` (the table) and `.png`.

    `draw(axes)` draws the picture. By default it shows `results["ratios"]`, rows of [`ratios`].
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(provenance() | dict(results), indent=2) + "\n")
    tables = [table] if isinstance(table, Table) else table
    with open(stem.with_suffix(".txt"), "w") as file:
        for output in (None, file):
            print_whole(*tables, file=output)
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    (draw or (lambda axes: draw_ratios(axes, results["ratios"])))(axes)
    figure.savefig(stem.with_suffix(".png"))


def draw_ratios(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars of the rows of [`ratios`], with their intervals and a line at 1."""
    positions = range(len(rows))
    errors = [
        [row["ratio"] - row["low"] for row in rows],
        [row["high"] - row["ratio"] for row in rows],
    ]
    axes.barh(positions, [row["ratio"] for row in rows], xerr=errors, color="#0072B2", alpha=0.6, capsize=3)
    axes.set_yticks(positions, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time relative to {rows[0]['baseline']}")

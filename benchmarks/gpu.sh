#!/usr/bin/env bash
# All that needs a GPU: the checks of docs/gpu.md, then training and generation at 6B and 8B. Nothing is downloaded.
# Needs a GPU of 80 GB and 40 GB of disk for random weights. Arguments go to gpu.py:  bash benchmarks/gpu.sh --families llama
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmarks/results
export HF_HUB_OFFLINE=1 PYTHONPATH=.
python benchmarks/gpu_checks.py --output benchmarks/results/gpu_checks.json
python benchmarks/gpu.py "$@"

#!/usr/bin/env bash
# The fastest pipeline layout that fits, and a look at the run that uses it. Nothing is trained, no GPU is needed.
#
#   bash examples/plan.sh [OUTPUT.json]            default: runs/examples/plan.json
#
# For your own cluster: change the preset, --world-size and --device (a name of `plan_pipeline.py --help`, or a file
# that --calibrate measured). docs/planner.md explains the answer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
plan="${1:-runs/examples/plan.json}"
mkdir -p "$(dirname "$plan")"
run=(--preset telechat2-35b --world-size 16 --global-batch-size 32)

# 1. Solve: which layers each stage holds, and what each recomputes.
python tools/plan_pipeline.py "${run[@]}" --device ascend-910b-64g --output "$plan"

# 2. Look at the run before it starts: ranks, stages, memory, all configuration errors at once.
python pretrain/pretrain_telechat2.py "${run[@]}" --plan "$plan" --mock-data --train-iters 1000 --dry-run

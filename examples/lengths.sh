#!/usr/bin/env bash
# One run whose samples grow longer: 64, 128, 256 tokens, each with its rotary base (lengths.yaml), and the export of
# each stage.
#
#   bash examples/lengths.sh [RUN_DIR] [DATA_DIR]    default: runs/examples/lengths runs/examples/pretrain/data
#
# Needs the tokenizer and the tokens of examples/pretrain.sh. Environment: STEPS (default 16), NPROC (ranks, default 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run_dir="${1:-runs/examples/lengths}"
data="${2:-runs/examples/pretrain/data}"
nproc="${NPROC:-2}"
if [ ! -e "$data/train_text_document.idx" ]; then
    echo "no tokens in $data; run first: bash examples/pretrain.sh" >&2
    exit 2
fi

train=(pretrain/pretrain_telechat2.py --preset telechat2-tiny --config examples/lengths.yaml --vocab-size 1024
    --micro-batch-size 1 --tensor-model-parallel-size "$nproc" --device cpu --run-dir "$run_dir"
    --data-path "$data/train_text_document" --tokenizer-model "$data/tokenizer.json" --train-iters "${STEPS:-16}")

# 1. What each stage is, before anything starts.
python "${train[@]}" --dry-run --world-size "$nproc" | sed -n '1,/^===/p'

# 2. The training. Run the script again: it goes on in the stage of the newest checkpoint.
if [ "$nproc" -eq 1 ]; then
    python "${train[@]}"
else
    python -m torch.distributed.run --standalone --nproc-per-node "$nproc" "${train[@]}"
fi

# 3. A Hugging Face folder of each stage, with its own rope_theta and lengths.
for checkpoint in "$run_dir"/checkpoints/iter_*; do
    rm -rf "$run_dir/hf/$(basename "$checkpoint")"
    python tools/convert_checkpoint.py export --checkpoint "$checkpoint" --output "$run_dir/hf/$(basename "$checkpoint")"
    grep -E '"(rope_theta|seq_length)"' "$run_dir/hf/$(basename "$checkpoint")/config.json"
done

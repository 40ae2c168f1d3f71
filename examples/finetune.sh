#!/usr/bin/env bash
# Fine-tune the model of examples/pretrain.sh on dialogs, and let it answer.
#
#   bash examples/finetune.sh [RUN_DIR [PRETRAINED_RUN_DIR]]
#   defaults: runs/examples/finetune runs/examples/pretrain
#
# For your own run: set DIALOGS to your jsonl (docs/finetuning.md shows the shapes of a line). To begin with published
# weights, import them first (`tools/convert_checkpoint.py import`) and give that folder to --load.
# Environment: DIALOGS, STEPS (default 20).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run_dir="${1:-runs/examples/finetune}"
pretrained="${2:-runs/examples/pretrain}"
dialogs="${DIALOGS:-examples/dialogs.jsonl}"
tokenizer="$pretrained/data/tokenizer.json"
if [ ! -e "$pretrained/checkpoints/latest" ]; then
    echo "finetune: $pretrained holds no checkpoint; run first: bash examples/pretrain.sh $pretrained" >&2
    exit 2
fi

# 1. The training: --sft reads dialogs and learns the answers; each dialog of a packed row attends to itself only.
python pretrain/pretrain_telechat2.py --preset telechat2-tiny --vocab-size 1024 --seq-length 128 --micro-batch-size 2 \
    --global-batch-size 4 --device cpu --sft --data-path "$dialogs" --split 90,10,0 --tokenizer-model "$tokenizer" \
    --reset-position-ids --reset-attention-mask --finetune --load "$pretrained/checkpoints" --run-dir "$run_dir" \
    --train-iters "${STEPS:-20}" --lr 1e-3 --lr-warmup-iters 2 --save-interval 20 --log-interval 5

# 2. The weights as a Hugging Face folder, with the tokenizer beside them.
rm -rf "$run_dir/hf"
python tools/convert_checkpoint.py export --checkpoint "$run_dir/checkpoints" --output "$run_dir/hf" \
    --tokenizer "$tokenizer"

# 3. An answer.
python tools/generate.py --hf "$run_dir/hf" --prompt "<_user>What is 12 times 12?<_bot>" --max-new-tokens 16 --device cpu

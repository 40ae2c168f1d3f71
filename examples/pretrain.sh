#!/usr/bin/env bash
# Text to a tokenizer, to tokens, to a trained tiny TeleChat2 on the CPU.
#
#   bash examples/pretrain.sh [RUN_DIR]            default: runs/examples/pretrain
#
# For your own run: set TEXT to your jsonl (one {"text": ...} a line), take another --preset, and start it on more
# ranks. Environment: TEXT, STEPS (default 20), NPROC (ranks, default 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run_dir="${1:-runs/examples/pretrain}"
text="${TEXT:-megatron_telechat/data/text/sample/bilingual.jsonl}"
nproc="${NPROC:-2}"
data="$run_dir/data"
mkdir -p "$data"

# 1. A tokenizer. Skip this step if you have one: a folder or a file of Hugging Face, or a SentencePiece model.
if [ ! -e "$data/tokenizer.json" ]; then
    python tools/train_tokenizer.py --input "$text" --vocab-size 1024 --output "$data/tokenizer.json"
fi

# 2. Text to Megatron's .bin and .idx.
if [ ! -e "$data/train_text_document.idx" ]; then
    python tools/preprocess_data.py --input "$text" --output-prefix "$data/train" --append-eod --workers 1 \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer.json"
fi

# 3. The training. Run the script again: it goes on from the newest checkpoint. `python -m torch.distributed.run` is
#    torchrun by its module's name.
train=(pretrain/pretrain_telechat2.py --preset telechat2-tiny --vocab-size 1024 --seq-length 128 --micro-batch-size 1
    --tensor-model-parallel-size "$nproc" --global-batch-size 4 --device cpu --run-dir "$run_dir"
    --data-path "$data/train_text_document" --tokenizer-model "$data/tokenizer.json"
    --train-iters "${STEPS:-20}" --lr-warmup-iters 2 --save-interval 10 --log-interval 5)
if [ "$nproc" -eq 1 ]; then
    python "${train[@]}"
else
    python -m torch.distributed.run --standalone --nproc-per-node "$nproc" "${train[@]}"
fi
echo "weights: $run_dir/checkpoints/$(cat "$run_dir/checkpoints/latest")"

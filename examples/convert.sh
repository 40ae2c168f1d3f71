#!/usr/bin/env bash
# Hugging Face weights to a checkpoint and back, and a proof that the model is still the same.
#
#   bash examples/convert.sh [OUTPUT [HF_FOLDER [GOLDEN.safetensors]]]
#   defaults: runs/examples/convert, a tiny TeleChat2 of the tests and its reference logits
#
# GOLDEN holds input_ids_S and logits_S of the published modelling file (tests/golden/README.md): make one where
# that file runs. The tolerance is for rotary tables rounded to fp16, as that file rounds them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="${VENV:-$PWD/.venv}/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
output="${1:-runs/examples/convert}"
hf="${2:-tests/golden/telechat2_tiny_gqa}"
golden="${3:-tests/golden/telechat2_tiny_gqa/golden.safetensors}"

# 1. Hugging Face to a checkpoint of weights. Training begins with it by --finetune --load "$output/weights".
python tools/convert_checkpoint.py import --hf "$hf" --output "$output/weights" --overwrite

# 2. A checkpoint to Hugging Face: this one, or that of a training, whatever its layout was.
rm -rf "$output/hf"
python tools/convert_checkpoint.py export --checkpoint "$output/weights" --output "$output/hf"

# 3. The logits of the exported folder against the reference. Exit code 4: they differ.
python tools/check_logits.py --hf "$output/hf" --golden "$golden" --rotary-table-dtype fp16

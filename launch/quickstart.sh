#!/usr/bin/env bash
# From a bare machine to a trained TeleChat2-MoE, in minutes and without a GPU.
#
#   bash launch/quickstart.sh [RUN_DIR]            default: runs/quickstart
#
# Every stage prints the command it runs: copy them, change the preset, and you have a real run. A stage whose result
# is there already is skipped, so the script can be run again. Environment: STEPS (default 180), NPROC (default 4).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run_dir="${1:-runs/quickstart}"
steps="${STEPS:-180}"
nproc="${NPROC:-4}"
# With 16,384 ids the output layer costs one and a half to two times as much as a decoder layer, as with large vocabularies:
# an even split leaves the first stage waiting, and the planner moves a layer there.
vocab=16384
started=$SECONDS

stage() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$'; printf ' %q' "$@"; printf '\n'; "$@"; }

stage "1/10 environment"
run bash launch/setup_env.sh plot,data
venv="${VENV:-$PWD/.venv}"
export PATH="$venv/bin:$PATH" PYTHONUNBUFFERED=1
# One thread a rank: the ranks share the cores of this machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
run python tools/doctor.py

stage "2/10 a corpus from the text this machine has (English, Chinese, code)"
data="$run_dir/data"
if [ ! -e "$data/corpus/en.jsonl" ]; then run python tools/build_corpus.py --output "$data/corpus"; fi

stage "3/10 a tokenizer with TeleChat2's special tokens"
if [ ! -e "$data/tokenizer.json" ]; then
    run python tools/train_tokenizer.py --input "$data/corpus/*.jsonl" --vocab-size "$vocab" --output "$data/tokenizer.json"
fi

stage "4/10 text to tokens"
for name in en zh code; do
    if [ ! -e "$data/${name}_text_document.idx" ]; then
        run python tools/preprocess_data.py --input "$data/corpus/$name.jsonl" --output-prefix "$data/$name" \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer.json" --append-eod --workers 2
    fi
done

# The run itself: TP2 x PP2, the tensor domain folded into EP2; 16 experts, top-4. On a GPU machine the same flags use it.
train=(--preset telechat2-tiny-moe --vocab-size "$vocab" --run-dir "$run_dir"
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2
    --data-path 0.4 "$data/en_text_document" 0.2 "$data/zh_text_document" 0.4 "$data/code_text_document"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/tokenizer.json"
    --train-iters "$steps" --save-interval 60 --eval-interval 30 --eval-iters 2)

stage "5/10 measure this machine, and plan the pipeline for it"
plan="$run_dir/plan.json"
if [ ! -e "$plan" ]; then
    run torchrun --standalone --nproc-per-node "$nproc" tools/plan_pipeline.py "${train[@]}" --calibrate --rounds 8 --output "$run_dir/device.yaml"
    run python tools/plan_pipeline.py "${train[@]}" --world-size "$nproc" --device "$run_dir/device.yaml" --output "$plan"
fi
train=(pretrain/pretrain_telechat2.py "${train[@]}" --plan "$plan")

stage "6/10 check the run before it starts"
run python "${train[@]}" --dry-run --world-size "$nproc"

stage "7/10 pretrain on $nproc ranks, stopped half-way"
run torchrun --standalone --nproc-per-node "$nproc" "${train[@]}" --exit-interval "$((steps / 2))"

stage "8/10 the same command resumes where it stopped"
run torchrun --standalone --nproc-per-node "$nproc" "${train[@]}"

stage "9/10 the loss curve, and the weights in the Hugging Face layout"
run python tools/plot_run.py "$run_dir" --output "$run_dir/loss.png" | tee "$run_dir/summary.txt"
checkpoint="$run_dir/checkpoints/$(cat "$run_dir/checkpoints/latest")"
rm -rf "$run_dir/hf"
run python tools/convert_checkpoint.py export --checkpoint "$checkpoint" --output "$run_dir/hf" --tokenizer "$data/tokenizer.json"

stage "10/10 the trained model continues a prompt"
run python tools/generate.py --hf "$run_dir/hf" --prompt "The function returns" --max-new-tokens 40 --temperature 0.7 --top-k 20

printf '\n%s' "$(grep 'a step predicted' "$run_dir/summary.txt" || true)"
printf '\nDone in %d s. Loss curve: %s/loss.png   metrics: %s/metrics.jsonl   weights: %s/hf\n' \
    "$((SECONDS - started))" "$run_dir" "$run_dir" "$run_dir"

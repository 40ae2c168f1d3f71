#!/usr/bin/env bash
# Fine-tune a Hugging Face folder on dialogs, and get a Hugging Face folder: the published job of TeleChat2 in one command.
#
#   bash launch/finetune.sh HF_FOLDER OUTPUT DATA [FLAGS OF THE TRAINING ...]
#
#   HF_FOLDER  config.json, weights and tokenizer, such as a published TeleChat2
#   OUTPUT     weights/ (the import), run/ (checkpoints, metrics), hf/ (the result); on a disk that all ranks see
#   DATA       a jsonl file of dialogs, several of them with "," between, or a data.json ({"file.jsonl": copies});
#              with --dpo among the flags, of pairs of a chosen and a rejected answer
#
# Every setting below can be given again behind DATA, where the last one counts: --train-epochs 3 --lr 1e-5 --bf16
# --tensor-model-parallel-size 2 ... docs/finetuning.md has a table from the published flags to these. Without
# --global-batch-size a step has 4 micro-batches on each data-parallel rank. With --dry-run nothing is trained.
#
# Run it again after it was stopped or killed: it goes on from the newest checkpoint, and ends at once where all is done.
# Environment: NPROC (ranks; default: the devices of this machine), LAUNCH (options of tools/launch.py), VENV, PYTHON.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ "$#" -lt 3 ]; then
    # The comment at the head of this file.
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    case "${1:-}" in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi
hf="$1" output="$2" data="$3"
shift 3
if [ -n "${VENV:-}" ] || [ -d "$here/.venv" ]; then export PATH="${VENV:-$here/.venv}/bin:$PATH"; fi
python="${PYTHON:-python}"
export PYTHONUNBUFFERED=1

stop() { printf 'finetune: %s\n' "$*" >&2; exit 2; }
stage() { printf '\n== %s\n' "$*"; }
run() { printf '$'; printf ' %q' "$@"; printf '\n'; "$@"; }

# The value of a flag among those of the training, as "--flag N" or "--flag=N"; the last one counts.
value_of() {
    local name="$1" found="$2" previous="" word
    shift 2
    for word in "$@"; do
        if [ "$previous" = "$name" ]; then found="$word"; fi
        case "${word//_/-}" in "$name="*) found="${word#*=}" ;; esac
        previous="${word//_/-}"
    done
    printf '%s' "$found"
}

# Whether one of the flags before "--" is among those behind it.
given() {
    local names=() name word
    while [ "$1" != "--" ]; do names+=("$1") && shift; done
    shift
    for word in "$@"; do
        for name in "${names[@]}"; do
            case "${word//_/-}" in "$name" | "$name="*) return 0 ;; esac
        done
    done
    return 1
}

[ -e "$hf/config.json" ] || stop "$hf holds no config.json: give a Hugging Face folder with weights and tokenizer"
case "$data" in
    *.json) source=(--data-json "$data") ;;
    *) IFS=, read -r -a files <<<"$data"; source=(--data-path "${files[@]}") ;;
esac

# Ranks: one a device; the CPU is one.
nproc="${NPROC:-}"
if [ -z "$nproc" ]; then
    nproc="$("$python" -c 'import importlib.util as u, torch
if u.find_spec("torch_npu"): import torch_npu
print(max(1, torch.cuda.device_count(), torch.npu.device_count() if hasattr(torch, "npu") else 0))')"
fi
if [ "$nproc" -gt 1 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; fi

# What the published scripts set, or leave at the defaults of transformers' Trainer.
flags=(--config "$output/model.yaml" --finetune --load "$output/weights" --run-dir "$output/run"
    "${source[@]}" --split 1 --tokenizer-model "$hf"
    --seq-length 4096 --micro-batch-size 1 --lr 3e-5 --min-lr 0 --lr-decay-style cosine
    --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 --clip-grad 1.0 --seed 42
    --use-distributed-optimizer --recompute-granularity full --save-interval 100 --keep-last 1 --log-interval 10)
# Of settings that can be said in several ways, only what was said.
if ! given --sft --dpo -- "$@"; then flags+=(--sft); fi
if ! given --fp16 --bf16 --fp32 --precision -- "$@"; then flags+=(--fp16); fi
if ! given --train-iters --train-samples --train-epochs -- "$@"; then flags+=(--train-epochs 1); fi
if ! given --lr-warmup-iters --lr-warmup-tokens --lr-warmup-samples -- "$@"; then flags+=(--lr-warmup-fraction 0.05); fi
flags+=("$@")

stage "1/4 import $hf"
# The files as they are now: weights that were replaced in the meantime are other weights.
state="$(cd "$hf" && LC_ALL=C ls -lL | cksum)"
if [ -e "$output/imported" ]; then
    [ "$(cat "$output/imported")" = "$state" ] || stop "$hf has changed since $output was begun: give another OUTPUT"
    echo "there already: $output/weights"
else
    run "$python" "$here/tools/convert_checkpoint.py" import --hf "$hf" --output "$output/weights" --overwrite \
        --write-config "$output/model.yaml"
    printf '%s\n' "$state" >"$output/imported"
fi

program="$here/pretrain/pretrain_telechat2.py"
if ! given --global-batch-size -- "$@"; then
    # Sizes as the training resolves them, from flags, YAML files and plans.
    resolved="$("$python" "$program" "${flags[@]}" --world-size "$nproc" --print-config=yaml)"
    size() { sed -n "s/^  $1: //p" <<<"$resolved"; }
    model_ranks="$(($(size tensor_model_parallel_size) * $(size pipeline_model_parallel_size) * $(size context_parallel_size)))"
    flags+=(--global-batch-size "$((4 * $(size micro_batch_size) * nproc / model_ranks))")
fi
case " $* " in *" --dry-run "*)
    run "$python" "$program" "${flags[@]}" --world-size "$nproc"
    exit 0
    ;;
esac

stage "2/4 encode and pack the dialogs"
run "$python" "$here/tools/build_index.py" "${flags[@]}" --world-size "$nproc"

stage "3/4 train on $nproc ranks"
# shellcheck disable=SC2086 # LAUNCH holds several words
run "$python" "$here/tools/launch.py" --nproc-per-node "$nproc" ${LAUNCH:-} "$program" "${flags[@]}"

stage "4/4 export"
# Where the training saves, unless a flag says otherwise.
run_dir="$(value_of --run-dir "$output/run" "$@")"
checkpoints="$(value_of --save "$run_dir/checkpoints" "$@")"
rm -rf "$output/hf.new"
run "$python" "$here/tools/convert_checkpoint.py" export --checkpoint "$checkpoints" --output "$output/hf.new"
rm -rf "$output/hf"
mv "$output/hf.new" "$output/hf"

printf 'weights: %s/hf\n' "$output"

#!/bin/bash
# Flags of yanring/Megatron-MoE-ModelZoo, best_practice/qwen3/run_h100_235b.sh @ e8650517; the script around them is ours.
set -euo pipefail
export TP=${TP:-2} PP=${PP:-8} EP=${EP:-32} VPP=${VPP:-4} CP=${CP:-1}
export NNODES=${NNODES:-32} MBS=${MBS:-1} GBS=${GBS:-2048} SEQ_LEN=${SEQ_LEN:-4096}
declare -A SIZES=([tensor]=$TP [pipeline]=$PP [expert]=$EP [context]=$CP)
PARAMS=""
for kind in tensor pipeline; do PARAMS+=" --$kind-model-parallel-size ${SIZES[$kind]}"; done
PARAMS="$PARAMS --expert-model-parallel-size $EP --context-parallel-size $CP --expert-tensor-parallel-size 1"
if [[ $VPP -gt 1 ]]; then PARAMS+=" --num-layers-per-virtual-pipeline-stage $((96 / PP / VPP))"; fi
PARAMS+=" --micro-batch-size $MBS --global-batch-size $GBS --seq-length $SEQ_LEN"
if [[ ! "$PARAMS" =~ "--bf16" ]]; then PARAMS="$PARAMS --bf16"; fi
read -r -d '' MODEL <<'FLAGS' || true
--num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 64
--max-position-embeddings 4096 --moe-ffn-hidden-size 1536 --tokenizer-model Qwen/Qwen3-235B-A22B
--position-embedding-type rope --rotary-base 1000000 --group-query-attention --num-query-groups 4
--kv-channels 128 --qk-layernorm --make-vocab-size-divisible-by 1187 --num-experts 128
--moe-router-topk 8 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3
--moe-router-dtype fp32 --attention-dropout 0.0 --hidden-dropout 0.0
--tokenizer-type HuggingFaceTokenizer --swiglu --normalization RMSNorm
--untie-embeddings-and-output-weights --disable-bias-linear
--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
--recompute-granularity selective --recompute-modules moe_act layernorm
--moe-router-force-load-balancing --moe-token-dispatcher-type flex
--train-samples 585937500 --exit-duration-in-mins 220 --lr-decay-samples 584765624
--lr-warmup-samples 1536000 --lr 3.9e-6 --min-lr 3.9e-7 --lr-decay-style cosine
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --sequence-parallel
FLAGS
export TRAIN="python pretrain_gpt.py $PARAMS ${MODEL//$'\n'/ } $*"
sbatch <<JOB
#!/bin/bash
#SBATCH --nodes=${NNODES}
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
srun --mpi=pmix -l --container-image=${IMAGE:-none} bash -c "$TRAIN" 2>&1 | tee log
JOB

#!/bin/bash
# Flags of yanring/Megatron-MoE-ModelZoo, best_practice/mixtral/run_mixtral_8x22B.sh @ e8650517; the script around them is ours.
set -euo pipefail
export TP=${TP:-2} PP=${PP:-8} EP=${EP:-8} VPP=${VPP:-7} CP=${CP:-1}
export NNODES=${NNODES:-16} MBS=${MBS:-1} GBS=${GBS:-256} SEQ_LEN=${SEQ_LEN:-4096}
declare -A SIZES=([tensor]=$TP [pipeline]=$PP [expert]=$EP [context]=$CP)
PARAMS=""
for kind in tensor pipeline; do PARAMS+=" --$kind-model-parallel-size ${SIZES[$kind]}"; done
PARAMS="$PARAMS --expert-model-parallel-size $EP --context-parallel-size $CP --expert-tensor-parallel-size 1"
[ $VPP = 1 ] || PARAMS+=" --num-layers-per-virtual-pipeline-stage $((56 / PP / VPP))"
PARAMS+=" --micro-batch-size $MBS --global-batch-size $GBS --seq-length $SEQ_LEN"
if [[ ! "$PARAMS" =~ "--bf16" ]]; then PARAMS="$PARAMS --bf16"; fi
read -r -d '' MODEL <<'FLAGS' || true
--num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48
--group-query-attention --num-query-groups 8 --max-position-embeddings 4096 --num-experts 8
--moe-router-load-balancing-type aux_loss --moe-router-topk 2 --moe-aux-loss-coeff 1e-2
--make-vocab-size-divisible-by 128 --attention-dropout 0.0 --hidden-dropout 0.0
--tokenizer-type Llama2Tokenizer --tokenizer-model mixtral/tokenizer.model --swiglu
--normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear
--position-embedding-type rope
--moe-token-dispatcher-type alltoall
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

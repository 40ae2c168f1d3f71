#!/bin/bash
# Flags of alibaba/Pai-Megatron-Patch, examples/deepseek_v3/run_mcore_deepseek.sh @ a098ca5a; the script around them is ours.
set -e
ENV=$1
if [ $ENV = dsw ]; then
    MASTER_ADDR=localhost MASTER_PORT=$(shuf -n 1 -i 10000-65535) NNODES=${NODES:-1} NODE_RANK=0
    GPUS_PER_NODE=`python -c "import torch; print(torch.cuda.device_count())"`
elif [ $ENV = dlc ]; then
    NNODES=${WORLD_SIZE} NODE_RANK=${RANK} GPUS_PER_NODE=${KUBERNETES_CONTAINER_RESOURCE_GPU}
fi
SIZE=$2 BATCH=$3 GLOBAL=$4 LR=$5 SEQ=$6 PR=$7 TP=$8 PP=$9 SP=${10} AC=${11} OUT=${12}
if [ -z ${MP_VP} ]; then vp=""; else vp="--num-layers-per-virtual-pipeline-stage $MP_VP"; fi
LAYERS=61 HIDDEN=7168 HEADS=128 FFN=18432 EP=${EP:-32}
tie="--untie-embeddings-and-output-weights"
gqa="--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm"
uneven="--decoder-last-pipeline-num-layers $(( $LAYERS - ($PP - 1) * 8 ))"
gqa="$gqa $uneven --expert-model-parallel-size $EP --expert-tensor-parallel-size 1"
if [ $AC = full ]; then
    check=$(( ($LAYERS / $PP) % ${MP_AC_LAYERS:=1} ))
    if [ $check != 0 ]; then echo "layers of a stage must be a multiple of $MP_AC_LAYERS"; exit -1; fi
    recompute="--recompute-method uniform --recompute-num-layers $MP_AC_LAYERS --recompute-granularity full"
elif [ $AC = sel ]; then recompute="--recompute-activations"
else recompute=""; fi
[ $PR = bf16 ] && precision="--bf16" || precision="--fp16"
overlap="--overlap-grad-reduce --overlap-param-gather"
if [ $SP = true ] && [ $TP -gt 1 ]; then overlap="--tp-comm-overlap $overlap --sequence-parallel"; fi
mkdir -p "$OUT/checkpoint/"
find -L $HF_DIR -maxdepth 1 -name "*.json" -print0 | xargs -0 cp -t $OUT/checkpoint
ITERS=$(( 1000 * $GLOBAL * $SEQ / $GLOBAL / $SEQ ))
options=" \
    --max-position-embeddings 163840 --extra-vocab-size 467 --patch-tokenizer-type DeepSeekV2Tokenizer \
    --dataset MMAP --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear \
    --num-experts 256 --moe-layer-freq '([0]*3+[1]*58)' --moe-ffn-hidden-size 2048 \
    --moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 --moe-router-group-topk 4 \
    --moe-router-num-groups 8 --moe-router-score-function sigmoid --moe-router-enable-expert-bias \
    --moe-token-dispatcher-type alltoall --attention-dropout 0.0 --hidden-dropout 0.0 \
    --use-distributed-optimizer \
    --save $OUT/checkpoint --lr $LR --micro-batch-size $BATCH --global-batch-size $GLOBAL --train-iters $ITERS \
    --num-layers $LAYERS --hidden-size $HIDDEN --num-attention-heads $HEADS --ffn-hidden-size $FFN \
    --seq-length $SEQ --max-padding-length $SEQ --tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP"
run_cmd="torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR ../deepseek_v2/pretrain_deepseek.py
 $options $precision $recompute $vp $overlap $gqa $tie"
echo ${run_cmd}
eval ${run_cmd}
set +x

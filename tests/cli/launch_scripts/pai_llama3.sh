#!/bin/bash
# Flags of alibaba/Pai-Megatron-Patch, examples/llama3/run_pretrain_mcore_llama.sh @ a098ca5a; the script around them is ours.
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
case $SIZE in
  8B) LAYERS=32 HIDDEN=4096 HEADS=32 FFN=14336 ;;
  70B) LAYERS=80 HIDDEN=8192 HEADS=64 FFN=28672 ;;
esac
tie="--untie-embeddings-and-output-weights" gqa="--group-query-attention --num-query-groups 8"
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
    --max-position-embeddings 8192 --extra-vocab-size 256 --patch-tokenizer-type LLama3Tokenizer \
    --dataset LLama-Pretrain-Idxmap --swiglu --normalization RMSNorm --use-rotary-position-embeddings \
    --position-embedding-type rope --disable-bias-linear --rotary-base 500000 --attention-dropout 0.0 \
    --hidden-dropout 0.0 --use-distributed-optimizer --no-load-optim \
    --save $OUT/checkpoint --lr $LR --micro-batch-size $BATCH --global-batch-size $GLOBAL --train-iters $ITERS \
    --num-layers $LAYERS --hidden-size $HIDDEN --num-attention-heads $HEADS --ffn-hidden-size $FFN \
    --seq-length $SEQ --max-padding-length $SEQ --tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP"
run_cmd="torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR pretrain_llama.py
 $options $precision $recompute $vp $overlap $gqa $tie"
echo ${run_cmd}
eval ${run_cmd}
set +x

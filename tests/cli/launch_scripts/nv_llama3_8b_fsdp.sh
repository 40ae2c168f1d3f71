#!/bin/bash
# Flags of NVIDIA/Megatron-LM, examples/megatron_fsdp/train_llama3_8b_fsdp_h100_fp8.sh @ d98e8a64; the script around them is ours.
set -euo pipefail
NODES=${NODES:-1}
DEVICES=8
DIST=(--nproc_per_node $DEVICES --nnodes $NODES --node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-localhost} --master_port 6000)
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
    --max-position-embeddings 8192 --rotary-base 1000000 --attention-dropout 0.0 --hidden-dropout 0.0
    --swiglu --normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear
    --position-embedding-type rope
)
PARALLEL=(
    --tensor-model-parallel-size 1 --context-parallel-size 1 --use-megatron-fsdp
    --data-parallel-sharding-strategy optim_grads_params
)
RUN=(
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --exit-duration-in-mins 235
    --fp8-format hybrid --fsdp-double-buffer --use-nccl-ub --mock-data --tokenizer-type NullTokenizer
    --vocab-size 128256 --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
[ -d /data/corpus ] || echo "no corpus here"
torchrun "${DIST[@]}" pretrain_gpt.py "${MODEL[@]}" "${PARALLEL[@]}" "${RUN[@]}" 2>&1 | tee train.log

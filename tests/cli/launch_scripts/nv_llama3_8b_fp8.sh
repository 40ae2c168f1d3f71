#!/bin/bash
# Flags of NVIDIA/Megatron-LM, examples/llama/train_llama3_8b_h100_fp8.sh @ d98e8a64; the script around them is ours.
set -euo pipefail
DTYPE=fp8
NODES=${NODES:-1}
DEVICES=8
DIST=(--nproc_per_node $DEVICES --nnodes $NODES --node_rank ${NODE_RANK:-0} --master_addr ${MASTER_ADDR:-localhost} --master_port 6000)
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
    --max-position-embeddings 8192 --rotary-base 1000000 --rotary-percent 1.0 --attention-backend fused
    --apply-layernorm-1p --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --normalization RMSNorm
    --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
)
PARALLEL=(
    --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
)
RUN=(
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000
    --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
    --lr-decay-style cosine --decoupled-lr 5.0e-4 --clip-grad 1.0 --bf16 --grad-reduce-in-bf16
    --cross-entropy-loss-fusion --calculate-per-token-loss --exit-duration-in-mins 235
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --fp8-format hybrid
    --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather --mock-data
    --tokenizer-type NullTokenizer --vocab-size 128256 --tiktoken-pattern v2
)
[ -d /data/corpus ] || echo "no corpus here"
torchrun "${DIST[@]}" pretrain_gpt.py "${MODEL[@]}" "${PARALLEL[@]}" "${RUN[@]}" 2>&1 | tee train.log

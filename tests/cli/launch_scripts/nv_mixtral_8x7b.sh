#!/bin/bash
# Flags of NVIDIA/Megatron-LM, examples/mixtral/train_mixtral_8x7b_distributed.sh @ d98e8a64; the script around them is ours.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=1
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))
CKPT=$1   # where the checkpoints go
DATA=$2
if [ -z "$DATA" ]; then echo "usage: $0 CHECKPOINTS DATA"; exit 1; fi

DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK"
MODEL_ARGS="
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \
    --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 32768 \
    --rotary-base 1000000 --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall \
    --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --normalization RMSNorm \
    --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
"
PARALLEL_ARGS="
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 \
    --sequence-parallel
"
RUN_ARGS="
    --micro-batch-size 1 --global-batch-size 256 --train-iters 500000 --lr 1e-4 --min-lr 1.0e-5 \
    --lr-decay-style cosine --lr-warmup-iters 500 --tokenizer-type Llama2Tokenizer --tokenizer-model $3 \
    --no-load-optim --no-load-rng --bf16 --use-distributed-optimizer --overlap-grad-reduce \
    --overlap-param-gather
    --save $CKPT --load $CKPT --data-path $DATA
"
cmd="torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $MODEL_ARGS $PARALLEL_ARGS $RUN_ARGS"
echo $cmd
eval $cmd

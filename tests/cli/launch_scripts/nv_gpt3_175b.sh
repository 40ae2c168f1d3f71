#!/bin/bash
# Flags of NVIDIA/Megatron-LM, examples/gpt3/train_gpt3_175b_distributed.sh @ d98e8a64; the script around them is ours.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=1
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))
CKPT=$1   # where the checkpoints go
DATA=$2
if [ -z "$DATA" ]; then echo "usage: $0 CHECKPOINTS DATA"; exit 1; fi

DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK"
MODEL_ARGS="
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 \
    --max-position-embeddings 2048 --attention-backend auto
"
PARALLEL_ARGS="
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
"
RUN_ARGS="
    --micro-batch-size 1 --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-iters 500000 \
    --weight-decay 0.1 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 \
    --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000 \
    --vocab-file $3 --merge-file $4 --split 949,50,1
    --save $CKPT --load $CKPT --data-path $DATA
"
cmd="torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $MODEL_ARGS $PARALLEL_ARGS $RUN_ARGS"
echo $cmd
eval $cmd

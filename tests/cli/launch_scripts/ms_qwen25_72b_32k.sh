#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/qwen25/pretrain_qwen25_72b_32k_ptd.sh @ c77308a1; the script around them is ours.
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=8
MASTER_ADDR=localhost # the first node
NNODES=16
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_PATH="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
DISTRIBUTED_ARGS="--nproc_per_node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
PARALLEL="
    --context-parallel-size 4 --context-parallel-algo megatron_cp_algo --tensor-model-parallel-size 8 \
    --pipeline-model-parallel-size 4 --sequence-parallel
"
MODEL="
    --num-layers 80 --num-layer-list 17,20,22,21 --hidden-size 8192 --ffn-hidden-size 29568 \
    --num-attention-heads 64 --group-query-attention --num-query-groups 8 --add-qkv-bias \
    --seq-length 32768 --max-position-embeddings 32768 --padded-vocab-size 152064 --rotary-base 1000000 \
    --swiglu --normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear \
    --position-embedding-type rope
"
OTHER="
    --micro-batch-size 1 --global-batch-size 32 --use-flash-attn --use-fused-rotary-pos-emb \
    --use-rotary-position-embeddings --use-fused-swiglu --use-fused-rmsnorm --no-masked-softmax-fusion \
    --attention-softmax-in-fp32 --handler-name GeneralPretrainHandler --enable-hf2mg-convert \
    --transformer-impl local --make-vocab-size-divisible-by 1 --attention-dropout 0.0 \
    --hidden-dropout 0.0 --train-iters 2000 --lr 1.0e-5 --min-lr 1.0e-7 --bf16 \
    --use-distributed-optimizer --no-shared-storage \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path ${TOKENIZER_PATH}
"
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $PARALLEL $MODEL $EXTRA_ARGS $OTHER \
    --data-path $DATA_PATH --split 100,0,0 --log-interval 1 --save-interval 2000 \
    --load ${CKPT_LOAD_DIR} --save ${CKPT_SAVE_DIR} \
    --distributed-backend nccl | tee logs/train_ms_qwen25_72b_32k.log

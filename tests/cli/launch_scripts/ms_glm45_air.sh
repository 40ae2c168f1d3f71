#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/glm45-air/pretrain_glm45_air_106b_4k_A3_ptd.sh @ c77308a1; the script around them is ours.
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=16
MASTER_ADDR=localhost # the first node
NNODES=8
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_PATH="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
DISTRIBUTED_ARGS="--nproc_per_node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
PARALLEL="
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 16
"
MODEL="
    --num-layers 48 --noop-layers 1,47 --mtp-num-layers 1 --hidden-size 4096 --ffn-hidden-size 10944 \
    --num-attention-heads 96 --kv-channels 128 --group-query-attention --num-query-groups 8 \
    --add-qkv-bias --seq-length 4096 --max-position-embeddings 131072 --padded-vocab-size 151552 \
    --rotary-percent 0.5 --first-k-dense-replace 1 --moe-layer-freq 1 --n-shared-experts 1 \
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 1408 --moe-router-score-function sigmoid \
    --moe-router-enable-expert-bias --swiglu --normalization RMSNorm \
    --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
"
OTHER="
    --micro-batch-size 1 --global-batch-size 64 --recompute-granularity full --recompute-method uniform \
    --recompute-num-layers 1 --use-flash-attn --use-fused-rotary-pos-emb \
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
    --distributed-backend nccl | tee logs/train_ms_glm45_air.log

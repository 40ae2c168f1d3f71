#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/phi35/pretrain_phi35_moe_ptd.sh @ c77308a1; the script around them is ours.
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=8
MASTER_ADDR=localhost # the first node
NNODES=2
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_PATH="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
DISTRIBUTED_ARGS="--nproc_per_node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
PARALLEL="
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 \
    --num-layers-per-virtual-pipeline-stage 2 --sequence-parallel
"
MODEL="
    --spec mindspeed_llm.tasks.models.spec.phi35_moe_spec layer_spec --num-layers 32 --hidden-size 4096 \
    --ffn-hidden-size 6400 --num-attention-heads 32 --group-query-attention --num-query-groups 8 \
    --add-qkv-bias --add-dense-bias --seq-length 4096 --max-position-embeddings 131072 \
    --padded-vocab-size 32064 --rope-scaling-type longrope --num-experts 16 --moe-router-topk 2 \
    --moe-layer-freq -1 --first-k-dense-replace -1 --moe-router-load-balancing-type sparsemixer_topk \
    --moe-input-jitter-eps 0.01 --swiglu --normalization RMSNorm --untie-embeddings-and-output-weights \
    --disable-bias-linear --position-embedding-type rope
"
OTHER="
    --micro-batch-size 1 --global-batch-size 64 --use-flash-attn --use-fused-rotary-pos-emb \
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
    --distributed-backend nccl | tee logs/train_ms_phi35_moe.log

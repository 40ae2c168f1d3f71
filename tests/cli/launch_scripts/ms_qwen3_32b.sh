#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/qwen3/pretrain_qwen3_32b_4K_ptd_A3.sh @ c77308a1; the script around them is ours.
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=16
MASTER_ADDR=localhost # the first node
NNODES=1
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_PATH="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
DISTRIBUTED_ARGS="--nproc_per_node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
PARALLEL="
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 \
    --num-layers-per-virtual-pipeline-stage 4 --sequence-parallel
"
MODEL="
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --num-layers 64 --hidden-size 5120 \
    --ffn-hidden-size 25600 --num-attention-heads 64 --kv-channels 128 --qk-layernorm \
    --group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 \
    --padded-vocab-size 151936 --rotary-base 1000000 --swiglu --normalization RMSNorm \
    --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
"
OTHER="
    --micro-batch-size 2 --global-batch-size 256 --reset-attention-mask --use-ascend-coc \
    --use-flash-attn --use-fused-rotary-pos-emb --use-rotary-position-embeddings --use-fused-swiglu \
    --use-fused-rmsnorm --no-masked-softmax-fusion --attention-softmax-in-fp32 \
    --handler-name GeneralPretrainHandler --enable-hf2mg-convert --transformer-impl local \
    --make-vocab-size-divisible-by 1 --attention-dropout 0.0 --hidden-dropout 0.0 --train-iters 2000 \
    --lr 1.0e-5 --min-lr 1.0e-7 --bf16 --use-distributed-optimizer --no-shared-storage \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path ${TOKENIZER_PATH}
"
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $PARALLEL $MODEL $EXTRA_ARGS $OTHER \
    --data-path $DATA_PATH --split 100,0,0 --log-interval 1 --save-interval 2000 \
    --load ${CKPT_LOAD_DIR} --save ${CKPT_SAVE_DIR} \
    --distributed-backend nccl | tee logs/train_ms_qwen3_32b.log

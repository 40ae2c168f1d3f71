#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/deepseek2_lite/pretrain_deepseek2_lite_16b_ptd_16p.sh @ c77308a1; the script around them is ours.
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
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --expert-model-parallel-size 8
"
MODEL="
    --spec mindspeed_llm.tasks.models.spec.deepseek_spec layer_spec --num-layers 27 --hidden-size 2048 \
    --ffn-hidden-size 10944 --num-attention-heads 16 --seq-length 4096 --max-position-embeddings 163840 \
    --vocab-size 102400 --padded-vocab-size 102400 --multi-latent-attention --qk-pos-emb-head-dim 64 \
    --qk-head-dim 128 --kv-lora-rank 512 --v-head-dim 128 --qk-layernorm --first-k-dense-replace 1 \
    --moe-layer-freq 1 --n-shared-experts 2 --num-experts 64 --moe-router-topk 6 \
    --moe-ffn-hidden-size 1408 --moe-router-load-balancing-type pai_megatron_aux_loss \
    --moe-aux-loss-coeff 0.01 --swiglu --normalization RMSNorm --untie-embeddings-and-output-weights \
    --disable-bias-linear --position-embedding-type rope
"
OTHER="
    --micro-batch-size 1 --global-batch-size 128 --use-flash-attn --use-fused-rotary-pos-emb \
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
    --distributed-backend nccl | tee logs/train_ms_deepseek2_lite.log

#!/bin/bash
# Flags of Ascend/MindSpeed-LLM, examples/mcore/deepseek3/pretrain_deepseek3_671b_4k_ptd.sh @ c77308a1; the script around them is ours.
export HCCL_CONNECT_TIMEOUT=1800
NPUS_PER_NODE=8
MASTER_ADDR=localhost # the first node
NNODES=64
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
CKPT_SAVE_DIR="your model save ckpt path"
DATA_PATH="your data path"
TOKENIZER_PATH="your tokenizer path"
CKPT_LOAD_DIR="your model ckpt path"
DISTRIBUTED_ARGS="--nproc_per_node $NPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port 6000"
PARALLEL="
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 8 --expert-model-parallel-size 32 \
    --expert-tensor-parallel-size 1 --sequence-parallel --context-parallel-size 1 \
    --context-parallel-algo ulysses_cp_algo --schedules-method dualpipev --moe-fb-overlap
"
MODEL="
    --spec mindspeed_llm.tasks.models.spec.deepseek_spec layer_spec --num-layers 64 \
    --noop-layers 61,62,63 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 \
    --seq-length 4096 --max-position-embeddings 163840 --vocab-size 129280 --padded-vocab-size 129280 \
    --rotary-base 10000 --norm-epsilon 1e-6 --beta-fast 32 --beta-slow 1 --rope-scaling-factor 40 \
    --rope-scaling-type yarn --first-k-dense-replace 3 --moe-layer-freq 1 --n-shared-experts 1 \
    --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 \
    --moe-router-load-balancing-type none --moe-router-num-groups 8 --moe-router-group-topk 4 \
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --mtp-num-layers 1 \
    --mtp-loss-scaling-factor 0.3 --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 \
    --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --swiglu \
    --normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear \
    --position-embedding-type rope
"
OTHER="
    --micro-batch-size 1 --global-batch-size 3840 --recompute-granularity full \
    --recompute-method uniform --recompute-num-layers 1 --swap-optimizer --use-flash-attn \
    --use-fused-rotary-pos-emb --use-rotary-position-embeddings --use-fused-swiglu --use-fused-rmsnorm \
    --no-masked-softmax-fusion --attention-softmax-in-fp32 --handler-name GeneralPretrainHandler \
    --enable-hf2mg-convert --transformer-impl local --make-vocab-size-divisible-by 1 \
    --attention-dropout 0.0 --hidden-dropout 0.0 --train-iters 2000 --lr 1.0e-5 --min-lr 1.0e-7 --bf16 \
    --use-distributed-optimizer --no-shared-storage \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path ${TOKENIZER_PATH}
"
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $PARALLEL $MODEL $EXTRA_ARGS $OTHER \
    --data-path $DATA_PATH --split 100,0,0 --log-interval 1 --save-interval 2000 \
    --load ${CKPT_LOAD_DIR} --save ${CKPT_SAVE_DIR} \
    --distributed-backend nccl | tee logs/train_ms_deepseek3_671b.log

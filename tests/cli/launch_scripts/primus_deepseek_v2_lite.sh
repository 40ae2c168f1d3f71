#!/bin/bash
# Flags of AMD-AGI/Primus, examples/megatron/configs/MI300X/deepseek_v2_lite-BF16-pretrain.yaml @ fd1eeabb; the script around them is ours.
# The original keeps these flags in a YAML file.
run_env() { : "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${PRIMUS_TP:=1}" "${PRIMUS_PP:=1}" "${PRIMUS_EP:=8}"; export NNODES GPUS_PER_NODE; }
run_env
launch() {
  local program=$1; shift
  local -a dist=(--nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}")
  local cmd=(torchrun "${dist[@]}" "$program" "$@")
  printf '%q ' "${cmd[@]}"; echo
  "${cmd[@]}"
}
MODEL=$(tr '\n' ' ' <<'FLAGS'
--num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --num-attention-heads 16
--multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
--v-head-dim 128 --qk-layernorm --num-experts 64 --moe-layer-freq [0]*1+[1]*26
--moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816 --moe-router-topk 6
--max-position-embeddings 163840 --seq-length 4096 --tokenizer-type DeepSeekV2Tokenizer
--tokenizer-model deepseek-ai/DeepSeek-V2-Lite --make-vocab-size-divisible-by 3200
--attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --normalization RMSNorm
--untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
--micro-batch-size 4 --global-batch-size 640 --train-iters 50 --lr 1.0e-5 --mock-data
--moe-use-legacy-grouped-gemm --bf16 --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather
FLAGS
)
launch pretrain_gpt.py $MODEL --tensor-model-parallel-size $PRIMUS_TP --pipeline-model-parallel-size $PRIMUS_PP \
    --expert-model-parallel-size $PRIMUS_EP "$@"

#!/bin/bash
# Flags of AMD-AGI/Primus, examples/megatron/configs/MI300X/llama3.1_70B-BF16-pretrain.yaml @ fd1eeabb; the script around them is ours.
# The original keeps these flags in a YAML file.
run_env() { : "${NNODES:=1}" "${GPUS_PER_NODE:=8}" "${PRIMUS_TP:=1}" "${PRIMUS_PP:=1}" "${PRIMUS_EP:=1}"; export NNODES GPUS_PER_NODE; }
run_env
launch() {
  local program=$1; shift
  local -a dist=(--nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}")
  local cmd=(torchrun "${dist[@]}" "$program" "$@")
  printf '%q ' "${cmd[@]}"; echo
  "${cmd[@]}"
}
MODEL=$(tr '\n' ' ' <<'FLAGS'
--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
--group-query-attention --num-query-groups 8 --swiglu --normalization RMSNorm
--untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
--max-position-embeddings 8192 --seq-length 8192 --rotary-base 500000
--tokenizer-type Llama3Tokenizer --tokenizer-model meta-llama/Llama-3.1-70B --attention-dropout 0.0
--hidden-dropout 0.0
--micro-batch-size 3 --global-batch-size 24 --train-iters 50 --lr 1.0e-5 --bf16 --use-torch-fsdp2
--no-gradient-accumulation-fusion --ckpt-format torch_dist --recompute-granularity full
--recompute-method block --recompute-num-layers 80 --mock-data --enable-primus-turbo
--use-turbo-attention --cross-entropy-loss-fusion
FLAGS
)
launch pretrain_gpt.py $MODEL --tensor-model-parallel-size $PRIMUS_TP --pipeline-model-parallel-size $PRIMUS_PP \
    --expert-model-parallel-size $PRIMUS_EP "$@"

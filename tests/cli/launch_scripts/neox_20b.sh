#!/bin/bash
# Flags of EleutherAI/gpt-neox, configs/20B.yml @ ea7aefd8; the script around them is ours.
# The original keeps its settings in a YAML file of its own; these are the flags of the same model and batch.
H=6144; L=44; A=64
model="--num-layers $L --hidden-size $H --num-attention-heads $A --seq-length 2048 --max-position-embeddings 2048"
model+=" --position-embedding-type rope --rotary-percent 0.25 --untie-embeddings-and-output-weights --normalization LayerNorm"
model+=" --tokenizer-type HFTokenizer --tokenizer-model ./20B_checkpoints/gpt-neox-20b.json --make-vocab-size-divisible-by 128"
micro=4 accumulate=32 replicas=12
batch=$((micro * accumulate * replicas))
deepspeed --num_gpus 8 --num_nodes 12 train.py $model --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 \
  --micro-batch-size $micro --global-batch-size ${batch} --fp16 --checkpoint-activations --lr 0.97e-4 --min-lr 0.97e-5 \
  --train-iters 150000 --weight-decay 0.01 --attention-dropout 0 --hidden-dropout 0 --zero-stage 1

#!/bin/bash
# Flags of FlagOpen/FlagScale, examples/aquila/70B/pretrain_aquila_70b_distributed_A800_96n_80g.sh @ 3f328ff0; the script around them is ours.
set -u
  PROJ_HOME=$1
  HOSTFILE=$2
  DATA_PATH=$3
set +u
mkdir -p $PROJ_HOME/logs
cp $0 $PROJ_HOME/logs/
export NODE_ADDR=$(ifconfig eth0|grep inet|awk '{print $2;}'|head -n 1)
export NNODES=$(cat $HOSTFILE | wc -l)
export MASTER_ADDR=$(head -n1 $HOSTFILE | awk '{print $1;}')
NODE_RANK=$(awk '{ranks[$1]=(FNR-1);}END{print ranks["'$NODE_ADDR'"];}' $HOSTFILE)
DISTRIBUTED_ARGS="
    --nproc_per_node 8 \
    --nnodes $NNODES \
    --node_rank $NODE_RANK \
    --master_addr $MASTER_ADDR
"
NETWORK_ARGS="
    --num-layers 80 --hidden-size 8192 --num-attention-heads 64 --group-query-attention \
    --num-query-groups 8 --apply-layernorm-rms --layernorm-init-weight 0.25 --layernorm-epsilon 1e-5 \
    --use-rotary-position-embeddings --no-position-embedding --swiglu --multiple-of 4096 \
    --hidden-dim-multiplier 1.3 --untie-embeddings-and-output-weights --disable-bias-linear \
    --seq-length 4096 --max-position-embeddings 4096 --tokenizer-type AquilaTokenizer \
    --vocab-size 100008 --make-vocab-size-divisible-by 64 --vocab-file tokenizer/vocab.json \
    --merge-file tokenizer/merges.txt --special-tokens-file tokenizer/special.txt \
    --attention-dropout 0.0 --hidden-dropout 0.0
"
TRAINING_ARGS="
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --micro-batch-size 2 \
    --global-batch-size 1056 --rampup-batch-size 48 48 2000000 --embedding-weights-in-fp32 --lr 1.5e-4 \
    --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-samples 500000 --train-samples 488281250 \
    --rampup-save-interval 5000 --bf16 --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 \
    --use-flash-attn --sequence-parallel --use-distributed-optimizer \
    --data-path $DATA_PATH
"
cmd="torchrun $DISTRIBUTED_ARGS pretrain_gpt.py \
              $NETWORK_ARGS \
              $TRAINING_ARGS
    "
echo $cmd
eval $cmd

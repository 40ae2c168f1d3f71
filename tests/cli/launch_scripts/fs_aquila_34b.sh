#!/bin/bash
# Flags of FlagOpen/FlagScale, examples/aquila/34B/pretrain_aquila_34b_distributed_A100_64n_40g.sh @ 43b8604d; the script around them is ours.
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
    --num-layers 60 --hidden-size 6144 --num-attention-heads 48 --group-query-attention \
    --num-query-groups 8 --normalization RMSNorm --norm-init-weight 0.3 --use-rotary-position-embeddings \
    --no-position-embedding --swiglu --multiple-of 4096 --hidden-dim-multiplier 1.3 \
    --untie-embeddings-and-output-weights --disable-bias-linear --seq-length 4096 \
    --max-position-embeddings 4096 --tokenizer-type AquilaTokenizer --vocab-size 100008 \
    --make-vocab-size-divisible-by 64 --vocab-file tokenizer/vocab.json \
    --merge-file tokenizer/merges.txt --special-tokens-file tokenizer/special.txt \
    --attention-dropout 0.0 --hidden-dropout 0.0
"
TRAINING_ARGS="
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --micro-batch-size 1 \
    --global-batch-size 1024 --rampup-batch-size 32 32 2000000 --lr 1.5e-4 --min-lr 1.5e-5 \
    --lr-decay-style cosine --lr-warmup-samples 500000 --train-samples 488281250 \
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

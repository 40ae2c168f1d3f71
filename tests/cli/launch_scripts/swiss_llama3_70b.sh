#!/bin/bash
# Flags of swiss-ai/Megatron-LM, submit-llama3-70b.sh @ 81d44dbe; the script around them is ours.
#SBATCH --job-name=llama3-70b
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
MBS=1
GBS=1024
TRANSFORMER_ENGINE_ARGS=(--transformer-impl transformer_engine --use-precision-aware-optimizer --main-grads-dtype bf16)
NETWORK_ARGS=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
    --group-query-attention --num-query-groups 8 --swiglu --normalization RMSNorm
    --untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
    --max-position-embeddings 8192 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8
    --make-vocab-size-divisible-by 128
)
TRAINING=(--micro-batch-size $MBS --global-batch-size $GBS --train-samples 51200 --no-check-for-nan-in-loss-and-grad --trigger-path $PWD/triggers)
SCHEDULE=(--lr 0.00015 --min-lr 0.000015 --lr-decay-style cosine --lr-warmup-iters 0)
DISTRIBUTED=(--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 8
    --num-layers-per-virtual-pipeline-stage 5 --context-parallel-size 1 --use-distributed-optimizer
    --overlap-grad-reduce --overlap-param-gather --defer-embedding-wgrad-compute --wgrad-deferral-limit 22)
DATA=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model nvidia/OpenMath2-Llama3.1-8B --seq-length 8192
    --reset-position-ids --reset-attention-mask --eod-mask-loss --mock-data)
TORCHRUN_ARGS=(--nproc-per-node $SLURM_GPUS_PER_NODE --nnodes $SLURM_NNODES --rdzv_endpoint $MASTER_ADDR:25678 --rdzv_backend c10d)
CMD_PREFIX="numactl --membind=0-3"
TRAINING_CMD="torchrun ${TORCHRUN_ARGS[@]} pretrain_gpt.py ${TRANSFORMER_ENGINE_ARGS[@]} ${NETWORK_ARGS[@]} ${TRAINING[@]} ${SCHEDULE[@]} \
    --bf16 --attention-dropout 0.0 --hidden-dropout 0.0 ${DISTRIBUTED[@]} ${DATA[@]}"
srun -lu --cpus-per-task $SLURM_CPUS_PER_TASK --wait 60 bash -c "$CMD_PREFIX $TRAINING_CMD"
echo "END TIME: $(date)"

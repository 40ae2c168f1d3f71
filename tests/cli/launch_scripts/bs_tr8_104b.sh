#!/bin/bash
# Flags of bigscience-workshop/bigscience, train/tr8-104B-wide/tr8-104B.slurm @ 9e64edec; the script around them is ours.
#SBATCH --job-name=bs_tr8_104b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1   # one launcher a node
#SBATCH --gres=gpu:4
#SBATCH --time=20:00:00
set -x -e
source $WORK/start-bs_tr8_104b
cd $WORK/code
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
GPUS_PER_NODE=4
cat <<CONFIG > ds_config.$SLURM_JOBID.json
{"train_batch_size": 1, "fp16": {"enabled": true}}
CONFIG
MODEL_ARGS=" \
    --num-layers 64 --hidden-size 11600 --num-attention-heads 80 --seq-length 2048 \
    --max-position-embeddings 2048 --vocab-file $WORK/gpt2-vocab.json --merge-file $WORK/gpt2-merges.txt \
    --embed-layernorm --loss-scale 12 --init-method-std 0.006 \
    "
RUN_ARGS=" \
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 32 --micro-batch-size 1 \
    --rampup-batch-size 16 16 6_000_000 --global-batch-size 2048 \
    --train-samples 300_000_000 --lr 6e-5 --min-lr 6e-6 --lr-decay-samples 126_953_125 \
    --lr-warmup-samples 216_320 --exit-duration-in-mins 1190 --fp16 --checkpoint-activations --deepspeed \
    --zero-stage 1 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --lr-decay-style cosine \
    --clip-grad 1.0 --weight-decay 1e-1 --log-interval 1 --data-impl mmap --distributed-backend nccl \
    "
export LAUNCHER="python -u -m torch.distributed.run --nproc_per_node $GPUS_PER_NODE --nnodes $SLURM_NNODES \
    --rdzv_endpoint $MASTER_ADDR:6000 --rdzv_backend c10d --max_restarts 0 --tee 3"
export CMD="`pwd`/pretrain_gpt.py $MODEL_ARGS $RUN_ARGS --deepspeed_config ./ds_config.$SLURM_JOBID.json"
clear; srun --jobid $SLURM_JOBID bash -c "$LAUNCHER --node_rank \$SLURM_PROCID $CMD" 2>&1 | tee -a $WORK/log.txt
echo "ended at $(date)"

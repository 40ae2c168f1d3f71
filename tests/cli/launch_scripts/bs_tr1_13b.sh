#!/bin/bash
# Flags of bigscience-workshop/bigscience, train/tr1-13B-base/tr1-13B-round1.slurm @ 9e64edec; the script around them is ours.
#SBATCH --job-name=bs_tr1_13b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1   # one launcher a node
#SBATCH --gres=gpu:4
#SBATCH --time=20:00:00
set -x -e
source $WORK/start-bs_tr1_13b
cd $WORK/code
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
GPUS_PER_NODE=4
cat <<CONFIG > ds_config.$SLURM_JOBID.json
{"train_batch_size": 1, "fp16": {"enabled": true}}
CONFIG
MODEL_ARGS=" \
    --num-layers 40 --hidden-size 5120 --ffn-hidden-size 20480 --num-attention-heads 32 \
    --seq-length 2048 --max-position-embeddings 2048 --vocab-file $WORK/gpt2-vocab.json \
    --merge-file $WORK/gpt2-merges.txt --loss-scale 12 \
    "
RUN_ARGS=" \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --micro-batch-size 1 \
    --rampup-batch-size 16 16 5_000_000 --global-batch-size 1024 \
    --train-samples 300_000_000 --lr 1e-4 --min-lr 1e-5 --lr-decay-samples 126_953_125 \
    --lr-warmup-samples 216_320 --exit-duration-in-mins 1190 --fp16 --checkpoint-activations --deepspeed \
    --zero-stage 1 --codecarbon-dir $WORK/carbon --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 \
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 1e-1 --log-interval 1 --data-impl mmap \
    --distributed-backend nccl \
    "
export LAUNCHER="python -u -m torch.distributed.run --nproc_per_node $GPUS_PER_NODE --nnodes $SLURM_NNODES \
    --rdzv_endpoint $MASTER_ADDR:6000 --rdzv_backend c10d --max_restarts 0 --tee 3"
export CMD="`pwd`/pretrain_gpt.py $MODEL_ARGS $RUN_ARGS --deepspeed_config ./ds_config.$SLURM_JOBID.json"
clear; srun --jobid $SLURM_JOBID bash -c "$LAUNCHER --node_rank \$SLURM_PROCID $CMD" 2>&1 | tee -a $WORK/log.txt
echo "ended at $(date)"

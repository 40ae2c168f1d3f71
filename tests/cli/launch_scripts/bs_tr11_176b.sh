#!/bin/bash
# Flags of bigscience-workshop/bigscience, train/tr11-176B-ml/tr11-176B-ml.slurm @ 9e64edec; the script around them is ours.
#SBATCH --job-name=bs_tr11_176b
#SBATCH --nodes=24
#SBATCH --ntasks-per-node=1   # one launcher a node
#SBATCH --gres=gpu:8
#SBATCH --time=20:00:00
set -x -e
source $WORK/start-bs_tr11_176b
cd $WORK/code
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
GPUS_PER_NODE=8
cat <<CONFIG > ds_config.$SLURM_JOBID.json
{"train_batch_size": 1, "fp16": {"enabled": true}}
CONFIG
MODEL_ARGS=" \
    --pp-partition-method type:transformer --num-layers 70 --hidden-size 14336 --num-attention-heads 112 \
    --seq-length 2048 --max-position-embeddings 2048 --embed-layernorm --sync-tp-duplicated-parameters \
    --position-embedding-type alibi --abort-on-unmet-fused-kernel-constraints --pad-vocab-size-to 250880 \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path $WORK/tokenizer \
    "
RUN_ARGS=" \
    --tensor-model-parallel-size 4 --pipeline-model-parallel-size 12 --micro-batch-size 2 \
    --rampup-batch-size 192 16 9_765_625 --global-batch-size 2048 \
    --train-samples 220_000_000 --lr 6e-5 --min-lr 6e-6 --lr-decay-samples 200_000_000 \
    --lr-warmup-samples 183_105 --exit-duration-in-mins 5990 --bf16 --checkpoint-activations --deepspeed \
    --zero-stage 0 --deepspeed-activation-checkpointing \
    --train-weighted-split-paths-path $WORK/train-splits.txt --optimizer adam --adam-beta1 0.9 \
    --adam-beta2 0.95 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 1e-1 --log-interval 1 \
    --data-impl mmap --distributed-backend nccl \
    "
export LAUNCHER="python -u -m torch.distributed.run --nproc_per_node $GPUS_PER_NODE --nnodes $SLURM_NNODES \
    --rdzv_endpoint $MASTER_ADDR:6000 --rdzv_backend c10d --max_restarts 0 --tee 3"
export CMD="`pwd`/pretrain_gpt.py $MODEL_ARGS $RUN_ARGS --deepspeed_config ./ds_config.$SLURM_JOBID.json"
clear; srun --jobid $SLURM_JOBID bash -c "$LAUNCHER --node_rank \$SLURM_PROCID $CMD" 2>&1 | tee -a $WORK/log.txt
echo "ended at $(date)"

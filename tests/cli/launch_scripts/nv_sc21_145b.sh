#!/bin/bash
# Flags of NVIDIA/Megatron-LM, examples/academic_paper_scripts/sc21/run_table_1.sh @ d98e8a64; the script around them is ours.
SIZE=${SIZE:-145B}
case $SIZE in
  39B) TP=8 PP=2 MBS=4 GBS=1536 LAYERS=48 HIDDEN=8192 HEADS=64 NODES=64 MORE="" ;;
  145B) TP=8 PP=8 MBS=2 GBS=2304 LAYERS=80 HIDDEN=12288 HEADS=96 NODES=192 MORE="--num-layers-per-virtual-pipeline-stage 5" ;;
  *) echo "no such size: $SIZE"; exit 1 ;;
esac
options=" \
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} \
    --micro-batch-size ${MBS} --global-batch-size ${GBS} \
    --num-layers ${LAYERS} --hidden-size ${HIDDEN} --num-attention-heads ${HEADS} \
    --seq-length 2048 --max-position-embeddings 2048 --DDP-impl local \
    --vocab-file $BPE_VOCAB --merge-file $BPE_MERGES --data-path $CORPUS \
    --activations-checkpoint-method uniform --train-iters 500 --lr-decay-iters 320 --lr 0.0001 --min-lr 0.00001 \
    --lr-decay-style cosine --lr-warmup-fraction 0.01 --clip-grad 1.0 --fp16 --loss-scale 8192 $MORE"
run_cmd="cd $(pwd) && python -u pretrain_gpt.py ${options}"
sbatch --nodes $NODES --ntasks-per-node 8 --wrap "srun -l bash -c '${run_cmd}'"

#!/bin/bash
# Flags of yanring/Megatron-MoE-ModelZoo, model_configs/benchmarking/DeepSeek-V2.yaml @ e8650517; the script around them is ours.
set -euo pipefail
export TP=${TP:-1} PP=${PP:-16} EP=${EP:-8} VPP=${VPP:-1} CP=${CP:-1}
export NNODES=${NNODES:-32} MBS=${MBS:-1} GBS=${GBS:-1024} SEQ_LEN=${SEQ_LEN:-4096}
declare -A SIZES=([tensor]=$TP [pipeline]=$PP [expert]=$EP [context]=$CP)
PARAMS=""
for kind in tensor pipeline; do PARAMS+=" --$kind-model-parallel-size ${SIZES[$kind]}"; done
PARAMS="$PARAMS --expert-model-parallel-size $EP --context-parallel-size $CP --expert-tensor-parallel-size 1"
if [[ $((60 % PP)) -ne 0 ]]; then PARAMS+=" --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 2"; fi
PARAMS+=" --micro-batch-size $MBS --global-batch-size $GBS --seq-length $SEQ_LEN"
if [[ ! "$PARAMS" =~ "--bf16" ]]; then PARAMS="$PARAMS --bf16"; fi
read -r -d '' MODEL <<'FLAGS' || true
--num-layers 60 --hidden-size 5120 --ffn-hidden-size 12288 --num-attention-heads 128
--kv-channels 128 --max-position-embeddings 4096 --make-vocab-size-divisible-by 3200
--num-experts 160 --moe-layer-freq ([0]+[1]*59) --moe-ffn-hidden-size 1536
--moe-shared-expert-intermediate-size 3072 --moe-router-topk 6 --moe-router-group-topk 3
--moe-router-num-groups 8 --moe-router-topk-scaling-factor 16.0 --attention-dropout 0.0
--hidden-dropout 0.0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model deepseek-ai/DeepSeek-V2
--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128
--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --swiglu --normalization RMSNorm
--untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope
--moe-shared-expert-overlap --moe-token-dispatcher-type alltoall
--train-samples 585937500 --exit-duration-in-mins 220 --lr-decay-samples 584765624
--lr-warmup-samples 1536000 --lr 3.9e-6 --min-lr 3.9e-7 --lr-decay-style cosine
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --sequence-parallel
FLAGS
export TRAIN="python pretrain_gpt.py $PARAMS ${MODEL//$'\n'/ } $*"
sbatch <<JOB
#!/bin/bash
#SBATCH --nodes=${NNODES}
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
srun --mpi=pmix -l --container-image=${IMAGE:-none} bash -c "$TRAIN" 2>&1 | tee log
JOB

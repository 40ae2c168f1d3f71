#!/bin/bash
# Flags of yanring/Megatron-MoE-ModelZoo, best_practice/deepseek-v3/run_deepseek_v3_h100.sh @ e8650517; the script around them is ours.
set -euo pipefail
export TP=${TP:-2} PP=${PP:-8} EP=${EP:-64} VPP=${VPP:-4} CP=${CP:-1}
export NNODES=${NNODES:-128} MBS=${MBS:-1} GBS=${GBS:-8192} SEQ_LEN=${SEQ_LEN:-4096}
declare -A SIZES=([tensor]=$TP [pipeline]=$PP [expert]=$EP [context]=$CP)
PARAMS=""
for kind in tensor pipeline; do PARAMS+=" --$kind-model-parallel-size ${SIZES[$kind]}"; done
PARAMS="$PARAMS --expert-model-parallel-size $EP --context-parallel-size $CP --expert-tensor-parallel-size 1"

PARAMS+=" --micro-batch-size $MBS --global-batch-size $GBS --seq-length $SEQ_LEN"
if [[ ! "$PARAMS" =~ "--bf16" ]]; then PARAMS="$PARAMS --bf16"; fi
read -r -d '' MODEL <<'FLAGS' || true
--mtp-num-layers 1 --mtp-loss-scaling-factor 0.1 --num-layers 61 --hidden-size 7168
--ffn-hidden-size 18432 --num-attention-heads 128 --kv-channels 128 --max-position-embeddings 4096
--make-vocab-size-divisible-by 3232 --num-experts 256 --moe-layer-freq ([0]*3+[1]*58)
--moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
--moe-router-load-balancing-type seq_aux_loss --moe-router-topk 8 --moe-router-group-topk 4
--moe-router-num-groups 8 --moe-router-topk-scaling-factor 2.5 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias --moe-router-dtype fp32 --moe-aux-loss-coeff 1e-4
--attention-dropout 0.0 --hidden-dropout 0.0 --tokenizer-type HuggingFaceTokenizer
--tokenizer-model unsloth/DeepSeek-V3 --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512
--qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --swiglu
--normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear
--position-embedding-type rope
--pipeline-model-parallel-layout Et|(tt|)*30mL --moe-token-dispatcher-type flex
--delay-wgrad-compute --overlap-moe-expert-parallel-comm
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

#!/usr/bin/env bash
#SBATCH --job-name=telechat
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
# One supervisor (tools/launch.py) a node under Slurm; the flags of the training follow the script's name:
#
#   sbatch --nodes 128 launch/slurm.sh --preset telechat2-39b-a12b --run-dir /shared/runs/39b --data-json data.json ...
#
# A rank that is lost is started again with all others, inside the job. Ten minutes before the time limit (and on
# scancel --signal=USR1 --batch) the run is asked to save and stop through the file stop-now in its run folder, which all ranks
# follow at the same step. The job is then requeued and resumes from its checkpoint. The job's exit code is the training's: 75
# after a stop. RANKS_PER_NODE, MASTER_PORT and VENV may be set.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
venv="${VENV:-$PWD/.venv}"

run_dir=""
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --run-dir | --run_dir) run_dir="${arguments[i + 1]:-}" ;;
        --run-dir=* | --run_dir=*) run_dir="${arguments[i]#*=}" ;;
    esac
done
if [ -z "$run_dir" ]; then
    echo "slurm.sh: give --run-dir, a folder that every node sees" >&2
    exit 2
fi

stopping=""
ask_to_stop() {
    stopping=1
    mkdir -p "$run_dir"
    touch "$run_dir/stop-now"
}
trap ask_to_stop USR1

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
srun --kill-on-bad-exit=1 "$venv/bin/python" tools/launch.py --nproc-per-node "${RANKS_PER_NODE:-8}" \
    pretrain/pretrain_telechat2.py "$@" &
job=$!
code=0
wait "$job" || code=$?
# A trapped signal ends the first wait before the run has saved.
while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
done
if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

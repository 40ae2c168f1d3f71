"""Pasted launch commands and scripts: the ranks that their launchers say, or a question; variables that the script
sets, or a problem."""

from __future__ import annotations

import shlex

import pytest

from megatron_telechat.cli.pasted import read_pasted
from megatron_telechat.errors import ConfigError

P = "pretrain_gpt.py --num-layers 4"
MODEL = ["--num-layers", "4"]


def ranks(text: str, script: bool, *others: str) -> tuple[str | None, str | None]:
    """(--world-size, --ranks-per-node) of a command, whose flags are those of the model."""
    read = read_pasted(text, [], others) if script else read_pasted(None, shlex.split(text), others)
    words = list(read.words)
    assert words[-2:] == MODEL, words
    found = dict(zip(words[:-2:2], words[1:-2:2], strict=False))
    return found.get("--world-size"), found.get("--ranks-per-node")


SAID = [
    # torchrun
    (f"torchrun --nproc-per-node 8 --nnodes 4 {P}", 32, 8),
    (f"torchrun --nproc_per_node=8 --nnodes=2 --node_rank 0 {P}", 16, 8),
    (f"torchrun --standalone --nproc-per-node 4 {P}", 4, 4),
    (f"torchrun --nnodes 4 --standalone --nproc-per-node 4 {P}", 4, 4),
    (f"torchrun --nproc-per-node 8 {P}", 8, 8),
    (f"torchrun --nnodes 2 {P}", 2, 1),
    (f"torchrun {P}", 1, 1),
    (f"torchrun --nnodes 2:2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host:29500 {P}", 16, 8),
    (f"torchrun --nproc-per-node 8 --tee 3 -r 3 --log-dir logs --max-restarts=0 /opt/megatron/{P}", 8, 8),
    ("torchrun --nproc-per-node 2 -m pretrain_gpt --num-layers 4", 2, 2),
    (f"python -m torch.distributed.run --nproc_per_node 8 --nnodes 2 {P}", 16, 8),
    (f"python3 -u -m torch.distributed.launch --use_env --nproc_per_node 8 {P}", 8, 8),
    (f"CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc-per-node gpu {P}", 4, 4),
    (f"env A=1 CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc-per-node auto {P}", 2, 2),
    (f"OMP_NUM_THREADS=4 taskset -c 0-63 torchrun --nproc-per-node 8 {P}", 8, 8),
    # tools/launch.py
    (f"python tools/launch.py --nproc-per-node 8 {P}", 8, 8),
    (f"python -u /opt/telechat/tools/launch.py --max-restarts 3 --nnodes=4 --nproc-per-node 8 {P}", 32, 8),
    (f"tools/launch.py --standalone --nproc-per-node 4 -m pretrain_gpt {P.split(' ', 1)[1]}", 4, 4),
    (f"srun -N 4 --ntasks-per-node 1 python tools/launch.py --nproc-per-node 8 {P}", 32, 8),
    # srun
    (f"srun -N 8 --ntasks-per-node 8 python -u {P}", 64, 8),
    (f"srun -N8 -n64 python {P}", 64, 8),
    (f"srun --nodes=8 --ntasks=64 -l --mpi=pmix --container-image=/x/python python {P}", 64, 8),
    (f"srun -n 64 --ntasks-per-node=8 python {P}", 64, 8),
    (f"srun -N 4 python {P}", 4, 1),
    (f"srun -N 2 --gpus-per-node=a100:4 --ntasks-per-gpu 1 python {P}", 8, 4),
    (f"srun --gpus 16 -N 2 --gpus-per-task=1 python {P}", 16, 8),
    (f"srun -J python -N 2 --ntasks-per-node 4 numactl --localalloc singularity exec --nv image.sif python {P}", 8, 4),
    # an agent in a task of each node
    (f"srun -N 4 --ntasks-per-node=1 --gpus-per-node=8 torchrun --nnodes 4 --nproc-per-node 8 {P}", 32, 8),
    (f"srun -N 4 --ntasks-per-node=1 --gres=gpu:a100:8 torchrun --nnodes 4 --nproc-per-node gpu {P}", 32, 8),
    (f"srun -n 4 -N 4 torchrun --nnodes $NNODES --nproc-per-node 8 --node-rank $RANK {P}", 32, 8),
    (f"srun -N 2 bash -c 'torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_PROCID {P}'", 16, 8),
    (f"srun -N 2 -n 4 torchrun --nnodes 4 --nproc-per-node 4 {P}", 16, 8),
    (
        f"sbatch -N 2 --gpus-per-node 8 --wrap 'srun torchrun --nnodes $SLURM_NNODES --nproc-per-node "
        f"$SLURM_GPUS_ON_NODE {P}'",
        16,
        8,
    ),
    # mpirun
    (f"mpirun -np 64 python {P}", 64, None),
    (f"mpirun -n 64 -npernode 8 -x PATH -bind-to none python {P}", 64, 8),
    (f"mpirun -H a:8,b:8 python {P}", 16, 8),
    (f"mpirun --host a,b --map-by ppr:8:node python {P}", 16, 8),
    (f"mpirun -np 16 -N 4 -x A=1 python {P}", 16, 4),
    (f"mpiexec.hydra -n 32 -ppn 8 python {P}", 32, 8),
    # deepspeed, accelerate
    (f"deepspeed --num_gpus 8 --num_nodes 2 {P}", 16, 8),
    (f"deepspeed --num_gpus=4 {P}", 4, 4),
    (f"deepspeed --include a:0,1,2,3@b:0,1,2,3 --master_port 6000 {P}", 8, 4),
    (f"accelerate launch --num_processes 16 --num_machines 2 --mixed_precision bf16 {P}", 16, 8),
]


@pytest.mark.parametrize("command, world, node", SAID)
def test_ranks_of_a_command(command: str, world: int, node: int | None) -> None:
    expected = str(world), None if node is None else str(node)
    assert ranks(command, False) == expected
    assert ranks(f"#!/bin/bash\nset -e\necho {shlex.quote(command)}\n{command} \\\n  2>&1 | tee log", True) == expected


OPEN = [
    (P, "names no launcher"),
    (f"python {P}", "names no launcher"),
    ("--num-layers 4", "names no launcher"),
    (f"torchrun --nproc-per-node gpu {P}", "--nproc-per-node gpu"),
    (f"torchrun --nproc-per-node auto --nnodes 2 {P}", "--nproc-per-node auto"),
    (f"torchrun --nproc-per-node $GPUS {P}", "--nproc-per-node $GPUS"),
    (f"torchrun --nnodes 2:4 --nproc-per-node 8 {P}", "--nnodes 2:4"),
    (f"torchrun --nnodes $N --nproc-per-node 8 {P}", "--nnodes $N"),
    (f"python tools/launch.py --nnodes $N --nproc-per-node 8 {P}", "--nnodes $N"),
    (f"srun python {P}", "srun names no nodes and tasks"),
    (f"srun -N 2-4 --ntasks-per-node 8 python {P}", "srun's nodes is 2-4"),
    (f"srun -N $NODES python {P}", "srun's nodes is $NODES"),
    (f"mpirun --hostfile hosts python {P}", "mpirun names no number"),
    (f"mpirun -np $N python {P}", "-np is $N"),
    (f"deepspeed {P}", "counts the devices of the machine"),
    (f"deepspeed --hostfile hosts --num_gpus 8 {P}", "devices of hosts"),
    (f"accelerate launch --config_file a.yaml {P}", "reads its number of processes from a file"),
    # launchers that contradict each other
    (f"srun -N 4 --ntasks-per-node 1 torchrun --nproc-per-node 8 {P}", "srun starts 4 times torchrun, each for 1 node"),
    (
        f"srun -N 4 --ntasks-per-node 1 torchrun --nnodes 2 --nproc-per-node 8 {P}",
        "srun starts 4 times torchrun, each for 2 nodes",
    ),
    (
        f"srun -N 4 --ntasks-per-node 1 python tools/launch.py --nnodes 2 --nproc-per-node 8 {P}",
        "srun starts 4 times launch.py, each for 2 nodes",
    ),
]


@pytest.mark.parametrize("command, why", OPEN)
def test_ranks_are_asked_for_and_never_guessed(command: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ranks(command, False)
    said = caught.value.render()
    assert "the number of ranks is not known" in said and why in said and "--world-size N" in said
    assert ranks(command, False, "--world-size", "48") == (None, None)


@pytest.mark.parametrize("others", ["--world-size 8", "--world_size=8", "--ranks-per-node 4"])
def test_flags_and_launcher_that_contradict(others: str) -> None:
    command = f"torchrun --nproc-per-node 8 --nnodes 2 {P}"
    with pytest.raises(ConfigError, match="but the launcher starts 16 ranks"):
        ranks(command, False, *others.split())
    assert ranks(command, False, "--world-size", "16") == (None, "8")


@pytest.mark.parametrize(
    "text, what",
    [
        ("ls -l", "starts no Python program"),
        ("srun bash run.sh", "starts no Python program"),
        (f"torchrun --nproc-per-node 8 {P}\ntorchrun --nproc-per-node 4 {P}", "2 different trainings"),
        (f"torchrun $ARGS {P}", "what $ARGS holds is not known"),
        ('torchrun --nproc-per-node 8 "x.py', "no closing"),
        ("A=(1 2", "without its )"),
    ],
)
def test_what_is_no_command(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_pasted(text, [], [])
    assert what in caught.value.render()


# ---- scripts -----------------------------------------------------------------------------------

USUAL = """#!/bin/bash
# Runs a model
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=${NNODES:-2}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))
TP=2; PP=$((WORLD_SIZE / 8))
CHECKPOINT=$1

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NNODES   # of the job
    --master_addr $MASTER_ADDR
)
GPT_ARGS="
    --num-layers 24 \\
    --hidden-size 1024 \\
    --tensor-model-parallel-size ${TP} \\
    --pipeline-model-parallel-size $PP
"
if [ -n "$MOE" ]; then
    SIZES="--num-experts 8"
fi
TRAIN=(
    # --fp16
    --bf16 --train-iters $ITERS
    --data-path "$DATA/corpus" --tokenizer-model ${TOKENIZER}
)
GPT_ARGS+=" --seq-length $(( 4 * 512 ))"
python tools/preprocess_data.py --input x
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \\
    $GPT_ARGS \\
    ${TRAIN[@]} \\
    --save $CHECKPOINT "$@" 2>&1 | tee log.txt
"""


def test_a_usual_script() -> None:
    read = read_pasted(USUAL, [], [])
    assert list(read.words) == shlex.split(
        "--world-size 16 --ranks-per-node 8 --num-layers 24 --hidden-size 1024 --tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 2 --seq-length 2048 --bf16 --data-path '$DATA/corpus' --tokenizer-model "
        "'$TOKENIZER' --save '$1'"
    )
    notes = " ".join(read.notes)
    assert (
        "NNODES=2 (the environment may" in notes and "--train-iters $ITERS: not known, and not needed to plan" in notes
    )


SBATCH = """#!/bin/bash
#SBATCH --job-name=gpt --nodes=4
#SBATCH --ntasks-per-node=8   # one a device
#SBATCH --gpus-per-node=8
"""


@pytest.mark.parametrize(
    "text, world, node",
    [
        (f"{SBATCH}srun python {P}", 32, 8),
        (f"{SBATCH}srun -l --output=x.log python -u {P}", 32, 8),
        (f"{SBATCH}CMD='python {P}'\nsrun sh -c \"$CMD\"", 32, 8),
        (f"{SBATCH}srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES --nproc_per_node $SLURM_GPUS_ON_NODE "
         f"{P}", 32, 8),
        (f"{SBATCH}srun --ntasks=$SLURM_NNODES --ntasks-per-node=1 torchrun --nnodes=$SLURM_JOB_NUM_NODES "
         f"--nproc_per_node gpu {P}", 32, 8),
        (f"N=2\nCMD=\"torchrun --nnodes $N --nproc_per_node 8 {P}\"\neval $CMD", 16, 8),
        (f"N=2\nCMD=\"torchrun --nnodes $N --nproc_per_node 8 {P}\"\necho $CMD\n$CMD", 16, 8),
        (f"G=(0 1 2)\ntorchrun --nproc_per_node ${{#G[@]}} {P}", 3, 3),
        (f"if true; then\n  torchrun --nproc_per_node 2 {P}\nfi", 2, 2),
        (f"N=8\nif [ $N = 8 ]; then N=8; fi\ntorchrun --nproc_per_node $N {P}", 8, 8),
        (f"run() {{\n  torchrun --nproc_per_node ${{1:-4}} {P}\n}}\nrun", 4, 4),
        (f"cat > x <<EOF\ntorchrun --nproc_per_node 8 {P}\nEOF\ntorchrun --nproc_per_node 4 {P}", 4, 4),
    ],
)  # fmt: skip
def test_ranks_of_a_script(text: str, world: int, node: int) -> None:
    assert ranks(text, True) == (str(world), str(node))


@pytest.mark.parametrize(
    "text, what",
    [
        # set under a condition, by a loop, by a program, by another file: not known
        (f'N=8\nif [ "$BIG" ]; then N=16; fi\ntorchrun --nproc_per_node $N {P}', "--nproc-per-node $N"),
        (f'N=8\n[ -n "$BIG" ] && N=16\ntorchrun --nproc_per_node $N {P}', "--nproc-per-node $N"),
        (f"case $X in\n a) N=8 ;;\n b) N=4 ;;\nesac\ntorchrun --nproc_per_node $N {P}", "--nproc-per-node $N"),
        (f"for N in 1 2; do\n torchrun --nproc_per_node $N {P}\ndone", "--nproc-per-node $N"),
        (f"N=`nvidia-smi -L | wc -l`\ntorchrun --nproc_per_node $N {P}", "--nproc-per-node $(nvidia-smi...)"),
        (f"source env.sh\ntorchrun --nproc_per_node $N {P}", "--nproc-per-node $N"),
        (f"torchrun --nproc_per_node 8 {P} $EXTRA", "what $EXTRA holds is not known"),
        (f"torchrun --nproc_per_node 8 {P} --bf16 $EXTRA", "what $EXTRA holds is not known"),
        (f"torchrun --nproc_per_node 8 {P} --hidden-size $H", "the value of --hidden-size is not known: $H"),
        (f"torchrun --nproc_per_node 8 {P} --seq-length=$S", "the value of --seq-length is not known: $S"),
        ("torchrun --nproc_per_node 8 pretrain_gpt.py ${GPT_ARGS[@]}", "what $GPT_ARGS holds is not known"),
    ],
)
def test_what_the_script_does_not_say_is_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_pasted(text, [], [])
    assert what in caught.value.render(), caught.value.render()


def test_all_unknown_values_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_pasted(f"torchrun --nproc_per_node 8 {P} --hidden-size $H --micro-batch-size ${{M}} --lr $LR", [], [])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "text, flags",
    [
        ("A='x y'; B=\"$A z\"; torchrun x.py --preset \"$B\" $B '$A' \\$A a\\ "
         "b", ["x y z", "x", "y", "z", "$A", "$A", "a b"]),
        ("A=(1 '2 3'); A+=(4); torchrun x.py --preset \"${A[@]}\" ${A[1]} $A "
         "\"${A[*]}\"", ["1", "2 3", "4", "2", "3", "1", "1 2 3 4"]),
        ("A=1; A+=2; export B=$A C=\"3\"; torchrun x.py --preset $A$B${C}4 pre${A}post", ["121234", "pre12post"]),
        ("torchrun x.py --preset ${X:-1} ${X-\"2 3\"} ${Y:=4} $Y ${Y:+5} ${X:+6}", ["1", "2", "3", "4", "4", "5"]),
        ("N=3; torchrun x.py --preset $((N * 2 + 1)) $(( (N - 1) % 2 )) $((7/2))", ["7", "0", "3"]),
        ("torchrun x.py --preset 1 # comment\n# torchrun y.py\n", ["1"]),
        ("E=''; torchrun x.py --preset $E \"$E\" \"\" 1", ["", "", "1"]),
        ("A=1; f() { local A=2; }; torchrun x.py --preset b", ["b"]),
        ("torchrun x.py --preset 1 > log 2>&1 < /dev/null &", ["1"]),
    ],
)  # fmt: skip
def test_words_as_the_shell_makes_them(text: str, flags: list[str]) -> None:
    read = read_pasted(text, [], ["--world-size", "1"])
    assert list(read.words)[list(read.words).index("--preset") + 1 :] == flags


CONDITIONS = """MODE={mode}
ARGS=(--bf16)
if [[ "$MODE" == a ]] || [ "$MODE" = b ]; then
    N=8; ARGS+=(--seq-length 1024)
elif [ $MODE != c ]; then
    N=4
else
    N=2; ARGS+=(--seq-length 2048)
fi
case $MODE in
    a|d) M=1 ;;
    *) M=2 ;;
esac
if [ -n "$WANDB" ]; then
    ARGS+=(--wandb-project "my run" --tensorboard-dir $DIR)
fi
torchrun --nproc_per_node $N pretrain_gpt.py --num-layers 4 --micro-batch-size $M ${{ARGS[@]}}
"""


@pytest.mark.parametrize(
    "mode, words",
    [
        ("a", "--world-size 8 --ranks-per-node 8 --num-layers 4 --micro-batch-size 1 --bf16 --seq-length 1024"),
        ("b", "--world-size 8 --ranks-per-node 8 --num-layers 4 --micro-batch-size 2 --bf16 --seq-length 1024"),
        ("c", "--world-size 2 --ranks-per-node 2 --num-layers 4 --micro-batch-size 2 --bf16 --seq-length 2048"),
        ("d", "--world-size 4 --ranks-per-node 4 --num-layers 4 --micro-batch-size 1 --bf16"),
        (
            "${MODE:-a}",
            "--world-size 8 --ranks-per-node 8 --num-layers 4 --micro-batch-size 1 --bf16 --seq-length 1024",
        ),
    ],
)
def test_conditions_that_the_script_decides(mode: str, words: str) -> None:
    read = read_pasted(CONDITIONS.format(mode=mode), [], [])
    assert list(read.words) == words.split()
    assert [note for note in read.notes if "--wandb-project: given under a condition" in note]


def test_conditions_that_it_does_not() -> None:
    with pytest.raises(ConfigError, match=r"number of ranks is not known: .*\$N"):
        read_pasted(CONDITIONS.format(mode="$1"), [], [])
    with pytest.raises(ConfigError) as caught:
        read_pasted(CONDITIONS.format(mode="$1"), [], ["--world-size", "8"])
    said = caught.value.render()
    assert (
        "the value of --micro-batch-size is not known: $M" in said
        and "whether --seq-length is given depends on a condition" in said
    )


def test_flags_that_a_launch_script_of_megatron_takes_as_arguments() -> None:
    """Files and folders, of flags that are refused too, keep planning from nothing."""
    text = (
        f"TB=$2\ntorchrun --nproc_per_node 8 {P} --vocab-file $3 --merge-file ${{4}} --tensorboard-dir $TB "
        f"--data-path $5 $6 --save=$1"
    )
    read = read_pasted(text, [], [])
    assert list(read.words[4:]) == "--num-layers 4 --vocab-file $3 --merge-file $4 --data-path $5 $6 --save=$1".split()

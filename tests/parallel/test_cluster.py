"""Ranks from the words of torchrun, srun, mpirun and Kubeflow; two that contradict each other are named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.cluster import rank_variables, require_started_ranks
from tests.harness import ROOT
from tests.training.runs import DENSE

SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PET = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "2",
    "PET_MASTER_ADDR": "head",
    "PET_MASTER_PORT": "9",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
A_NODE = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def ranks(environ: dict[str, str]) -> tuple[str, ...]:
    found = rank_variables(environ)
    return tuple(
        found.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    )


def test_each_launcher():
    assert ranks(SRUN) == ("5", "8", "1", "4", "gpu007")
    assert ranks(MPIRUN) == ("3", "4", "3", "4", "127.0.0.1")
    assert ranks(PET) == ("2", "4", "0", "1", "head") and rank_variables(PET)["MASTER_PORT"] == "9"
    assert ranks({**SRUN, "MASTER_ADDR": "b"})[-1] == "b"
    assert ranks({**SRUN, **{"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}})[:4] == ("5", "8", "1", "4")


def test_all_ranks_of_a_job_take_one_port_and_two_jobs_two():
    port = rank_variables(SRUN)["MASTER_PORT"]
    assert rank_variables({**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "2"})["MASTER_PORT"] == port
    assert rank_variables({**SRUN, "SLURM_JOB_ID": "13"})["MASTER_PORT"] != port


@pytest.mark.parametrize(
    "environ",
    [
        {},
        TORCHRUN,
        {**TORCHRUN, **SRUN},
        {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {name: value for name, value in SRUN.items() if "STEP" not in name},  # a batch script
        {**TORCHRUN, **A_NODE},
        {**TORCHRUN, **SRUN, "RANK": "4", "TORCHELASTIC_RUN_ID": "none"},
        {**TORCHRUN, **PET, "TORCHELASTIC_RUN_ID": "none"},
        {**TORCHRUN, **PET, "PET_NPROC_PER_NODE": "2"},
        {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "1"},
    ],
)
def test_what_needs_nothing(environ):
    assert rank_variables(environ) == {}


@pytest.mark.parametrize(
    "environ, both",
    [
        ({**TORCHRUN, **SRUN, "SLURM_PROCID": "4"}, "rank 5 of 8 .*srun rank 4 of 8"),
        ({**TORCHRUN, **SRUN, "SLURM_LOCALID": "3"}, "torchrun's variables .*srun"),
        ({**TORCHRUN, **MPIRUN}, "rank 5 of 8 .*mpirun rank 3 of 4"),
        ({**SRUN, **MPIRUN}, "srun says rank 5 of 8 .*mpirun rank 3 of 4 .*OMPI_COMM_WORLD_RANK"),
        ({**TORCHRUN, **PET, "PET_NNODES": "8"}, "rank 5 of 8 .*Kubeflow rank 2 of 8"),
        ({name: value for name, value in SRUN.items() if "LOCALID" not in name}, "set LOCAL_RANK"),
        ({name: value for name, value in MPIRUN.items() if "LOCAL_SIZE" not in name}, "set MASTER_ADDR"),
    ],
)
def test_contradictions_name_both(environ, both):
    with pytest.raises(ConfigError, match=f"(?s:{both})"):
        rank_variables(environ)


def test_the_ranks_of_a_pod_need_a_launcher():
    require_started_ranks({**PET, "RANK": "0", "PET_NPROC_PER_NODE": "8"})
    require_started_ranks(PET)
    with pytest.raises(ConfigError, match="PET_NPROC_PER_NODE=8 .*one process(?s:.*)tools/launch.py"):
        require_started_ranks({**PET, "PET_NPROC_PER_NODE": "8"})


@pytest.mark.heavy
def test_the_command_says_it():
    """Before torch, once for all ranks."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain" / "pretrain_telechat2.py"), "--preset", "telechat2-tiny", "--dry-run"],
        env={"PATH": os.environ["PATH"], **SRUN, **MPIRUN, "SLURM_PROCID": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "srun says rank 0 of 8" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_training_without_torchrun(tmp_path, launcher):
    """Two processes with what the launcher gives them, no address and no port."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "PMIX_NAMESPACE": f"prterun-{os.getpid()}", "OMP_NUM_THREADS": "1"}
    words = {
        "srun": "SLURM_STEP_ID=0 SLURM_PROCID={0} SLURM_NTASKS=2 SLURM_LOCALID={0} SLURM_STEP_NUM_NODES=1 "
        "SLURM_STEP_TASKS_PER_NODE=2",
        "mpirun": "OMPI_COMM_WORLD_RANK={0} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={0} "
        "OMPI_COMM_WORLD_LOCAL_SIZE=2",
    }[launcher]
    base = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(ROOT / "pretrain" / "pretrain_telechat2.py"), *DENSE, "--train-iters", "2"]
    command += ["--pipeline-model-parallel-size", "2", "--run-dir", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**base, **job, **dict(word.split("=") for word in words.format(rank).split())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "step 2/2" in outputs[0] and "step 2/2" not in outputs[1]

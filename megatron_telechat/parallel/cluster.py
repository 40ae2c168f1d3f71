"""Which rank this process is, in the words of the program that started it: torchrun, srun, Open MPI, Kubeflow.

The training reads torchrun's words (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Here
those of the others become these, before anything reads them. Without torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_telechat.errors import ConfigError, Problem

_PORTS = range(20000, 30000)
"""Where the ranks meet when nothing names a port: below the ports that Linux gives to clients."""


@dataclass(frozen=True)
class Ranks:
    """What one launcher says of this process.

    Attributes:
        launcher: its name.
        words: the variables it was read from, for messages.
        rank, world_size: this process among all.
        local_rank, local_world_size: among those of its node; None: it does not say.
        nodes: on how many nodes; None: it does not say.
    """

    launcher: str
    words: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None
    nodes: int | None = None

    @property
    def one_a_node(self) -> bool:
        """Whether each node has one process, which may have started others itself."""
        return self.nodes == self.world_size or self.local_world_size == 1


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Torchrun's variables for this process, where another launcher started it; empty where torchrun's are there, or
    where there is one process only.

    Raises:
        ConfigError: two launchers contradict each other, one says too little, or none of a node's ranks was started.
    """
    own, others = _torchrun(environ), [found for found in (_srun(environ), _mpirun(environ), _pet(environ)) if found]
    if own is not None and "TORCHELASTIC_RUN_ID" in environ:
        return {}  # the agent started this process, whatever started the agent
    if own is not None:
        # Programs that start the ranks of their node without an agent, such as deepspeed, run once a node too.
        around = [each for each in others if each.one_a_node and own.world_size > each.world_size]
        _require_agreement([own, *(each for each in others if each not in around)])
        return {}
    others = [each for each in others if each.world_size > 1]
    if not others:
        return {}
    _require_agreement(others)
    return {**_as_torchrun(others, environ), **_meeting_place(others[0], environ)}


def require_started_ranks(environ: Mapping[str, str]) -> None:
    """Kubeflow names the ranks of a node (PET_NPROC_PER_NODE) for a launcher to start.

    Raises:
        ConfigError: this process was started in place of that launcher.
    """
    each = environ.get("PET_NPROC_PER_NODE", "1")
    if "RANK" not in environ and each != "1":
        raise ConfigError(
            f"PET_NPROC_PER_NODE={each} asks for the ranks of a node, and this is one process",
            "environment",
            "start it with tools/launch.py or torchrun, which read PET_*, or set one rank a pod",
        )


def _torchrun(environ: Mapping[str, str]) -> Ranks | None:
    return _named(environ, "torchrun's variables", "")


def _mpirun(environ: Mapping[str, str]) -> Ranks | None:
    return _named(environ, "mpirun", "OMPI_COMM_WORLD_")


def _named(environ: Mapping[str, str], launcher: str, prefix: str) -> Ranks | None:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE behind a prefix; mpirun leaves the WORLD of it out once."""
    size = f"{prefix}SIZE" if prefix else "WORLD_SIZE"
    local_size = f"{prefix}LOCAL_SIZE" if prefix else "LOCAL_WORLD_SIZE"
    rank, world = _number(environ, f"{prefix}RANK"), _number(environ, size)
    if rank is None or world is None:
        return None
    local, each = _number(environ, f"{prefix}LOCAL_RANK"), _number(environ, local_size)
    return Ranks(launcher, f"{prefix}RANK, {size}", rank, world, local, each)


def _srun(environ: Mapping[str, str]) -> Ranks | None:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too, and is one process: only a step has the names with STEP.
    if not any(name in environ for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")):
        return None
    rank, world = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    world = world if world is not None else _number(environ, "SLURM_NTASKS")
    if rank is None or world is None:
        return None
    nodes = _number(environ, "SLURM_STEP_NUM_NODES")
    each = _tasks_of_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), _number(environ, "SLURM_NODEID") or 0)
    local = _number(environ, "SLURM_LOCALID")
    return Ranks("srun", "SLURM_PROCID, SLURM_NTASKS", rank, world, local, each, nodes)


def _pet(environ: Mapping[str, str]) -> Ranks | None:
    """One rank a pod needs no launcher."""
    rank, nodes, each = (environ.get(f"PET_{name}", "") for name in ("NODE_RANK", "NNODES", "NPROC_PER_NODE"))
    if not (rank.isdigit() and nodes.isdigit() and (each or "1").isdigit()):
        return None
    count = int(each or 1)
    local = (_number(environ, "LOCAL_RANK") or 0) if count > 1 else 0
    words = "PET_NODE_RANK, PET_NNODES, PET_NPROC_PER_NODE"
    return Ranks("Kubeflow", words, int(rank) * count + local, int(nodes) * count, local, count, int(nodes))


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else None


def _tasks_of_node(text: str, node: int) -> int | None:
    """Of Slurm's ``4(x2),3``, what node 0, 1 or 2 has."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node] if node < len(counts) else None


def _require_agreement(said: list[Ranks]) -> None:
    first = said[0]
    problems = [
        Problem(
            f"{first.launcher} says rank {first.rank} of {first.world_size} ({first.words}), {other.launcher} rank "
            f"{other.rank} of {other.world_size} ({other.words})",
            "environment",
            "start the ranks with one launcher, and unset the variables of the other",
        )
        for other in said[1:]
        if (other.rank, other.world_size) != (first.rank, first.world_size)
        or None not in (first.local_rank, other.local_rank)
        and first.local_rank != other.local_rank
    ]
    if problems:
        raise ConfigError(problems)


def _as_torchrun(said: list[Ranks], environ: Mapping[str, str]) -> dict[str, str]:
    first = said[0]
    local = next((each.local_rank for each in said if each.local_rank is not None), None)
    count = next((each.local_world_size for each in said if each.local_world_size is not None), None)
    if local is None:
        raise ConfigError(
            f"{first.launcher} started {first.world_size} ranks ({first.words}), but does not say which of its node "
            "this one is",
            "environment",
            "set LOCAL_RANK to the number of the rank within its node",
        )
    found = {"RANK": first.rank, "WORLD_SIZE": first.world_size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
    return {name: str(value) for name, value in found.items() if value is not None and name not in environ}


def _meeting_place(said: Ranks, environ: Mapping[str, str]) -> dict[str, str]:
    """Where rank 0 waits for the others: what the environment names, else the first host of the step and a port that
    follows from the job."""
    address = environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR") or _first_host(said, environ)
    if not address:
        raise ConfigError(
            f"{said.launcher} does not say on which host rank 0 runs",
            "environment",
            "set MASTER_ADDR to that host (with mpirun: -x MASTER_ADDR=HOST)",
        )
    port = environ.get("MASTER_PORT") or environ.get("PET_MASTER_PORT") or str(_port_of_job(environ))
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _first_host(said: Ranks, environ: Mapping[str, str]) -> str:
    if said.nodes == 1 or said.local_world_size == said.world_size:
        return "127.0.0.1"
    nodes = (
        environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "") if said.launcher == "srun" else ""
    )
    # gpu[007-010,12],big3: the first number of the first brackets, with its zeros.
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _port_of_job(environ: Mapping[str, str]) -> int:
    """The same number on all ranks of a job, another for most other jobs."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    job = "/".join(environ.get(name, "") for name in names)
    return _PORTS[int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % len(_PORTS)]

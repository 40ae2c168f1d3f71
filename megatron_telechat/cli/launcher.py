"""The ranks and the flags of a launch command, in the words of torchrun, srun, mpirun, deepspeed and accelerate.

Nothing is guessed: where a launcher leaves the number of ranks to the machine (``--nproc-per-node gpu``, ``--nnodes
2:4``, a hostfile), or two launchers contradict each other, `Launch.ranks` stays open and `Launch.why` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_telechat.cli.shell import Command, Value, read_script, shown, unknown_names
from megatron_telechat.errors import ConfigError

WHERE = "Megatron command"


@dataclass(frozen=True)
class Start:
    """What one launcher starts; None is what it does not say.

    Attributes:
        name: of the launcher.
        agent: whether it is started once a node and starts the ranks of that node itself (torchrun, deepspeed,
            accelerate); else it starts all processes (srun, mpirun).
        ranks: processes over all nodes.
        nodes, per_node: nodes, and processes of each.
        devices: accelerators of a node.
        why: what keeps `ranks` from being known.
    """

    name: str
    agent: bool
    ranks: int | None = None
    nodes: int | None = None
    per_node: int | None = None
    devices: int | None = None
    why: str = ""

    def filled(self) -> Start:
        """With what follows from the rest."""
        ranks, per_node = self.ranks, self.per_node
        if ranks is None and self.nodes and per_node:
            ranks = self.nodes * per_node
        if per_node is None and ranks and self.nodes and ranks % self.nodes == 0:
            per_node = ranks // self.nodes
        return replace(self, ranks=ranks, per_node=per_node)


@dataclass(frozen=True)
class Launch:
    """A launch command, read.

    Attributes:
        flags: words behind the program.
        ranks, per_node: processes over all nodes, and on each; None: the command does not say.
        why: the reason where it does not say `ranks`.
        program: the training program; "" where only flags are given.
    """

    flags: tuple[str, ...]
    ranks: int | None = None
    per_node: int | None = None
    why: str = ""
    program: str = ""


class _Chain(NamedTuple):
    """Launchers from the outermost to the innermost, accelerators that are visible, the words behind the program, and
    the program."""

    starts: tuple[Start, ...]
    devices: int | None
    flags: tuple[str, ...]
    program: str


def read_launch(commands: Sequence[Command], slurm: Sequence[str] = ()) -> Launch:
    """The one command among these that starts a training program.

    Args:
        slurm: options of the job that the commands run in (#SBATCH).

    Raises:
        ConfigError: none, or several.
    """
    if len(commands) == 1 and commands[0].words[0].startswith("-"):
        return Launch(commands[0].words, why="it names no launcher")
    chains = [chain for command in commands for chain in _chains(command, tuple(slurm))]
    trains = list(dict.fromkeys([chain for chain in chains if _MODEL.intersection(chain.flags)] or chains))
    if not trains:
        fix = (
            "paste the command that names a launcher, such as torchrun, and the program.py; of a script that it "
            "starts, the text"
        )
        raise ConfigError("it starts no Python program", WHERE, fix)
    if len(trains) > 1:
        raise ConfigError(f"it starts {len(trains)} different trainings", WHERE, "leave the one to plan for")
    return replace(_launch(trains[0]), program=trains[0].program)


_MODEL = {
    f"--{name}" for flag in ("num-layers", "hidden-size", "preset", "config") for name in (flag, flag.replace("-", "_"))
}
_NO_START = {
    "echo",
    "printf",
    "cat",
    "tee",
    "[",
    "[[",
    "test",
    "cd",
    "source",
    ".",
    "which",
    "pip",
    "pip3",
    "conda",
    "rm",
    "cp",
    "mv",
    "mkdir",
    "ls",
    "grep",
    "sleep",
}
_SHELLS = {"bash", "sh", "zsh"}
_PYTHON = re.compile(r"python[\d.]*")
_OURS = "launch.py"
_ONCE_A_NODE = ("torchrun", _OURS)
"""Agents that say how many nodes there are."""


def _chains(command: Command, job: tuple[str, ...]) -> Iterator[_Chain]:
    """The launchers of a command, those within ``bash -c '…'`` too. What stands between them (numactl, singularity exec
    IMAGE, env) is passed over."""
    prefix, words = dict(command.prefix), command.words
    starts: list[Start] = []
    at = 0
    if words[0] in _NO_START:
        return
    while at < len(words):
        name = words[at].rsplit("/", 1)[-1]
        if found := re.match(r"([A-Za-z_]\w*)=(.*)", words[at], re.DOTALL):
            prefix[found[1]] = found[2]
            at += 1
        elif name in _SHELLS or name == "sbatch":
            variables: dict[str, Value] = {**command.variables, **prefix}
            for inner in _nested(name, words[at + 1 :], job, variables):
                yield _Chain((*starts, *inner.starts), inner.devices or _visible(prefix), inner.flags, inner.program)
            return
        elif name in _SPAWNERS:
            end = _command_of(words, at + 1, _SPAWNERS[name].values)
            starts.append(_SPAWNERS[name].read([*(job if name == "srun" else ()), *words[at + 1 : end]]))
            at = end
        elif name in _AGENTS or _PYTHON.fullmatch(name) or name.endswith(".py"):
            program, agent = _program(words, at)
            if program is None:
                return
            if unknown_names(words[program]) and not words[program].endswith(".py"):
                raise _not_known(words[program])
            yield _Chain(
                (*starts, *([agent] if agent else [])),
                _visible(prefix) or _job_devices(job),
                words[program + 1 :],
                words[program],
            )
            return
        else:
            at += 1


def _not_known(word: str) -> ConfigError:
    names = ", ".join(unknown_names(word))
    return ConfigError(
        f"what {names} holds is not known",
        WHERE,
        "write its value in its place; only what the script itself sets is read",
    )


def _visible(prefix: Mapping[str, str]) -> int | None:
    """Number of accelerators that the environment shows, which torchrun's `gpu` counts."""
    listed = prefix.get("CUDA_VISIBLE_DEVICES") or prefix.get("ASCEND_RT_VISIBLE_DEVICES") or ""
    return None if not listed or unknown_names(listed) else len(listed.split(","))


def _job_devices(job: Sequence[str]) -> int | None:
    return read_slurm(job).devices if job else None


def _nested(name: str, words: Sequence[str], job: tuple[str, ...], variables: dict[str, Value]) -> Iterator[_Chain]:
    """``bash -c 'command'`` and ``sbatch … --wrap 'command'``."""
    for at, word in enumerate(words):
        inline = word.startswith("--wrap=")
        if name == "sbatch" and (inline or word == "--wrap"):
            job = (*job, *words[:at], *words[at + 2 - inline :])
            variables = {**variables, **slurm_variables(job)}
        elif name == "sbatch" or not re.fullmatch(r"-[a-z]*c", word):
            continue
        text = word.removeprefix("--wrap=") if inline else "".join(words[at + 1 : at + 2])
        for command in read_script(text, variables).commands:
            yield from _chains(command, job)
        return


def _program(words: Sequence[str], at: int) -> tuple[int | None, Start | None]:
    """(position of the program, the launcher that runs it) from an agent, an interpreter or the program itself on."""
    name = words[at].rsplit("/", 1)[-1]
    if name in _AGENTS:
        return _of_agent(name, words, at + 1)
    if not _PYTHON.fullmatch(name):
        return at, None
    at += 1
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "-m" and at + 1 < len(words):
            agent = _MODULES.get(words[at + 1])
            return (at + 1, None) if agent is None else _of_agent(agent, words, at + 2)
        if words[at] == "-c":
            return None, None
        at += 2 if words[at] in ("-W", "-X") else 1
    if at < len(words) and words[at].rsplit("/", 1)[-1] == _OURS:
        return _of_agent(_OURS, words, at + 1)
    return (at if at < len(words) else None), None


def _of_agent(name: str, words: Sequence[str], at: int) -> tuple[int | None, Start | None]:
    end, start = _AGENTS[name](words, at)
    return (end if end < len(words) else None), start


_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "deepspeed": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "accelerate.commands.launch": "accelerate",
}


# ---- agents: torchrun, deepspeed, accelerate ---------------------------------------------------


def _options(words: Sequence[str], at: int, switches: str) -> tuple[int, dict[str, str]]:
    """(position of the first word that is no option, options) from `at` on; those not in `switches` take a word."""
    found: dict[str, str] = {}
    alone = set(switches.split())
    while at < len(words) and words[at].startswith("-"):
        name, equals, value = words[at].partition("=")
        name = name.replace("_", "-")
        at += 1
        if not equals and name not in alone and at < len(words):
            value = words[at]
            at += 1
        found[name] = value
    return at, found


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[1-9]\d{0,8}", text) else None


def _torchrun(words: Sequence[str], at: int) -> tuple[int, Start]:
    """One process a node, and one node, where it says nothing else."""
    return _a_node("torchrun", words, at, "1")


def _launch_py(words: Sequence[str], at: int) -> tuple[int, Start]:
    """tools/launch.py, with torchrun's options; the nodes it is not told are those of the Slurm step."""
    return _a_node(_OURS, words, at, "")


def _a_node(name: str, words: Sequence[str], at: int, default: str) -> tuple[int, Start]:
    end, options = _options(words, at, "-m --module --standalone --no-python --run-path --use-env --virtual-local-rank")
    each = options.get("--nproc-per-node", "1")
    nodes = "1" if "--standalone" in options else options.get("--nnodes", default)
    low, _, high = nodes.partition(":")
    count = _number(low) if high in ("", low) else None
    why = "" if count or not nodes else f"{name}'s number of nodes is open (--nnodes {shown(nodes)})"
    if _number(each) is None:
        why = f"{name} counts the devices of the machine (--nproc-per-node {shown(each)})"
    return end, Start(name, True, None, count, _number(each), why=why).filled()


def _deepspeed(words: Sequence[str], at: int) -> tuple[int, Start]:
    end, options = _options(
        words, at, "-m --module --force-multi --no-python --no-local-rank --no-ssh --save-pid --no-ssh-check"
    )
    slots = [host.partition(":")[2] for host in options.get("--include", options.get("-i", "")).split("@")]
    if all(slots) and not unknown_names("".join(slots)):
        sizes = [len(slot.split(",")) for slot in slots]
        return end, Start("deepspeed", True, sum(sizes), len(sizes), sizes[0] if len(set(sizes)) == 1 else None)
    hosts = options.get("--hostfile", options.get("-H", ""))
    each, nodes = _number(options.get("--num-gpus")), _number(options.get("--num-nodes", "" if hosts else "1"))
    why = (
        ""
        if each and nodes
        else f"deepspeed counts the devices of {shown(hosts) or 'the machine'} (no --num_gpus and --num_nodes)"
    )
    return end, Start("deepspeed", True, None, nodes, each, why=why).filled()


def _accelerate(words: Sequence[str], at: int) -> tuple[int, Start]:
    at += "".join(words[at : at + 1]) == "launch"
    switches = (
        "-m --module --multi-gpu --cpu --use-deepspeed --use-fsdp --use-megatron-lm --no-python --same-network "
        "--debug --quiet -q"
    )
    end, options = _options(words, at, switches)
    ranks, nodes = _number(options.get("--num-processes")), _number(options.get("--num-machines", "1"))
    why = "" if ranks else "accelerate reads its number of processes from a file (no --num_processes)"
    return end, Start("accelerate", True, ranks, nodes, why=why).filled()


_AGENTS: dict[str, Callable[[Sequence[str], int], tuple[int, Start]]] = {
    "torchrun": _torchrun,
    _OURS: _launch_py,
    "deepspeed": _deepspeed,
    "accelerate": _accelerate,
}


# ---- srun and mpirun ---------------------------------------------------------------------------

_SLURM = {
    "-N": "nodes",
    "--nodes": "nodes",
    "-n": "ntasks",
    "--ntasks": "ntasks",
    "--ntasks-per-node": "per-node",
    "--tasks-per-node": "per-node",
    "--gpus-per-node": "gpus-per-node",
    "--gres": "gres",
    "-G": "gpus",
    "--gpus": "gpus",
    "--ntasks-per-gpu": "per-gpu",
    "--gpus-per-task": "gpus-per-task",
}


def read_slurm(words: Sequence[str]) -> Start:
    """What options of srun or sbatch say; the last of several equal ones counts."""
    said: dict[str, str] = {}
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if short := re.fullmatch(r"(-[NnG])(\d.*)", word):
            said[_SLURM[short[1]]] = short[2]
        elif option in _SLURM:
            said[_SLURM[option]] = value if equals else "".join(words[at + 1 : at + 2])
    for key, text in said.items():  # 4-4 and a100:8 are a number too
        low, _, high = text.partition("-")
        said[key] = low if high == low else text.rsplit(":", 1)[-1] if "gpu" in key else text
    nodes, tasks, each, devices, gpus, per_gpu, a_task = (
        _number(said.get(key))
        for key in ("nodes", "ntasks", "per-node", "gpus-per-node", "gpus", "per-gpu", "gpus-per-task")
    )
    if listed := re.search(r"gpu(?::[\w.-]*[A-Za-z][\w.-]*)?:(\d+)", said.get("gres", "")):
        devices = devices or int(listed[1])
    gpus = gpus or (nodes * devices if nodes and devices else None)
    if devices is None and gpus and nodes and gpus % nodes == 0:
        devices = gpus // nodes
    if not {"ntasks", "per-node"} & set(said):
        tasks = gpus * per_gpu if gpus and per_gpu else gpus // a_task if gpus and a_task else None
        each = 1 if tasks is None and nodes else None  # Slurm's default
    why = next(
        (
            f"srun's {key} is {shown(said[key])}"
            for key in ("nodes", "ntasks", "per-node")
            if key in said and not _number(said[key])
        ),
        "",
    )
    if tasks is not None and nodes and each and tasks != nodes * each:
        each = None  # then it is the most that a node may have
    return Start("srun", False, tasks, nodes, each, devices, why or "srun names no nodes and tasks").filled()


def slurm_variables(words: Sequence[str]) -> dict[str, Value]:
    """Variables that Slurm sets in a job with these options."""
    start = read_slurm(words)
    nodes, devices = str(start.nodes or ""), str(start.devices or "")
    per_node = str(start.per_node or "") if any("tasks-per-node" in word for word in words) else ""
    tasks = str(start.ranks or "")
    values = {
        "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_NTASKS": tasks,
        "SLURM_NPROCS": tasks,
        "SLURM_NTASKS_PER_NODE": per_node,
        "SLURM_TASKS_PER_NODE": per_node,
        "SLURM_GPUS_PER_NODE": devices,
        "SLURM_GPUS_ON_NODE": devices,
    }
    return {name: value for name, value in values.items() if value}


def _mpirun(words: Sequence[str]) -> Start:
    ranks = each = nodes = None
    why = "mpirun names no number of processes"
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        value = value if equals else "".join(words[at + 1 : at + 2])
        if option in ("-n", "-np", "--np", "--n", "-c"):
            ranks, why = _number(value), f"mpirun's {option} is {shown(value)}"
        elif option in ("-npernode", "--npernode", "-N", "-ppn", "-perhost"):
            each = _number(value)
        elif option in ("--map-by", "-map-by") and (found := re.match(r"ppr:(\d+):node", value)):
            each = int(found[1])
        elif option in ("-H", "-host", "--host", "-hosts") and value and not unknown_names(value):
            slots = [_number(host.partition(":")[2]) for host in value.split(",")]
            nodes = len(slots)
            if all(slots):
                each = each or (slots[0] if len(set(slots)) == 1 else None)
                ranks = ranks or sum(slot or 0 for slot in slots)
    if nodes is None and ranks and each and ranks % each == 0:
        nodes = ranks // each
    return Start("mpirun", False, ranks, nodes, each, why=why).filled()


class _Spawner(NamedTuple):
    """`values`: options that take a word; `read`: what its options say."""

    read: Callable[[Sequence[str]], Start]
    values: frozenset[str]


_SRUN_VALUES = frozenset(
    [
        *_SLURM,
        *"""-J --job-name -p --partition -A --account -w --nodelist -o --output -e --error -i --input
    -t --time -c --cpus-per-task --mem --mem-per-gpu --mem-per-cpu -C --constraint -x --exclude -D --chdir -q --qos
    --mpi --cpu-bind --gpu-bind --container-image --container-mounts --container-name
    --container-workdir --jobid --reservation --network -m --distribution -r --relative
    --het-group --comment""".split(),
    ]
)
_MPI_VALUES = frozenset(
    """-n -np --np --n -c -N -H -host --host -hosts -hostfile --hostfile -machinefile --machinefile -f -x
    --map-by -map-by --bind-to -bind-to -npernode --npernode -ppn -perhost --wdir -wdir --rank-by --prefix""".split()
)
_SPAWNERS = {
    "srun": _Spawner(read_slurm, _SRUN_VALUES),
    **{name: _Spawner(_mpirun, _MPI_VALUES) for name in ("mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun")},
}


def _command_of(words: Sequence[str], at: int, values: frozenset[str]) -> int:
    """Position of what srun or mpirun starts, behind options of all kinds: the first word that is a launcher or a
    program."""
    while at < len(words):
        name = words[at].rsplit("/", 1)[-1]
        if words[at] in values:
            at += 2
        elif name in _AGENTS or name in _SPAWNERS or name in _SHELLS or name.endswith(".py") or _PYTHON.fullmatch(name):
            return at
        elif "=" in words[at] and re.match(r"[A-Za-z_]\w*=", words[at]):
            return at  # env A=1 program
        else:
            at += 1
    return at


# ---- from the launchers to the ranks -----------------------------------------------------------


def _launch(chain: _Chain) -> Launch:
    """The ranks where all launchers of a chain agree on them."""
    outer = [start for start in chain.starts if not start.agent]
    agent = next((start for start in chain.starts if start.agent), None)
    tasks = outer[-1] if outer else None
    flags = chain.flags
    if agent is None:
        if tasks is None:
            return Launch(flags, why="it names no launcher")
        return Launch(flags, tasks.ranks, tasks.per_node, "" if tasks.ranks else tasks.why)
    agents = tasks.ranks if tasks is not None else 1
    nodes, each = agent.nodes, agent.per_node
    if agent.name in _ONCE_A_NODE:
        devices = (tasks.devices if tasks else None) or chain.devices
        each = each or devices
        nodes = nodes or (agents if tasks is not None or not agent.why else None)
        agent = replace(agent, nodes=nodes, per_node=each, ranks=None).filled()
    if agent.ranks is None:
        return Launch(flags, why=agent.why)
    if tasks is not None and agents is not None and agents != (nodes if agent.name != "deepspeed" else 1):
        own = f"each for {nodes} node{'s' * (nodes != 1)}" if agent.name in _ONCE_A_NODE else f"for {nodes} machines"
        return Launch(flags, why=f"{tasks.name} starts {agents} times {agent.name}, {own}")
    sharing = agents // tasks.nodes if tasks is not None and agents and tasks.nodes and agents % tasks.nodes == 0 else 1
    return Launch(flags, agent.ranks, agent.per_node and agent.per_node * max(sharing, 1))

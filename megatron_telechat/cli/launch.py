"""launch.py: start the ranks of a training on one node or many, and start them again when one is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_telechat.checkpoint.lineage import saved_in
from megatron_telechat.checkpoint.local.marker import read_marker
from megatron_telechat.cli.tool import ToolParser, positive, purpose, run_tool
from megatron_telechat.config import load_run_config
from megatron_telechat.config.flags import read_command_line
from megatron_telechat.errors import ConfigError, UserError
from megatron_telechat.locations import Location
from megatron_telechat.parallel.cluster import rank_variables
from megatron_telechat.supervisor.goodput import Goodput
from megatron_telechat.supervisor.nodes import LocalNode, Others, follow, listen
from megatron_telechat.supervisor.supervise import Limits, Supervisor, signals_noted
from megatron_telechat.training.lease import LEASE_FILE, Holder

_SWITCHES = {"-m", "--module", "--no-python", "--standalone", "-h", "--help"}
_PROGRAM = "pretrain_telechat2.py"
_PORT = 29500


class _Job(NamedTuple):
    """What is started, where.

    Attributes:
        command: program and arguments of a rank.
        arguments: flags of the training; None for a program that is not ours.
        nodes, ranks: number of nodes, and ranks of this one.
        node: number of this node; None: node 0 gives it.
        address, port: where node 0 is reached.
        name: what all supervisors of the job have in common.
    """

    command: list[str]
    arguments: list[str] | None
    nodes: int
    ranks: int
    node: int | None
    address: str
    port: int
    name: str


def main(argv: Sequence[str] | None = None) -> int:
    """Start a job and return its exit code."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    parser = _parser()
    at = _program_at(argv)
    options = parser.parse_args(argv[:at])
    job = _job(options, argv[at:], os.environ)
    limits = Limits(options.max_restarts, options.max_restarts_without_progress, options.join_timeout)
    folders = _folders(job, os.environ)
    environ = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
    environ["TORCHELASTIC_RUN_ID"] = job.name  # tells the ranks that a launcher has given them their numbers
    with signals_noted() as asked:
        local = LocalNode(job.command, environ, job.ranks, asked)
        listener = listen(job.address, job.port, job.node) if job.nodes > 1 else None
        if job.nodes > 1 and listener is None:
            return follow(local, job.address, job.port, job.node, job.name, limits.join_s, _say)
        others = Others(listener, job.nodes - 1, job.name)
        goodput = None
        if folders is not None:
            goodput = Goodput(folders.run_dir, lambda: _hold(folders.run_dir, local.pids), _say)
        return Supervisor(local, others, job.address, limits, _say, folders, goodput).run()


def _hold(run_dir: Path, pids: Sequence[int]) -> bool:
    """Whether one of these processes of this host holds the run folder."""
    try:
        holder = Holder.from_bytes((run_dir / LEASE_FILE).read_bytes())
    except OSError:
        return False
    return holder.pid in pids and holder.host == os.uname().nodename


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def _parser() -> ToolParser:
    parser = ToolParser(
        description=purpose(__doc__),
        usage="launch.py [options] PROGRAM [arguments]   (on every node; the options are torchrun's)",
        epilog="Exit code: the job's. 75 (stopped on request) and 2 to 5 (errors that would come again) are not "
        "restarted; lost ranks, 1 and 6 are. See docs/launching.md.",
    )
    add = parser.add_argument
    add("--nproc-per-node", "--nproc_per_node", default=None, metavar="N", help="ranks of this node (default: 1)")
    add("--nnodes", default=None, metavar="N", help="number of nodes (default: 1)")
    add("--node-rank", default=None, metavar="N", help="number of this node (default: Slurm's or Kubeflow's; else node 0 is the one that has the address, and gives the others theirs)")  # fmt: skip # noqa: E501
    add("--rdzv-endpoint", default=None, metavar="HOST[:PORT]", help="where node 0 is reached")
    add("--master-addr", default=None, metavar="HOST", help="the same")
    add("--master-port", default=None, metavar="PORT", help=f"the same (default: {_PORT})")
    add("--rdzv-id", default=None, metavar="NAME", help="name of the job: nodes of another one are refused")
    add("--rdzv-backend", "--rdzv-conf", default=None, metavar="X", help="accepted, not needed")
    add("--standalone", action="store_true", help="one node")
    add("-m", "--module", action="store_true", help="PROGRAM is the name of a Python module")
    add("--no-python", action="store_true", help="PROGRAM is not started with Python")
    add("--max-restarts", type=_count, default=None, metavar="N", help="restarts in all (default: any number)")
    add("--max-restarts-without-progress", type=_count, default=3, metavar="N", help="give up after so many losses in a row without a new checkpoint (default: %(default)s)")  # fmt: skip # noqa: E501
    add("--join-timeout", type=positive(float), default=600.0, metavar="SECONDS", help="how long a node may be missing (default: %(default)g)")  # fmt: skip # noqa: E501
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise ValueError(text)
    return int(text)


def _program_at(argv: Sequence[str]) -> int:
    """Position of the program: behind it all words are its own."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        alone = "=" in argv[at] or argv[at].replace("_", "-") in _SWITCHES
        at += 1 if alone else 2
    return min(at, len(argv))


def _job(options, words: list[str], environ: Mapping[str, str]) -> _Job:
    if not words:
        raise ConfigError("no program is named", "command line", "launch.py --nproc-per-node 8 pretrain/... FLAGS")
    step = rank_variables({k: v for k, v in environ.items() if not k.startswith("PET_")})
    if step.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"{step['LOCAL_WORLD_SIZE']} processes of a node were started",
            "srun or mpirun",
            "start launch.py once a node (--ntasks-per-node 1), or the training itself without launch.py",
        )
    nodes = 1 if options.standalone else _number("--nnodes", options.nnodes, environ, "PET_NNODES", step, "WORLD_SIZE")
    ranks = _number("--nproc-per-node", options.nproc_per_node, environ, "PET_NPROC_PER_NODE", {}, "")
    host, _, port = (options.rdzv_endpoint or environ.get("PET_RDZV_ENDPOINT", "")).partition(":")
    address = host or options.master_addr or environ.get("PET_MASTER_ADDR") or step.get("MASTER_ADDR", "")
    port = port or options.master_port or environ.get("PET_MASTER_PORT") or step.get("MASTER_PORT") or str(_PORT)
    node = options.node_rank or environ.get("PET_NODE_RANK") or step.get("RANK")
    if nodes > 1 and not address:
        raise ConfigError(f"{nodes} nodes, and none is named to lead", "--nnodes", "--rdzv-endpoint HOST:29500")
    if not port.isdigit() or (node is not None and not node.isdigit()):
        raise ConfigError(f"port {port!r} or node {node!r} is not a number", "command line", "give numbers")
    return _Job(
        [*([] if options.no_python else [sys.executable, "-u", *(["-m"] if options.module else [])]), *words],
        words[1:] if Path(words[0]).name == _PROGRAM else None,
        nodes,
        ranks,
        int(node) if node is not None else None,
        address if nodes > 1 else "127.0.0.1",
        int(port),
        options.rdzv_id or environ.get("PET_RDZV_ID") or environ.get("SLURM_JOB_ID") or "job",
    )


def _number(
    flag: str, given: str | None, environ: Mapping[str, str], name: str, step: Mapping[str, str], of_step: str
) -> int:
    """A number of nodes or ranks: the flag's, else Kubeflow's, else that of the Slurm step, else 1."""
    text = given or environ.get(name) or step.get(of_step) or "1"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            f"{flag} is {text!r}",
            "command line" if given else f"environment variable {name}",
            "give a number: what a machine has is not counted, and the number of nodes does not change in a run",
        )
    return int(text)


class _Folders:
    """The checkpoints and the run folder of a training."""

    def __init__(self, run_dir: Path, save_dir: Location):
        self.run_dir, self._save_dir = run_dir, save_dir

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Step and name of the newest checkpoint: of a local one too, as the run folder tells of it."""
        newest: tuple[int, str] | None = None
        try:
            saved = saved_in(self._save_dir)
            newest = (saved[-1].step, saved[-1].digest) if saved else None
        except (UserError, OSError):
            pass
        local = read_marker(self.run_dir)
        if local is not None and local.step > (newest[0] if newest is not None else 0):
            return local.step, local.save
        return newest


def _folders(job: _Job, environ: Mapping[str, str]) -> _Folders | None:
    """Where a training writes; None for another program, and for a command that starts none.

    Raises:
        ConfigError: the training's configuration has problems, which are reported once in place of once a rank.
    """
    if job.arguments is None:
        return None
    actions = read_command_line(job.arguments).actions
    if actions.starts_nothing or actions.help or actions.version or actions.list_presets:
        return None
    ranks = {"WORLD_SIZE": str(job.nodes * job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
    run = load_run_config(job.arguments, {**environ, **ranks}).run
    return _Folders(run.run_dir, run.save_dir)

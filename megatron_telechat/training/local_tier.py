"""The local checkpoints of a run: opened once the ranks are joined, used by every stage, closed at the end.

Whatever goes wrong with them ends no run: it is one warning, and the run goes on with the checkpoints of the shared
folder alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_telechat.checkpoint.asynchronous import Report
from megatron_telechat.checkpoint.lineage import Saved
from megatron_telechat.checkpoint.local.copies import LocalCopies, Place
from megatron_telechat.checkpoint.local.inventory import NodeParts
from megatron_telechat.checkpoint.local.marker import LocalMarker, write_marker
from megatron_telechat.checkpoint.local.newest import Newest, open_newest
from megatron_telechat.checkpoint.local.parts import parts_in
from megatron_telechat.checkpoint.local.peers import connect, is_loopback, own_address
from megatron_telechat.checkpoint.local.saves import LocalSaved, LocalSaves, LocalTarget
from megatron_telechat.checkpoint.local.worker import listen
from megatron_telechat.checkpoint.owner import run_id
from megatron_telechat.checkpoint.staging import StagingBuffer
from megatron_telechat.checkpoint.start import Start
from megatron_telechat.checkpoint.train_state import TrainState
from megatron_telechat.checkpoint.writer_process import WriterProcess
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.errors import ConfigError, UserError
from megatron_telechat.host import available_bytes
from megatron_telechat.parallel.agreement import from_rank_0, gather_objects, this_rank
from megatron_telechat.parallel.state import ParallelState
from megatron_telechat.training.tolerance import reason, tolerated, warn_once

if TYPE_CHECKING:
    from megatron_telechat.backend import Backend

_NAME = "local checkpoints"
_ROOM_FOR_HEADERS = 1 << 20
_PRELOAD = ("megatron_telechat.checkpoint.local.worker", "megatron_telechat.training.lease")
"""What a save needs in the process, so that the first one takes no longer than the others."""
_WITHOUT = "the training goes on without local checkpoints"


class _Joined(NamedTuple):
    """What a rank says of itself when the tier opens.

    Attributes:
        node: the first rank of its node.
        problem: why nothing can be written here; "" where it can.
        parts: what the node holds; of its first rank.
    """

    node: int
    host: str
    port: int
    problem: str
    parts: NodeParts | None


@dataclass
class LocalTier:
    """See the module; the same calls on all ranks. `open_local_tier` makes it.

    Attributes:
        copies: what the nodes hold, until the run has begun.
        step: of the newest local checkpoint of this process; None before the first.
        fault: why there will be no saves; "" where there will. What lies on the nodes may still be read.
    """

    run_dir: Path
    root: Path
    interval: int
    saves: LocalSaves | None
    copies: LocalCopies | None
    about: str
    _first_of_node: bool
    _continues: tuple[str, ...] = ()
    step: int | None = None
    fault: str = ""

    # ---- the start --------------------------------------------------------------------------

    def open_newest(self, start: Start, saved: Saved | None) -> Newest:
        """What a run begins with, its local and its shared checkpoints taken together; see `newest.open_newest`. A
        collective."""
        return open_newest(self.copies, start, saved) if self.copies is not None else Newest()

    def goes_on_from(self, *digests: str) -> None:
        """The run goes on from these checkpoints of the shared folder: rank 0 calls it when one is loaded or
        committed."""
        self._continues = tuple(dict.fromkeys(digest for digest in digests if digest))

    def begun(self, goes_on_from: Sequence[str] | None = None) -> None:
        """The run has loaded what it begins with.

        Args:
            goes_on_from: see `goes_on_from`; None: as before.
        """
        if goes_on_from is not None:
            self.goes_on_from(*goes_on_from)
        if self.copies is not None:
            self.copies.close()
            self.copies = None
        if self.fault:
            gather_objects(None)  # nobody reads any more
            self._off(self.fault)
            self.fault = ""

    def require_memory(self, needed: int, beside: bool) -> None:
        """Switch the saves off where a node has no memory for the copies; a collective.

        Args:
            needed: bytes of this rank's copy.
            beside: whether the saves into the shared folder take as much again.
        """
        everyone = gather_objects((platform.node(), needed * (2 if beside else 1), available_bytes()))
        wanted: dict[str, int] = defaultdict(int)
        free: dict[str, int] = {}
        for node, nbytes, available in everyone:
            wanted[node] += nbytes
            free[node] = min(free.get(node, available), available)
        tight = max(wanted, key=lambda node: wanted[node] / max(free[node], 1))
        if self.saves is not None and wanted[tight] > free[tight]:
            sizes = f"{wanted[tight] / 2**30:.2f} GiB wanted, {free[tight] / 2**30:.2f} GiB free on {tight}"
            self._off(f"no host memory for the copies: {sizes}")
        if self.saves is not None and self.step is None:
            self.saves.expect(needed + _ROOM_FOR_HEADERS)

    # ---- the saves --------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether to begin a save after this step; the same on all ranks. One that is under way is not waited for."""
        return self.saves is not None and step % self.interval == 0 and not self.saves.under_way

    def save(
        self, state: TrainState, run: RunConfig, parallel: ParallelState, under_way: str, started_s: float
    ) -> None:
        """Begin a save; on all ranks.

        Args:
            under_way: id of the save into the shared folder that is not committed yet; of rank 0.
            started_s: when training stopped for it.
        """
        assert self.saves is not None
        self.saves.begin(state, run, parallel, self._continues, under_way, started_s)

    def report(self) -> Report:
        """How far this rank is with the save under way, for the agreement of a step."""
        return self.saves.report() if self.saves is not None else Report()

    def staged(self) -> None:
        """Wait until the weights may change."""
        if self.saves is not None:
            self.saves.staged()

    def settle(self, over: int, failed: int, ranks: int) -> LocalSaved | None:
        """After a step, on all ranks: the save under way, if all nodes have committed it."""
        if self.saves is None:
            return None
        saved = self.saves.settle(over, failed, ranks)
        for what, why in self.saves.problems:
            warn_once(
                f"{_NAME}: {what}", f"{_NAME}: {what}: {why}; the training goes on, and the next save tries again"
            )
        self.saves.problems.clear()
        if saved is not None:
            self.step = saved.step
            if this_rank() == 0:
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                with tolerated("local_checkpoint.json"):
                    write_marker(self.run_dir, LocalMarker(saved.step, saved.save, str(self.root), now))
        if self.saves.lost:
            self._off("a process that writes them has ended")
        return saved

    # ---- the end ----------------------------------------------------------------------------

    def close(self) -> None:
        """Give processes and memory back; this rank alone. What was saved stays."""
        if self.copies is not None:
            self.copies.close()
            self.copies = None
        if self.saves is not None:
            self.saves.close()
            self.saves = None

    def remove(self) -> None:
        """The run is complete, and its last checkpoint lies in the shared folder: give the disks of the nodes back. A
        collective."""
        self.close()
        gather_objects(None)  # nobody writes any more
        if self._first_of_node:
            shutil.rmtree(self.root, ignore_errors=True)

    def _off(self, why: str) -> None:
        """On all ranks."""
        if this_rank() == 0:
            warn_once(_NAME, f"{_NAME}: {why}; {_WITHOUT}")
        if self.saves is not None:
            self.saves.close()
            self.saves = None


def open_local_tier(run: RunConfig, backend: Backend) -> LocalTier | None:
    """Start the processes that write, and look at what the nodes hold; a collective over all ranks, once they are
    joined. None where the run has no local checkpoints, or no identifier of its own: then rank 0 has said why.

    Raises:
        ConfigError: on every rank: nodes that should hold each other's copies have one folder.
    """
    settings = run.checkpoint
    if settings.non_persistent_save_interval is None or settings.non_persistent_local_ckpt_dir is None:
        return None
    secrets = _secrets(run.run_dir)
    if secrets is None:
        return None
    identifier, secret, incarnation = secrets
    root = Path(settings.non_persistent_local_ckpt_dir).absolute() / identifier
    rank, local = this_rank(), int(os.environ.get("LOCAL_RANK", "0") or 0)
    node, host = rank - local, _host()
    made: tuple[StagingBuffer, WriterProcess] | None = None
    port, problem = 0, ""
    try:
        if not hasattr(os, "memfd_create"):
            raise OSError(0, "local checkpoints need Linux (memfd_create)")
        made = _process(backend)
        made[1].submit(listen, root, host, secret, local == 0)
        port, problem = made[1].result()
    except (OSError, UserError) as error:
        problem = reason(error)
    mine = None
    if local == 0:
        parts, notes = parts_in(root, identifier)
        mine = NodeParts(node, tuple(parts), tuple(notes))
    everyone: list[_Joined] = gather_objects(_Joined(node, host, port, problem, mine))
    if settings.replication:
        _require_folders_of_their_own(root, everyone, node, local, secret)
    places = [Place(one.node, (one.host, one.port)) for one in everyone]
    copies = LocalCopies(root, identifier, places, secret, [one.parts for one in everyone if one.parts is not None])
    tier = LocalTier(
        run.run_dir, root, settings.non_persistent_save_interval, None, copies, _about(run, root), local == 0
    )
    faults = [f"rank {number} cannot write: {one.problem}" for number, one in enumerate(everyone) if one.problem]
    if made is not None:
        mirrors = tuple(places[one].address for one in mirrors_of(rank, run)) if settings.replication else ()
        target = LocalTarget(root, identifier, incarnation, secret, mirrors, prunes=local == 0)
        numbers = [one.number for one in copies.found] or [0]
        whole = [one.number for one in copies.found if one.saved is not None and not one.missing] or [0]
        tier.saves = LocalSaves(target, made[0], made[1], backend, max(numbers), max(whole))
    if unreachable := _unreachable(places, rank, secret):
        faults.append(unreachable)
        tier.copies = None
    if faults:
        # Another node may still read what lies here: the processes stay until the run has begun.
        tier.about, tier.fault = f"none: {faults[0]}", faults[0]
    return tier


def _unreachable(places: Sequence[Place], rank: int, secret: str) -> str:
    """Why a node cannot reach the next one; "" where each can. A collective.

    It is found out before anything is begun that would need it.
    """
    nodes = sorted({place.node for place in places})
    fault = ""
    if rank in nodes:
        address = places[nodes[(nodes.index(rank) + 1) % len(nodes)]].address
        try:
            connect(address, secret).close()
        except OSError as error:
            fault = f"rank {rank} cannot reach {address[0]} port {address[1]}: {reason(error)}"
    return next((one for one in gather_objects(fault) if one), "")


def mirrors_of(rank: int, run: RunConfig) -> list[int]:
    """The ranks that keep copies of what a rank writes: those of its group, which are replication_jump apart. As in
    Megatron-LM, of each block of jump times factor ranks those with the same remainder are a group."""
    jump, factor = run.checkpoint.replication_jump, run.checkpoint.replication_factor
    assert jump is not None, "the rules have refused that"
    block = rank // (jump * factor) * jump * factor
    return [one for one in range(block + rank % jump, block + jump * factor, jump) if one != rank]


def _secrets(run_dir: Path) -> tuple[str, str, str] | None:
    """(identifier of the run, secret of this job, incarnation), of rank 0 for all; None where there is none."""
    found: tuple[str, str, str] | None = None
    if this_rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            found = run_id(run_dir), uuid.uuid4().hex, uuid.uuid4().hex
        except (OSError, UserError) as error:
            warn_once(_NAME, f"{_NAME}: the run folder cannot be written ({reason(error)}); {_WITHOUT}")
    return from_rank_0(found)


def _process(backend: Backend) -> tuple[StagingBuffer, WriterProcess]:
    buffer = StagingBuffer(backend, 0)
    try:
        return buffer, WriterProcess(buffer.fd, preload=_PRELOAD)
    except BaseException:
        buffer.close()
        raise


def _host() -> str:
    """The address at which other nodes reach this one; a collective."""
    mine = own_address(os.environ.get("MASTER_ADDR"))
    everyone: Sequence[tuple[str, str]] = gather_objects((mine, socket.gethostname()))
    away = [host for host, name in everyone if not is_loopback(host) and name != socket.gethostname()]
    # The host of rank 0 may know itself by a name that means the host itself.
    return own_address(away[0]) if is_loopback(mine) and away else mine


def _require_folders_of_their_own(root: Path, everyone: Sequence[_Joined], node: int, local: int, secret: str) -> None:
    """Copies in the folder that the originals lie in are lost with them. A collective."""

    def mark(number: int) -> Path:
        return root / f".node-{number}-{secret[:8]}"

    nodes = sorted({one.node for one in everyone})
    if local == 0 and not everyone[node].problem:
        with tolerated(str(root)):
            mark(node).touch()
    gather_objects(None)
    seen = [other for other in nodes if other != node and mark(other).exists()] if local == 0 else []
    shared = [one for one in gather_objects((node, seen)) if one[1]]
    if local == 0:
        with tolerated(str(root)):
            mark(node).unlink(missing_ok=True)
    if shared:
        raise ConfigError(
            f"the nodes of ranks {shared[0][0]} and {shared[0][1][0]} have one folder for local checkpoints: a copy "
            "there would be lost with the original",
            f"non_persistent_local_ckpt_dir={root.parent}",
            "a folder on a disk of each node (NVMe, /dev/shm), or drop --replication",
        ).on_every_rank()


def _about(run: RunConfig, root: Path) -> str:
    """A line for a person."""
    settings = run.checkpoint
    copies = ""
    if settings.replication:
        jump, others = settings.replication_jump, settings.replication_factor - 1
        copies = f", {others} cop{'y' if others == 1 else 'ies'} on other nodes (ranks {jump} apart)"
    return f"every {settings.non_persistent_save_interval} steps on the nodes, in {root}{copies}"

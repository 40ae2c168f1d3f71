"""Two nodes on one machine: what a local checkpoint costs a training beside the saves into the shared folder, and how
long a restart takes from each. Each node is a process of one rank and one thread, with a folder of its own as its disk.

Ranks are forked from a process that has loaded torch, and train through the library's own loop; every rank writes what
it timed into a file, and of two ranks the slower one counts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tools.bench.checkpointing.asynchronous import BYTES_A_LAYER, BYTES_OTHER, MODEL

RANKS = 2
DISK = "disk"
NEVER = 10**6
"""Steps that no run here takes: saves begin when the bench says so."""
SHARED = ["--global-batch-size", str(RANKS), "--use-distributed-optimizer", "--keep-last", "2"]
LOCAL = (
    f"--save-interval {NEVER} --non-persistent-save-interval {NEVER} --non-persistent-ckpt-type local "
    f"--non-persistent-local-ckpt-dir {DISK} --replication --replication-jump 1"
).split()
SAVES = ("sync", "async", "local")
LOADS = ("shared", "own disk", "mirror")
ALONE = 6
_PATIENCE_S = 200.0


class Node:
    """A rank of the bench, in its own process: its trainer, and the arms; all are collective.

    Args:
        trainer: of a run with local checkpoints and asynchronous saves.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._iterators = trainer.training_iterators()
        self._local: list[dict[str, Any]] = []
        self._shared: list[Any] = []
        self._mirrored_s: float | None = None
        trainer._settle = lambda committed: self._shared.append(committed) if committed is not None else None
        for _ in range(3):
            self.step()

    def step(self) -> float:
        """Seconds of a step, without what it waited for copies; and the saves that it hears of."""
        under_way = [one._save for one in (self.trainer.saving._beside, self.trainer.tier.saves) if one._save]
        begin, waited = time.perf_counter(), sum(one.blocked_s for one in under_way)
        self.trainer.take_step(self._iterators)
        seconds = time.perf_counter() - begin - sum(one.blocked_s for one in under_way) + waited
        self.trainer.saving.settle_locally(lambda line: None, self._local.append)
        self.trainer._settle(self.trainer.saving.settle())
        return seconds

    def alone(self) -> dict[str, Any]:
        return {"steps": [self.step() for _ in range(ALONE)]}

    def sync(self) -> dict[str, Any]:
        """A save into the shared folder that training waits for."""
        self.trainer._save(wait=True)
        return {"blocked_s": self._shared.pop().seconds, "steps": []}

    def beside(self, begin: Callable[[], None], is_over: Callable[[], bool]) -> list[float]:
        """Steps until a save has become a checkpoint."""
        begin()
        steps = []
        while not is_over():
            steps.append(self.step())
        return steps

    def asynchronous(self) -> dict[str, Any]:
        steps = self.beside(lambda: self.trainer._save(wait=False), lambda: bool(self._shared))
        saved = self._shared.pop()
        return {"blocked_s": saved.blocked_s, "save_s": saved.seconds, "steps": steps}

    def local(self) -> dict[str, Any]:
        """A save onto both nodes. It is over once all ranks have heard that all copies are there, and are committed."""
        from megatron_telechat.checkpoint.local import saves

        mirrored: list[float] = []

        def is_over() -> bool:
            save = self.trainer.tier.saves._save
            if not mirrored and (save is None or save.phase is saves._Phase.COMMITTING):
                mirrored.append(time.perf_counter())
            return bool(self._local)

        began = time.perf_counter()
        steps = self.beside(self.trainer._save_locally, is_over)
        saved = self._local.pop()
        return {
            "blocked_s": saved["waited_s"],
            "mirrored_s": mirrored[0] - began,
            "save_s": saved["seconds"],
            "steps": steps,
        }


def save_rounds(trainer: Any, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The arms in turn; one more round goes before, in which memory is taken and folders are made."""
    node = Node(trainer)
    arms = {"alone": node.alone, "sync": node.sync, "async": node.asynchronous, "local": node.local}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, arm in arms.items():
            values = arm()
            if number:
                found[name].append(values)
    return found


def recovery(flags: Sequence[str]) -> dict[str, Any]:
    """Seconds in which a rank finds, checks and loads what its run goes on from, once model and optimizer are there."""
    from megatron_telechat.training import loop

    seconds: list[float] = []

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - begin)

        return run

    with (
        patch.object(loop, "find_beginning", timed(loop.find_beginning)),
        patch.object(loop, "load_beginning", timed(loop.load_beginning)),
        trainer_of(flags) as trainer,
    ):
        assert trainer.resumed is not None
        return {"recovery_s": sum(seconds), "from": str(trainer.resumed.path), "notes": trainer.resumed.message}


@contextmanager
def trainer_of(flags: Sequence[str]):
    """A trainer of this rank, with the local checkpoints that its flags ask for; nothing of them is removed."""
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.parallel.state import join
    from megatron_telechat.training.local_tier import open_local_tier
    from megatron_telechat.training.loop import Trainer

    run = load_run_config(flags, os.environ).run
    backend = get_backend(run.training.device)
    backend.install()
    join(run, backend)
    tier = open_local_tier(run, backend)
    trainer = Trainer(run, tier=tier)
    try:
        yield trainer
    finally:
        if tier is not None:
            tier.close()
        trainer.release()


class Nodes:
    """Two nodes in a folder.

    Args:
        folder: on the disk that is measured.
        nbytes: of a checkpoint, about.
    """

    def __init__(self, folder: Path, nbytes: float):
        self.folder = folder
        layers = max(1, round((nbytes - BYTES_OTHER) / BYTES_A_LAYER))
        self.flags = [*MODEL, *SHARED, "--num-layers", str(layers), "--run-dir", str(folder / "run")]

    def node(self, number: int) -> Path:
        return self.folder / f"node{number}"

    def run(self, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What each rank found. Raises SystemExit where one fails."""
        from megatron_telechat.supervisor.nodes import free_port

        port, children = free_port(), []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                self._be_rank(rank, port, work)
            children.append(child)
        self._wait(children)
        return [json.loads((self.folder / f"found.{rank}.json").read_text()) for rank in range(RANKS)]

    def _be_rank(self, rank: int, port: int, work: Callable[[], dict[str, Any]]) -> None:
        code = 1
        try:
            self.node(rank).mkdir(parents=True, exist_ok=True)
            os.chdir(self.node(rank))
            os.environ.update(
                RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            out = os.open(self.folder / f"{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            found = work()
            (self.folder / f"found.{rank}.json").write_text(json.dumps(found))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)

    def _wait(self, children: Sequence[int]) -> None:
        left, end, failed = set(children), time.monotonic() + _PATIENCE_S, False
        while left:
            for child in sorted(left):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    left.discard(child)
                    failed = failed or status != 0
            if failed or time.monotonic() > end:
                for child in left:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        if failed:
            raise SystemExit("\n".join((self.folder / f"{rank}.log").read_text()[-2000:] for rank in range(RANKS)))

    # ---- the two measurements ---------------------------------------------------------------

    def saves(self, rounds: int) -> list[dict[str, Any]]:
        """By rank, what each arm found in each round. The last things saved are a shared checkpoint and, on from it, a
        local one."""

        def work() -> dict[str, Any]:
            with trainer_of([*self.flags, *LOCAL]) as trainer:
                return save_rounds(trainer, rounds)

        return self.run(work)

    def loads(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of a restart from each place, after its files were dropped from the page cache."""
        found: dict[str, list[float]] = {name: [] for name in LOADS}
        lost = self.folder / "lost"
        for _ in range(rounds):
            for name in LOADS:
                local = [] if name == "shared" else LOCAL
                if name == "mirror":
                    self.node(1).rename(lost)
                self.drop()
                ranks = self.run(lambda local=local: recovery([*self.flags, *local]))
                if name == "mirror":
                    shutil.rmtree(self.node(1))
                    lost.rename(self.node(1))
                assert ("part_" in ranks[0]["from"]) == bool(local), ranks[0]
                assert ("come from other nodes" in ranks[0]["notes"]) == (name == "mirror"), ranks[0]
                found[name].append(max(one["recovery_s"] for one in ranks))
        return found

    def drop(self) -> None:
        """Take all checkpoints out of the page cache."""
        os.sync()
        for path in self.folder.rglob("*.safetensors"):
            with open(path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def sizes(self) -> dict[str, int]:
        """Bytes: of a shared checkpoint, of the part of rank 1, and of its copy on the other node."""
        shared = max((self.folder / "run" / "checkpoints").glob("iter_*"))
        own, copy = (max(self.node(node).glob(f"{DISK}/*/part_00001/iter_*")) for node in (1, 0))
        return {name: _bytes(path) for name, path in (("shared", shared), ("written", own), ("sent", copy))}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, nbytes: float, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, of the slower of two ranks; seconds and bytes."""
    import torch  # noqa: F401  (once, for all ranks)

    import megatron_telechat.training.sequence  # noqa: F401

    nodes = Nodes(folder, nbytes)
    ranks = nodes.saves(rounds)
    sizes = nodes.sizes()
    return summary(ranks, nodes.loads(rounds), sizes)


def summary(
    ranks: Sequence[Mapping[str, list[dict[str, Any]]]], loads: Mapping[str, list[float]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """What is printed, and checked."""
    step = statistics.median(second for one in ranks[0]["alone"] for second in one["steps"])
    out: dict[str, Any] = {"bytes": dict(sizes), "rounds": len(ranks[0]["alone"]), "step_s": step}
    for arm in SAVES:
        for name in ("blocked_s", "mirrored_s", "save_s"):
            values = [max(one[arm][number].get(name, 0.0) for one in ranks) for number in range(out["rounds"])]
            if any(values):
                out[f"{arm}_{name}"] = statistics.median(values)
        steps = [statistics.fmean(one["steps"]) for one in ranks[0][arm] if one["steps"]]
        if steps:
            out[f"{arm}_slowdown"] = statistics.median(steps) / step - 1
            out[f"{arm}_steps"] = statistics.median(len(one["steps"]) for one in ranks[0][arm])
    out["recovery_s"] = {name: statistics.median(values) for name, values in loads.items()}
    out["load_average"] = os.getloadavg()[0]
    return out

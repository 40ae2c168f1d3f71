"""Jobs of two nodes on one machine, for the tests of local checkpoints: each node is a process with a folder of its
own, in which it is started, so that a relative --non-persistent-local-ckpt-dir is another disk on each.

Ranks are forked from a process that has imported torch once, train through the library's door, and are killed with
SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_telechat.config import load_run_config
from megatron_telechat.errors import UserError
from megatron_telechat.supervisor.nodes import free_port
from tests.training.runs import DENSE

DISK = "disk"
FLAGS = [flag for flag in DENSE if flag != "--fp32"] + (
    "--bf16 --use-distributed-optimizer --hidden-dropout 0.1 --train-iters 20 --save-interval 10".split()
)
LOCAL = (
    f"--non-persistent-save-interval 4 --non-persistent-ckpt-type local --non-persistent-local-ckpt-dir {DISK}".split()
)
MIRRORED = [*LOCAL, "--replication", "--replication-jump", "1"]

Hook = Callable[[Any], None]
"""Called in a rank with its trainer, before the first step."""


@dataclass
class Job:
    """A run on two nodes; ``start`` is one start of it."""

    folder: Path
    flags: Sequence[str] = field(default_factory=lambda: [*FLAGS, *MIRRORED])
    name: str = "run"
    ranks: int = 2

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def node(self, number: int) -> Path:
        return self.folder / f"node{number}"

    def parts(self, node: int) -> list[str]:
        """The committed parts on a node, ``0@16`` for that of rank 0 and step 16; without their run."""
        found = (self.node(node) / DISK).glob("*/part_*/iter_*.save-*")
        return sorted(f"{int(path.parent.name[5:])}@{int(path.name[5:12])}" for path in found)

    def files(self, node: int, rank: int, step: int) -> list[Path]:
        return sorted((self.node(node) / DISK).glob(f"*/part_{rank:05d}/iter_{step:07d}.save-*/*"))

    def wipe(self, node: int) -> None:
        shutil.rmtree(self.node(node))

    def start(
        self, *flags: str, until: int | None = None, hook: Hook | None = None, hooked: int | None = None
    ) -> list[int]:
        """Exit codes of the ranks, negative: killed. Where one is killed, all are.

        Args:
            until: all ranks are killed before this step is taken.
            hook, hooked: called in this rank; unset: in all.
        """
        port = free_port()
        children = []
        for rank in range(self.ranks):
            child = os.fork()
            if child == 0:
                self._be_rank(rank, port, flags, until, hook if hooked in (None, rank) else None)
            children.append(child)
        return _wait(children)

    def _be_rank(self, rank: int, port: int, flags: Sequence[str], until: int | None, hook: Hook | None) -> None:
        code = 1
        try:
            self.node(rank).mkdir(parents=True, exist_ok=True)
            os.chdir(self.node(rank))
            os.environ.update(
                RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(self.ranks), LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            self.run.mkdir(parents=True, exist_ok=True)
            out = os.open(self.folder / f"{self.name}.{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = self._train(flags, until, hook)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)

    def _train(self, flags: Sequence[str], until: int | None, hook: Hook | None) -> int:
        from megatron_telechat.training import train

        _at_each_step(until, hook)
        loaded = load_run_config([*self.flags, *flags, "--run-dir", str(self.run)], os.environ)
        try:
            return train(loaded.stages)
        except UserError as error:
            print(error.render(), flush=True)
            return error.exit_code

    def log(self, rank: int = 0) -> str:
        """What the last start said."""
        return (self.folder / f"{self.name}.{rank}.log").read_text()

    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> dict[str, list]:
        """Loss and gradient norm of each step, as last recorded."""
        return {str(one["step"]): [one["loss"], one["grad_norm"]] for one in self.records() if "loss" in one}

    def resumed_at(self) -> list[int]:
        return [one["step"] for one in self.records() if one.get("event") == "resume"]


def _at_each_step(until: int | None, hook: Hook | None) -> None:
    """Let every local save be over two steps after it began, and the ranks end where they are told to."""
    from megatron_telechat.checkpoint.local.saves import LocalSaves
    from megatron_telechat.training.loop import Trainer

    take_step, report = Trainer.take_step, LocalSaves.report
    hooked: list[Hook] = [hook] if hook is not None else []

    def step(self, iterators):
        if hooked:
            hooked.pop()(self)
        if until is not None and self.step + 1 == until:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, iterators)

    def patient(self):
        if self._save is not None and not hasattr(self, "copies_are_slow"):
            self.staged()
            for _ in range(1000):
                if not self._save.busy or self.writer.wait(0.01):
                    break
        return report(self)

    trainer: Any = Trainer
    saves: Any = LocalSaves
    trainer.take_step, saves.report = step, patient


def _wait(children: Sequence[int], patience: float = 200.0) -> list[int]:
    """Exit codes. Raises AssertionError where the ranks do not end."""
    codes: dict[int, int] = {}
    end = time.monotonic() + patience
    hangs = False
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        hangs = hangs or time.monotonic() > end
        if any(code < 0 for code in codes.values()) or hangs:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert not hangs, f"the ranks did not end within {patience} s"
    return [codes[child] for child in children]


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 4
    path.write_bytes(bytes(raw))

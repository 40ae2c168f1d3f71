"""Runs with asynchronous saves whose rank is killed (SIGKILL) at points of them; prints what each left, as JSON lines.

usage: worker_async_kills.py FOLDER POINT...
POINT: NAME:N of a call of the writer process (fsync, rename, replace), or of the rank (begin, begun, staged, step).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch._dynamo  # noqa: E402, F401  (once, for all children; an optimizer loads it)

import megatron_telechat.training.loop  # noqa: E402, F401
from megatron_telechat.checkpoint import CheckpointReader, latest_checkpoint  # noqa: E402
from megatron_telechat.checkpoint.asynchronous import AsynchronousSaves  # noqa: E402
from megatron_telechat.checkpoint.names import step_of  # noqa: E402
from tests.training import writer_faults  # noqa: E402
from tests.training.runs import DENSE, make_trainer  # noqa: E402

FLAGS = [*DENSE, "--train-iters", "7", "--save-interval", "2", "--checkpoint-mode", "async", "--hidden-dropout", "0.1"]
OF_WRITER = ("fsync", "rename", "replace")


def train(run: Path, point: str | None = None) -> None:
    """The whole run, or until it is killed."""
    trainer = make_trainer(FLAGS, run)
    assert trainer.saving._beside is not None
    writer = trainer.saving._beside._writer
    (run / "writer").write_text(str(writer.pid))
    if point is not None:
        name, number = point.split(":")
        if name in OF_WRITER:
            writer.submit(writer_faults.kill_rank_before, name, int(number))
            writer.result()
        else:
            kill_at(trainer, name, int(number))
    trainer.fit()
    trainer.release()


def kill_at(trainer, name: str, ordinal: int) -> None:
    """Be killed at so manieth save: before it begins, once it has begun, once its copy is there, or a step later."""
    begun = [0]
    begin, staged, take_step = AsynchronousSaves.begin, AsynchronousSaves.staged, trainer.take_step

    def die(at: str) -> None:
        if name == at and begun[0] == ordinal:
            os.kill(os.getpid(), signal.SIGKILL)

    def beginning(self, *args) -> None:
        begun[0] += 1
        die("begin")
        begin(self, *args)
        die("begun")

    def copied(self) -> None:
        staged(self)
        die("staged")

    def step(iterators):
        result = take_step(iterators)
        die("step")
        return result

    saves: Any = AsynchronousSaves
    saves.begin, saves.staged, trainer.take_step = beginning, copied, step


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a process that does this."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(4)
    return os.waitpid(child, 0)[1]


def losses(run: Path) -> dict[str, list]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {str(one["step"]): [one["loss"], one["grad_norm"]] for one in records if "loss" in one}


def newest(root: Path) -> int | None:
    path = latest_checkpoint(root)
    if path is None:
        return None
    CheckpointReader(path, verify=True)
    return step_of(path)


def alive(pid: int) -> bool:
    """Whether a process still runs after some seconds; one that nobody has waited for does not."""
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    folder = Path(sys.argv[1])
    assert in_child(lambda: train(folder / "whole")) == 0
    for point in sys.argv[2:]:
        run = folder / point.replace(":", "_")
        status = in_child(lambda: train(run, point))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
        writer = int((run / "writer").read_text())
        line = {"point": point, "root": str(run / "checkpoints"), "newest": newest(run / "checkpoints")}
        line["processes"] = [writer] if alive(writer) else []
        assert in_child(lambda: train(run)) == 0
        line |= {"joined": losses(run), "whole": losses(folder / "whole")}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""What a save costs a training, in between the steps and beside them: the time it stands still, and the steps that get
slower. One process trains a real model on the CPU with one thread.

Arms of the work beside: *process*, as a run does it; *thread*, the same functions in a thread of the training process;
*copy*, a program that copies as many bytes to the same disk, which no save can undercut. *manifest* is the commit's
work for a checkpoint of many ranks, in a process and in a thread.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL = (
    "--preset telechat2-tiny --hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --kv-channels 64 "
    "--num-query-groups 8 --vocab-size 8192 --seq-length 64 --micro-batch-size 1 --global-batch-size 1 "
    "--mock-data --device cpu --fp32 --no-progress --lr 1e-4 --lr-decay-style constant --lr-warmup-iters 0 "
    "--train-iters 100000 --checkpoint-mode async"
).split()
BYTES_A_LAYER, BYTES_OTHER = 41e6, 101e6
"""Of a checkpoint of that model: 12 bytes a parameter."""
MANIFEST_RANKS = 1024
TENSORS, BOXES_OF_A_RANK = 400, 100


class ThreadWriter:
    """The interface of `WriterProcess`, in a thread of this process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._answer: tuple[bool, Any] = (False, None)

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        def run() -> None:
            try:
                self._answer = (False, function(*args))
            except Exception as error:
                self._answer = (True, error)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def is_over(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def result(self) -> Any:
        assert self._thread is not None
        self._thread.join()
        failed, value = self._answer
        if failed:
            raise value
        return value

    def wait(self, seconds: float) -> bool:
        assert self._thread is not None
        self._thread.join(seconds)
        return self.is_over()

    def close(self) -> None:
        pass


def make_manifest(ranks: int) -> int:
    """What the commit of so many ranks does beside the disk: bytes of the manifest."""
    from megatron_telechat.checkpoint.manifest import Manifest, StoredBox, TensorEntry
    from megatron_telechat.checkpoint.names import FileEntry
    from megatron_telechat.tensors.boxes import Box, tiling_fault

    rows = ranks * BOXES_OF_A_RANK // TENSORS
    tensors = {}
    for number in range(TENSORS):
        key = f"optimizer/exp_avg/decoder.layers.{number}.mlp.linear_fc1.weight"
        boxes = tuple(
            StoredBox(f"rank_{row % ranks:05d}.safetensors", f"{key}@{row},0", Box((row, 0), (1, 4096)))
            for row in range(rows)
        )
        assert tiling_fault((rows, 4096), [stored.box for stored in boxes]) is None
        tensors[key] = TensorEntry("float32", (rows, 4096), boxes)
    files = {f"rank_{rank:05d}.safetensors": FileEntry(1 << 30, "00000000") for rank in range(ranks)}
    return len(Manifest(1, 1, "", {}, {}, files, tensors).to_bytes())


@contextmanager
def training(folder: Path, nbytes: float) -> Iterator[Any]:
    """A trainer whose checkpoint has about so many bytes."""
    layers = max(1, round((nbytes - BYTES_OTHER) / BYTES_A_LAYER))
    with trainer_of([*MODEL, "--num-layers", str(layers), "--run-dir", str(folder)]) as trainer:
        yield trainer


@contextmanager
def trainer_of(flags: Sequence[str]) -> Iterator[Any]:
    """A trainer of one process."""
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.loop import Trainer

    trainer = Trainer(load_run_config(flags, os.environ).run)
    try:
        yield trainer
    finally:
        trainer.release()


class Bench:
    """Times steps of a trainer, alone and beside something."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._iterators = trainer.training_iterators()
        self._writer = trainer.saving._beside._writer
        for _ in range(3):
            self.step()

    def step(self) -> tuple[float, Any]:
        """Seconds of a step, without what it waited for a copy; and the save that it heard of."""
        begin = time.perf_counter()
        under_way = self.trainer.saving._beside._save
        waited = under_way.blocked_s if under_way is not None else 0.0
        self.trainer.take_step(self._iterators)
        waited = under_way.blocked_s - waited if under_way is not None else 0.0
        committed = self.trainer.saving.settle()
        return time.perf_counter() - begin - waited, committed

    def alone(self, steps: int) -> list[float]:
        return [self.step()[0] for _ in range(steps)]

    def waiting_save(self) -> float:
        """Seconds of a save that training waits for."""
        return self._save(wait=True).seconds

    def save_beside(self, thread: bool = False) -> tuple[list[float], float, float]:
        """Steps beside a save; how long training stood still for it, and how long it took."""
        self.trainer.saving._beside._writer = ThreadWriter() if thread else self._writer
        self._save(wait=False)
        steps = []
        while True:
            seconds, committed = self.step()
            steps.append(seconds)
            if committed is not None:
                self.trainer.saving._beside._writer = self._writer
                return steps, committed.blocked_s, committed.seconds

    def beside(self, work: Callable[[], Callable[[], bool]]) -> list[float]:
        """Steps beside some work, which says whether it is over."""
        over, steps = work(), []
        while not over():
            steps.append(self.step()[0])
        return steps

    def _save(self, wait: bool) -> Any:
        """As `Trainer._save` does it, the check of the weights included."""
        heard: list[Any] = []
        self.trainer._settle = heard.append
        self.trainer._save(wait)
        for path in sorted(self.trainer.paths.save_dir.glob("iter_*"))[:-2]:
            shutil.rmtree(path)
        return heard[-1]

    def manifest(self, thread: bool) -> Callable[[], Callable[[], bool]]:
        """The commit's work of many ranks."""

        def start() -> Callable[[], bool]:
            writer = ThreadWriter() if thread else self._writer
            writer.submit(make_manifest, MANIFEST_RANKS)

            def over() -> bool:
                if not writer.is_over():
                    return False
                writer.result()
                return True

            return over

        return start


def copy_program(source: Path, target: Path) -> Callable[[], Callable[[], bool]]:
    """A copy of a file in memory to the disk, synced, by another program."""

    def start() -> Callable[[], bool]:
        command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync", "status=none"]
        process = subprocess.Popen(command)
        return lambda: process.poll() is not None

    return start


def measure(folder: Path, nbytes: float, repeats: int) -> dict[str, Any]:
    """The arms in turn, ``repeats`` times; seconds, medians over the turns, and slow-downs of steps."""
    memory = Path("/dev/shm") / f"bench-{os.getpid()}"
    found: dict[str, list[Any]] = {}

    def note(arm: str, value: Any) -> None:
        found.setdefault(arm, []).append(value)

    with training(folder, nbytes) as trainer:
        bench = Bench(trainer)
        bench.waiting_save()
        size = sum(path.stat().st_size for path in trainer.paths.save_dir.glob("iter_*/*.safetensors"))
        try:
            memory.write_bytes(os.urandom(1 << 20) * (size >> 20))
            bench.save_beside()  # the memory of the copies is taken
            for _ in range(repeats):
                note("alone", bench.alone(6))
                note("sync_s", bench.waiting_save())
                for arm in ("process", "thread"):
                    steps, blocked, seconds = bench.save_beside(thread=arm == "thread")
                    note(arm, steps)
                    note(f"{arm}_blocked_s", blocked)
                    note(f"{arm}_save_s", seconds)
                note("copy", bench.beside(copy_program(memory, folder / "copy")))
                (folder / "copy").unlink()
                for arm in ("process", "thread"):
                    note(f"manifest_{arm}", bench.beside(bench.manifest(thread=arm == "thread")))
        finally:
            memory.unlink(missing_ok=True)
    return summary(size, found)


def summary(size: int, found: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Medians, and the mean step beside each arm over the median step alone."""
    alone = statistics.median(second for steps in found["alone"] for second in steps)
    out: dict[str, Any] = {"bytes": size, "step_s": alone, "repeats": len(found["alone"])}
    for arm, values in found.items():
        if arm.endswith("_s"):
            out[arm] = statistics.median(values)
        elif arm != "alone":
            out[f"{arm}_slowdown"] = statistics.median(statistics.fmean(steps) for steps in values if steps) / alone - 1
            out[f"{arm}_steps"] = statistics.median(map(len, values))
    out["blocked_share"] = out["process_blocked_s"] / out["sync_s"]
    out["load_average"] = os.getloadavg()[0]
    return out

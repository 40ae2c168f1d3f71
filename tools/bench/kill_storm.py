"""Kill ranks until the run is complete, and compare it with one that nobody killed.

    python tools/bench/kill_storm.py --count 50 --model dense --through-supervisor
    python tools/bench/kill_storm.py --count 50 --model moe --asynchronous
    python tools/bench/kill_storm.py --count 5 --model one-rank --device cuda --through-supervisor

A random rank gets SIGKILL at a random moment: while the processes start and load, between steps, or in a save (the run
saves every second step). Then the same command is given again, by this program or, with ``--through-supervisor``, by
``tools/launch.py`` itself. At the end the joined metrics and all tensors of the last checkpoint must be those of an
uninterrupted run, bit for bit. Exit code 0: they are. Tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SAVE_INTERVAL = 2
STEPS_A_KILL = 6
MARGIN = 10
"""Steps before the end in which no kill begins: tiny ones take some 30 ms."""
SHARE_BEFORE_THE_FIRST_STEP = 0.3
KEYS = ("loss", "grad_norm", "lr", "consumed_samples", "loss_scale", "skipped_steps", "aux_loss")
SMALL = (
    "--seq-length 32 --vocab-size 256 --hidden-size 64 --kv-channels 8 --init-method-std 0.05 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 0 --mock-data --fp32 "
    "--no-progress --log-interval 1 --hidden-dropout 0.1 "
)
MODELS = {
    "one-rank": (1, "--preset telechat2-tiny --ffn-hidden-size 128 " + SMALL),
    "dense": (
        4,
        "--preset telechat2-tiny --ffn-hidden-size 128 --tensor-model-parallel-size 2 "
        "--pipeline-model-parallel-size 2 " + SMALL,
    ),
    "moe": (
        2,
        "--preset telechat2-tiny-moe --ffn-hidden-size 32 --moe-ffn-hidden-size 32 --expert-model-parallel-size 2 "
        "--no-fold-tensor-into-experts " + SMALL,
    ),
}


AVERAGE = "--ema-decay 0.9 --average-window-steps 5 --eval-interval 3 --eval-iters 1"


class Kill(NamedTuple):
    """One kill: which rank, what the job was at, the last step it had logged, where it went on, after how long.

    The last two are None where the next kill came before the first new step.
    """

    rank: int
    phase: str
    step: int
    resumed: int | None = None
    recovery_s: float | None = None


class Job:
    """A run under tools/launch.py.

    Args:
        restarts: whether the supervisor restarts by itself.
    """

    def __init__(self, ranks: int, flags: Sequence[str], run_dir: Path, restarts: bool):
        limits = ["--max-restarts-without-progress", "1000"] if restarts else ["--max-restarts", "0"]
        self._command = [
            *(sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc-per-node", str(ranks), *limits),
            *(str(ROOT / "pretrain" / "pretrain_telechat2.py"), *flags, "--run-dir", str(run_dir)),
        ]
        self.run_dir, self.ranks = run_dir, ranks
        self._environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        self._environ.setdefault("OMP_NUM_THREADS", "1")
        self._log = open(run_dir.with_suffix(".log"), "ab")
        self.start()

    def start(self) -> None:
        """Give the command (again)."""
        self.process = subprocess.Popen(self._command, env=self._environ, stdout=self._log, stderr=self._log)

    def pids(self) -> dict[int, int]:
        """Processes of the ranks that run, by rank."""
        found: dict[int, int] = {}
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                words = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): int(child) for word in words if word.startswith(b"RANK=")}
        except (OSError, ValueError):
            return {}
        return found

    def records(self) -> Iterator[dict]:
        """The lines of metrics.jsonl that are whole."""
        try:
            text = (self.run_dir / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def steps(self) -> list[int]:
        """The steps logged, in order, those done again too."""
        return [record["step"] for record in self.records() if "loss" in record]

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any((self.run_dir / "checkpoints").glob("iter_*.tmp-*"))

    def tail(self) -> str:
        """The end of the output, for a failure."""
        return self.run_dir.with_suffix(".log").read_text(errors="replace")[-4000:]


def wait_until(there, job: Job, limit_s: float = 300) -> bool:
    """Wait for a condition; False when the job has ended first."""
    deadline = time.monotonic() + limit_s
    while not there():
        if job.process.poll() is not None:
            return there()
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {limit_s:.0f} s\n{job.tail()}")
        time.sleep(0.005)
    return True


def storm(job: Job, count: int, last_step: int, start_s: float, draw: random.Random, restarts: bool) -> Iterator[Kill]:
    """Kill ranks so many times, seeing to it that the run goes on after each."""
    # Steps that wait to be reached; the run must not be complete before the last kill.
    targets = sorted(draw.sample(range(2, last_step - MARGIN), count))
    early = [draw.random() < SHARE_BEFORE_THE_FIRST_STEP for _ in targets]
    before = 0
    for number, target in enumerate(targets):
        if early[number]:
            moment = time.monotonic() + draw.uniform(0.0, start_s)
            wait_until(lambda: len(job.pids()) == job.ranks, job)
            wait_until(lambda at=moment, n=before: time.monotonic() >= at or len(job.steps()) > n, job)
        else:
            wait_until(lambda target=target: max(job.steps(), default=0) >= target, job)
            time.sleep(draw.uniform(0.0, 0.15))
        pids, seen = job.pids(), job.steps()
        phase = "save" if job.saving() else "start" if len(seen) == before else "step"
        if not pids:
            raise SystemExit(f"no rank runs; exit code {job.process.poll()}\n{job.tail()}")
        rank = draw.choice(sorted(pids))
        killed = time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        if not restarts:
            code = job.process.wait()
            if code != 128 + signal.SIGKILL:
                raise SystemExit(f"exit code {code} after a kill\n{job.tail()}")
            job.start()
        gone = set(pids.values())
        wait_until(lambda gone=gone: len(job.pids()) == job.ranks and not gone & set(job.pids().values()), job)
        before = len(job.steps())
        if any(early[number + 1 : number + 2]):
            yield Kill(rank, phase, max(seen, default=0))
            continue
        if not wait_until(lambda before=before: len(job.steps()) > before, job):
            raise SystemExit(f"exit code {job.process.returncode} after a kill\n{job.tail()}")
        yield Kill(rank, phase, max(seen, default=0), job.steps()[before] - 1, time.monotonic() - killed)


def joined(run_dir: Path) -> dict[int, tuple]:
    """What must repeat, by step; later lines of a step replace earlier ones."""
    found = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            found[record["step"]] = tuple(record.get(key) for key in KEYS)
    return found


def last_tensors(run_dir: Path) -> dict[str, tuple[str, bytes]]:
    """Headers without remarks, and bytes, of the files of the last checkpoint."""
    folder = sorted((run_dir / "checkpoints").glob("iter_" + "[0-9]" * 7))[-1]
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = {name: entry for name, entry in json.loads(data[8:end]).items() if name != "__metadata__"}
        found[path.name] = (json.dumps(header, sort_keys=True), data[end:])
    return found


def table(kills: Sequence[Kill]) -> str:
    """The kills, one a line."""
    lines = [f"{'kill':>4}  {'rank':>4}  {'phase':<6} {'step':>5}  {'on from':>7}  {'recovered in':>12}"]
    for number, kill in enumerate(kills, 1):
        place = f"{number:>4}  {kill.rank:>4}  {kill.phase:<6} {kill.step:>5}"
        if kill.resumed is None or kill.recovery_s is None:
            lines.append(f"{place}  {'-':>7}  {'-':>12}")
        else:
            lines.append(f"{place}  {kill.resumed:>7}  {kill.recovery_s:>10.2f} s")
    return "\n".join(lines)


def asynchronous_flags() -> list[str]:
    """The flag of asynchronous saves, of a release that has them."""
    from megatron_telechat.config.fields import fields_by_name

    return ["--checkpoint-mode", "async"] if "checkpoint_mode" in fields_by_name() else []


def main() -> int:
    """Run the bench; 0 where nothing was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="number of kills (default: %(default)s)")
    parser.add_argument("--model", choices=sorted(MODELS), default="dense")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--through-supervisor", action="store_true", help="let tools/launch.py restart by itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the kills and times to this file")
    parser.add_argument("--keep", type=Path, help="folder for both runs (default: a temporary one)")
    parser.add_argument("--average", action="store_true", help="keep averages of the weights, and evaluate them")
    if asynchronous_flags():
        parser.add_argument("--asynchronous", action="store_true", help="save with --checkpoint-mode async")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kill_storm_"))
    folder.mkdir(parents=True, exist_ok=True)
    ranks, text = MODELS[args.model]
    last_step = STEPS_A_KILL * (args.count + 1)
    flags = [*text.split(), "--device", args.device, "--train-iters", str(last_step)]
    flags += ["--save-interval", str(SAVE_INTERVAL), "--keep-last", "3"]
    if args.average:
        flags += AVERAGE.split()
    if getattr(args, "asynchronous", False):
        flags += asynchronous_flags()

    began = time.monotonic()
    whole = Job(ranks, flags, folder / "whole", restarts=False)
    wait_until(lambda: whole.steps(), whole)
    start_s = time.monotonic() - began
    if whole.process.wait() != 0:
        raise SystemExit(whole.tail())
    print(f"uninterrupted: {last_step} steps in {time.monotonic() - began:.1f} s, the first after {start_s:.2f} s")

    job = Job(ranks, flags, folder / "killed", restarts=args.through_supervisor)
    draw = random.Random(args.seed)
    kills = []
    try:
        for kill in storm(job, args.count, last_step, start_s, draw, args.through_supervisor):
            kills.append(kill)
            print(table(kills).splitlines()[-1] if len(kills) > 1 else table(kills), flush=True)
        code = job.process.wait()
    finally:
        job.process.kill()
    if code != 0:
        raise SystemExit(f"exit code {code}\n{job.tail()}")
    mean = statistics.mean(kill.recovery_s for kill in kills if kill.recovery_s is not None)
    print(f"mean time to recover {mean:.2f} s, {mean / start_s:.2f} of a plain start ({start_s:.2f} s)")
    same = joined(whole.run_dir) == joined(job.run_dir)
    tensors = last_tensors(whole.run_dir) == last_tensors(job.run_dir)
    verdicts = {True: "equal bit for bit", False: "DIFFERENT"}
    print(f"{len(kills)} of {args.count} kills; metrics of {last_step} steps: {verdicts[same]}; "
          f"tensors of the last checkpoint: {verdicts[tensors]}")  # fmt: skip
    if args.json:
        document = {"kills": [kill._asdict() for kill in kills], "start_s": start_s, "mean_s": mean, "equal": same}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if not args.keep and same and tensors:
        shutil.rmtree(folder)
    return 0 if same and tensors else 1


if __name__ == "__main__":
    sys.exit(main())

"""The process beside the ranks of a node: it ends a job that stands, and says which rank stands.

A process and not a thread: a rank that hangs in a call of C may hold the lock of its interpreter. It reads the pulse
files (`training.pulse`), holds no lock, imports no torch, and ends when local rank 0 has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from enum import IntEnum
from pathlib import Path
from typing import Any

import psutil

from megatron_telechat.training.pulse import OVER, WAITS, Beat, Phase, read_pulses, stack_path

STACKS_SIGNAL: int = getattr(signal, "SIGRTMIN", signal.SIGQUIT) + (5 if hasattr(signal, "SIGRTMIN") else 0)
"""A rank answers it with its stacks, from C: also where the lock of its interpreter is held."""
_ANSWER_S, _ABORT_S, _LINGER_S = 3.0, 10.0, 30.0
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_FILE_PHASES = frozenset({Phase.IMPORTS, Phase.LOADING, Phase.WRITING, Phase.DATA_INDEX})
"""Phases in which bytes read or written are a move: one file of many gigabytes is one phase."""
_START_PHASES = frozenset({Phase.IMPORTS, Phase.MODEL})
"""Phases in which time of the CPU is a move: a slow start is none that hangs. In others a wait may spin."""
_WAITING_CODE = (
    *("/torch/distributed/", "/pipeline_parallel/p2p_communication.py", "/distributed/param_and_grad_buffer.py"),
    "/megatron_telechat/parallel/",
)


class Standing(IntEnum):
    """How a rank stands; the lower, the more likely the cause."""

    GONE = 0
    STOPPED = 1
    SILENT = 2
    AT_WORK = 3
    WAITING = 4


@dataclass(frozen=True)
class Job:
    """What the monitor of a node is told.

    Attributes:
        folder: of the pulse files.
        run_dir: where the message and the stacks go.
        hang_s: so long may no rank move; 0: for ever.
        index_s: the same while the sample index is built, which has a limit of its own.
        nodes: of the job.
        owns_folder: whether it removes the folder at the end.
    """

    folder: str
    run_dir: str
    hang_s: float
    index_s: float
    nodes: int = 1
    owns_folder: bool = False


@dataclass(frozen=True)
class Verdict:
    """One rank of a node that stands."""

    beat: Beat
    standing: Standing
    why: str


@dataclass
class Stillness:
    """For how long no rank of the node has moved, in seconds that the monitor was awake: a machine or a job that was
    suspended as a whole has not hung."""

    seconds: float = 0.0
    _marks: dict[int, Any] = field(default_factory=dict)

    def observe(self, marks: Mapping[int, Any], elapsed_s: float, suspended: bool = False) -> float:
        """Seconds so far.

        Args:
            marks: by rank what changes when it moves.
            elapsed_s: since the last look.
            suspended: every rank is stopped.
        """
        if marks != self._marks:
            self._marks = dict(marks)
            self.seconds = 0.0
        elif not suspended:
            self.seconds += elapsed_s
        return self.seconds


class Ranks:
    """The processes behind the pulses. A process id that another process has by now is not taken for the rank's."""

    def __init__(self) -> None:
        self._processes: dict[tuple[int, int], psutil.Process | None] = {}

    def _of(self, beat: Beat) -> psutil.Process | None:
        key = beat.rank, beat.pid
        if key not in self._processes:
            try:
                self._processes[key] = psutil.Process(beat.pid)
            except psutil.Error:
                self._processes[key] = None
        return self._processes[key]

    def status(self, beat: Beat) -> str:
        """psutil's word; ``dead`` where there is no such process any more."""
        process = self._of(beat)
        try:
            if process is None or not process.is_running():
                return psutil.STATUS_DEAD
            return process.status()
        except psutil.Error:
            return psutil.STATUS_DEAD

    def alive(self, beat: Beat) -> bool:
        """Whether the process is there, stopped or not."""
        return self.status(beat) not in _GONE

    def transferred(self, beat: Beat) -> int:
        """Bytes read and written so far; 0 where the system does not tell."""
        process = self._of(beat)
        try:
            counters = process.io_counters() if process is not None and hasattr(process, "io_counters") else None
        except (psutil.Error, OSError):
            return 0
        if counters is None:
            return 0
        # What is mapped into memory is read without a call.
        return sum(value for name, value in counters._asdict().items() if name.endswith(("_chars", "_bytes")))

    def computed_s(self, beat: Beat) -> float:
        """Seconds of the CPU so far."""
        process = self._of(beat)
        try:
            return sum(process.cpu_times()[:2]) if process is not None else 0.0
        except psutil.Error:
            return 0.0

    def send(self, beat: Beat, number: int) -> None:
        """Send a signal; nothing where the process is gone."""
        process = self._of(beat)
        if process is not None:
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(number)


def waits_by_stack(text: str) -> bool:
    """Whether some thread of a rank stands in an exchange with other ranks, by the stacks that faulthandler wrote."""
    innermost = re.findall(r'^(?:Current thread|Thread) .*\n\s+File "([^"]+)"', text, flags=re.MULTILINE)
    return any(part in path.replace(os.sep, "/") for path in innermost for part in _WAITING_CODE)


def judge(beat: Beat, status: str, stack: str) -> Verdict:
    """How one rank stands.

    Args:
        status: psutil's word.
        stack: what it answered; empty: nothing.
    """
    if beat.phase is Phase.FAILED:
        return Verdict(beat, Standing.GONE, "it ended with an error of its own")
    if status in _GONE:
        return Verdict(beat, Standing.GONE, "its process is gone")
    if status in _STOPPED:
        return Verdict(beat, Standing.STOPPED, "its process is stopped (SIGSTOP, or a debugger)")
    if not stack:
        disk = " in the kernel, for a disk or a device" if status == psutil.STATUS_DISK_SLEEP else ""
        return Verdict(beat, Standing.SILENT, f"it does not answer; it waits{disk}" if disk else "it does not answer")
    if waits_by_stack(stack):
        return Verdict(beat, Standing.WAITING, "it waits for other ranks")
    if beat.phase in WAITS or beat.phase in OVER:
        # The number that a reduction gave is read from the device: a kernel that does not end shows here.
        return Verdict(beat, Standing.WAITING, "it waits for other ranks, or for its device")
    return Verdict(beat, Standing.AT_WORK, "it does not wait for another rank")


def hang_message(verdicts: Sequence[Verdict], now_s: float, job: Job, still_s: float) -> tuple[str, dict[str, Any]]:
    """The message, and the same for programs.

    Args:
        verdicts: of the ranks of the node, at least one.
        now_s: on the monotonic clock.
        still_s: for how long none of them moved.
    """
    first = min(verdicts, key=lambda verdict: (verdict.standing, verdict.beat.since_s))
    beat, seconds = first.beat, now_s - first.beat.since_s
    others = [verdict for verdict in verdicts if verdict is not first]
    counted = Counter(verdict.beat.where for verdict in others)
    elsewhere = first.standing == Standing.WAITING and job.nodes > 1
    lines = [
        f"hang: rank {beat.rank} (host {beat.host}, pid {beat.pid}) stands in {beat.where} since {seconds:.0f} s: "
        f"{first.why}"
    ]
    if elsewhere:
        lines.append("  all ranks of this node wait for others: look for the rank that stands on another node")
    if others:
        shown = "; ".join(f"{count} in {where}" for where, count in counted.most_common())
        lines.append(f"  other ranks of this node: {shown}")
    alike = [str(verdict.beat.rank) for verdict in others if verdict.standing == first.standing]
    if alike and first.standing != Standing.WAITING:
        lines.append(f"  as likely the cause: ranks {', '.join(alike[:8])}{' ...' if len(alike) > 8 else ''}")
    record = {
        "event": "hang",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rank": beat.rank,
        "host": beat.host,
        "pid": beat.pid,
        "phase": beat.phase.text,
        "activity": beat.activity.text,
        "step": beat.step,
        "seconds": round(seconds, 1),
        "why": first.why,
        "on_another_node": elsewhere,
        "no_rank_moved_for_s": round(still_s, 1),
        "others": dict(counted),
        "ranks": [
            {**asdict(each.beat), "activity": each.beat.activity.text, "phase": each.beat.phase.text}
            | {"seconds": round(now_s - each.beat.since_s, 1), "standing": each.standing.name.lower()}
            for each in verdicts
        ],
    }
    return "\n".join(lines), record


class Monitor:
    """Watches the ranks of one node until local rank 0 has ended, or until they stand."""

    def __init__(self, job: Job):
        self.job = job
        self.folder = Path(job.folder)
        self.ranks = Ranks()
        self.still = Stillness()
        limits = [limit for limit in (job.hang_s, job.index_s) if limit]
        self.interval_s = min(5.0, max(0.05, min(limits, default=5.0) / 20))

    def watch(self, parent: int) -> bool:
        """Until local rank 0 (whose end of the pipe on standard input closes) is gone, or the ranks stand.

        Returns:
            Whether they stood.
        """
        last_s = time.monotonic()
        while not _closed(sys.stdin.fileno(), self.interval_s) and os.getppid() == parent:
            now_s = time.monotonic()
            elapsed_s, last_s = min(now_s - last_s, 3 * self.interval_s), now_s
            if self._stand(elapsed_s):
                self._end()
                return True
        return False

    def linger(self) -> None:
        """A rank whose peer is gone looks into the folder for who that was: it stays until all have ended."""
        deadline = time.monotonic() + _LINGER_S
        while time.monotonic() < deadline and any(map(self.ranks.alive, read_pulses(self.folder))):
            time.sleep(0.1)

    def _stand(self, elapsed_s: float) -> bool:
        beats = [beat for beat in read_pulses(self.folder) if beat.phase is not Phase.LEFT]
        if not beats or not self.job.hang_s:
            return False
        statuses = [self.ranks.status(beat) for beat in beats]
        still_s = self.still.observe(
            {beat.rank: self._mark(beat) for beat in beats}, elapsed_s, all(status in _STOPPED for status in statuses)
        )
        indexing = any(beat.phase is Phase.DATA_INDEX for beat in beats)
        return still_s >= (max(self.job.hang_s, self.job.index_s) if indexing else self.job.hang_s)

    def _mark(self, beat: Beat) -> tuple[float, ...]:
        """What changes when a rank moves."""
        transferred = self.ranks.transferred(beat) if beat.phase in _FILE_PHASES else 0
        computed_s = self.ranks.computed_s(beat) if beat.phase in _START_PHASES else 0.0
        return beat.pid, beat.count, transferred, computed_s

    def _end(self) -> None:
        beats = [beat for beat in read_pulses(self.folder) if beat.phase is not Phase.LEFT]
        stacks = self._stacks(beats)
        verdicts = [judge(beat, self.ranks.status(beat), stacks.get(beat.rank, "")) for beat in beats]
        message, record = hang_message(verdicts, time.monotonic(), self.job, self.still.seconds)
        where = self._keep(record, stacks, min(beat.rank for beat in beats))
        rest = (
            f"  the ranks of this node end now (SIGABRT){where}\n"
            "  fix: look at that rank's host, device and stack; the same command resumes from the last checkpoint; if "
            "the phase may take so long: a larger --hang-timeout-minutes"
        )
        _say(f"{message}\n{rest}\n")
        for beat in beats:
            self.ranks.send(beat, signal.SIGABRT)
            self.ranks.send(beat, signal.SIGCONT)  # a stopped one takes the signal only when it goes on
        deadline = time.monotonic() + _ABORT_S
        while time.monotonic() < deadline and any(map(self.ranks.alive, beats)):
            time.sleep(0.05)
        for beat in beats:
            if self.ranks.alive(beat):
                self.ranks.send(beat, signal.SIGKILL)

    def _stacks(self, beats: Sequence[Beat]) -> dict[int, str]:
        for beat in beats:
            self.ranks.send(beat, STACKS_SIGNAL)
        asked = [beat for beat in beats if self.ranks.status(beat) not in (*_STOPPED, *_GONE)]
        deadline, found = time.monotonic() + _ANSWER_S, {}
        while time.monotonic() < deadline:
            before = found
            found = {beat.rank: _read(stack_path(self.folder, beat.rank)) for beat in asked}
            if found == before and all(found.values()):
                break
            time.sleep(0.1)
        return {rank: text for rank, text in found.items() if text}

    def _keep(self, record: dict[str, Any], stacks: Mapping[int, str], first: int) -> str:
        """Message and stacks go to the run folder; a disk that is full keeps nobody from ending the job."""
        run_dir = Path(self.job.run_dir)
        suffix = "" if first == 0 else f"_rank_{first:05d}"
        try:
            folder = run_dir / "hang_stacks"
            folder.mkdir(exist_ok=True)
            for rank, text in stacks.items():
                (folder / f"rank_{rank:05d}.txt").write_text(text, encoding="utf-8")
            record = {**record, "stacks": str(folder)}
            path = run_dir / f"hang{suffix}.json"
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return f"; nothing could be written to {run_dir}: {error.strerror}"
        return f"; stacks: {folder}, this message: {path}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _closed(descriptor: int, timeout_s: float) -> bool:
    """Wait so long for the end of what is read there; whether it came."""
    ready, _, _ = select.select([descriptor], [], [], timeout_s)
    return bool(ready) and os.read(descriptor, 1) == b""


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def main(argv: Sequence[str]) -> int:
    """The process.

    Args:
        argv: the job as JSON, and the process id of local rank 0.
    """
    job, parent = Job(**json.loads(argv[0])), int(argv[1])
    monitor = Monitor(job)
    try:
        if not monitor.watch(parent):
            if job.owns_folder:
                monitor.linger()
    finally:
        if job.owns_folder:
            shutil.rmtree(job.folder, ignore_errors=True)
    return 0

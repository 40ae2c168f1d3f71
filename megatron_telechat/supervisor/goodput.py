"""Goodput: which steps were kept, which were done again, and where the time went."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_telechat.files import METRICS_FILE, append_lines

GOODPUT_FILE = "goodput.jsonl"
_REMEMBERED_STEPS = 100_000
_LOOK_EVERY_S = 0.1
"""Seconds between two looks at the run folder, which may lie on a file system of many hosts."""

PARTS = {
    "steps": "steps that were done again",
    "unfinished": "from the last logged step to the end of the rank",
    "end": "to end the other ranks",
    "wait": "back-off, and nodes that were not there",
    "load": "from the start of the processes to the loaded checkpoint",
    "first_step": "from there to the first new step",
}
"""What a restart costs, in the order of time."""


class MetricsFollower:
    """Reads what a run appends to its metrics.jsonl."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / METRICS_FILE
        self._at = 0
        self.skip()

    def skip(self) -> None:
        """Go to the end: what is there is of an earlier attempt."""
        try:
            self._at = self._path.stat().st_size
        except OSError:
            self._at = 0

    def new(self) -> list[dict[str, Any]]:
        """The records since the last call; lines that are no records are passed over."""
        try:
            size = self._path.stat().st_size
            if size < self._at:
                self._at = size  # a restart took an unfinished line back
            if size == self._at:
                return []
            with open(self._path, "rb") as stream:
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [record for record in found if isinstance(record, dict)]


@dataclass
class Attempt:
    """One start of the ranks, by what the metrics say. Times are of one clock, seconds."""

    began: float
    loaded: float | None = None
    resumed_at: int = 0
    first_step: float | None = None
    steps: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    """The last logged steps and when they were seen."""

    def see(self, record: Mapping[str, Any], now: float) -> None:
        """A record of the metrics."""
        if record.get("event") == "resume":
            self.loaded, self.resumed_at = now, int(record["step"])
        elif "loss" in record:
            self.loaded = self.loaded or now
            self.first_step = self.first_step or now
            self.steps.append((int(record["step"]), now))

    @property
    def last_step(self) -> int:
        """The last step that was logged; where it began, if none was."""
        return self.steps[-1][0] if self.steps else self.resumed_at

    def time_beyond(self, step: int) -> float:
        """Seconds that went into the steps after this one."""
        if not self.steps or self.first_step is None:
            return 0.0
        kept = [when for number, when in self.steps if number <= step]
        return self.steps[-1][1] - (kept[-1] if kept else self.first_step)


@dataclass
class Death:
    """The end of an attempt that is followed by another one.

    Attributes:
        why: in words.
        noticed, gone: when the first rank was seen to have ended, and when all had.
        before_any_step: whether the job had not made a step yet: its cost is part of the start.
        cost: seconds by part, as far as they are known; `PARTS` says what they are.
        repeated: steps done again.
    """

    why: str
    attempt: Attempt
    noticed: float
    gone: float
    before_any_step: bool = False
    cost: dict[str, float] = field(default_factory=dict)
    repeated: int = 0

    @property
    def recovery_s(self) -> float:
        """From the end of the rank to the first new step."""
        return sum(self.cost.get(part, 0.0) for part in ("end", "wait", "load", "first_step"))


class Goodput:
    """The account of a job, from one start of its supervisor to the end.

    Args:
        run_dir: where the metrics are read and goodput.jsonl is written.
        ours: whether the run folder belongs to the ranks that run. Until then another job logs there, and nothing is
            written.
        say: how lines are told.
        clock: seconds; tests give another one.
    """

    def __init__(
        self,
        run_dir: Path,
        ours: Callable[[], bool],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ours, self._is_ours = ours, False
        self._path = run_dir / GOODPUT_FILE
        self._follower = MetricsFollower(run_dir)
        self._say, self._clock = say, clock
        self._start = clock()
        self._attempt: Attempt | None = None
        self._attempts: list[Attempt] = []
        self._open: Death | None = None
        self._looked = -_LOOK_EVERY_S
        self._unwritten: list[dict[str, Any]] = []
        self._warned = False
        self.deaths: list[Death] = []

    def started(self) -> None:
        """The ranks were started."""
        self._is_ours = False
        self._follower.skip()
        self._attempt = Attempt(self._clock())
        self._attempts.append(self._attempt)

    def look(self) -> None:
        """Read what the ranks have logged since the last look; asked again within 0.1 s, do nothing."""
        if self._clock() - self._looked >= _LOOK_EVERY_S:
            self._look()

    def _look(self) -> None:
        attempt, now = self._attempt, self._clock()
        self._looked = now
        if attempt is None:
            return
        if not self._is_ours:
            self._is_ours = self._ours()
        if not self._is_ours:
            self._follower.skip()
        for record in self._follower.new():
            attempt.see(record, now)
        if self._open is not None and self._open.attempt is not attempt and attempt.first_step is not None:
            self._recovered(self._open, attempt, attempt.first_step)

    def died(self, why: str, noticed: float, gone: float) -> None:
        """The attempt is over, and another one will follow."""
        self._look()
        assert self._attempt is not None
        if self._open is not None:
            self._never_stepped(self._open, self._attempt, noticed)
        attempt = self._attempt
        death = Death(why, attempt, noticed, gone, before_any_step=self._first_step() is None)
        if attempt.steps:
            death.cost["unfinished"] = max(noticed - attempt.steps[-1][1], 0.0)
        death.cost["end"] = gone - noticed
        self.deaths.append(death)
        self._open = death
        self._write({"event": "death", "why": why, "step": attempt.last_step})

    def ended(self, code: int, why: str = "", saved_step: int = 0) -> None:
        """The job is over; prints and writes the account.

        Args:
            saved_step: that of the newest checkpoint; more was not kept where the last attempt was lost.
        """
        self._look()
        if not any(attempt.loaded for attempt in self._attempts):
            return
        total = self._clock() - self._start
        first_step = self._first_step()
        start = (first_step - self._start) if first_step is not None else total
        deaths = [death for death in self.deaths if not death.before_any_step]
        parts = {part: sum(death.cost.get(part, 0.0) for death in deaths) for part in PARTS}
        lost = sum(parts.values())
        repeated = sum(death.repeated for death in deaths)
        recoveries = [death.recovery_s for death in self.deaths if "first_step" in death.cost]
        goodput = max(total - start - lost, 0.0) / total
        restarts, kept = len(self._attempts) - 1, self._kept(saved_step)
        self._say(
            f"goodput {goodput:.1%} of {total:.1f} s: {kept} steps kept, {repeated} done again, {restarts} restart"
            f"{'' if restarts == 1 else 's'}; {start:.1f} s to the first step"
        )
        if deaths:
            self._say(f"lost {lost:.1f} s: " + ", ".join(f"{_words(part)} {parts[part]:.1f}" for part in PARTS))
        if recoveries:
            mean = sum(recoveries) / len(recoveries)
            self._say(f"mean time to recover {mean:.1f} s, from the end of a rank to the first new step")
        self._write(
            {
                "event": "end",
                "exit_code": code,
                "why": why,
                "goodput": round(goodput, 4),
                "total_s": round(total, 3),
                "start_s": round(start, 3),
                "steps_kept": kept,
                "steps_repeated": repeated,
                "restarts": restarts,
                "lost_s": {part: round(value, 3) for part, value in parts.items()},
                "mean_time_to_recover_s": round(sum(recoveries) / len(recoveries), 3) if recoveries else None,
            }
        )

    def _first_step(self) -> float | None:
        """When the job made its first step."""
        return next((each.first_step for each in self._attempts if each.first_step is not None), None)

    def _kept(self, saved_step: int) -> int:
        """Steps that the run went on by."""
        loaded = [attempt for attempt in self._attempts if attempt.loaded is not None]
        reached = saved_step if self._open is not None else loaded[-1].last_step
        return max(reached - loaded[0].resumed_at, 0)

    def _recovered(self, death: Death, attempt: Attempt, first_step: float) -> None:
        self._open = None
        loaded = attempt.loaded if attempt.loaded is not None else first_step
        self._count_repeated(attempt.resumed_at)
        death.cost["wait"] = attempt.began - death.gone
        death.cost["load"] = loaded - attempt.began
        death.cost["first_step"] = first_step - loaded
        shown = ", ".join(f"{_words(part)} {death.cost[part]:.1f}" for part in ("end", "wait", "load", "first_step"))
        again = f"; {death.repeated} step{'' if death.repeated == 1 else 's'} done again" if death.repeated else ""
        self._say(f"recovered in {death.recovery_s:.1f} s ({shown}), on from step {attempt.resumed_at}{again}")
        self._write(
            {
                "event": "recovered",
                "why": death.why,
                "step": attempt.resumed_at,
                "steps_repeated": death.repeated,
                "recovery_s": round(death.recovery_s, 3),
                "lost_s": {part: round(value, 3) for part, value in death.cost.items()},
            }
        )

    def _count_repeated(self, resumed_at: int) -> None:
        """Steps beyond the one that was gone back to, of the last attempt that made any."""
        for death in reversed(self.deaths):
            if death.attempt.steps:
                death.repeated = max(death.attempt.last_step - resumed_at, 0)
                death.cost["steps"] = death.attempt.time_beyond(resumed_at)
                return

    def _never_stepped(self, death: Death, attempt: Attempt, noticed: float) -> None:
        """A restart that died before its first step: all of it was lost."""
        self._open = None
        death.cost["wait"] = attempt.began - death.gone
        death.cost["load"] = noticed - attempt.began

    def _write(self, record: dict[str, Any]) -> None:
        """Append to goodput.jsonl, once the ranks have logged something: a job that was refused writes nothing."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._unwritten.append({"time": now, **record})
        if not any(attempt.loaded for attempt in self._attempts):
            return
        try:
            append_lines(self._path, "".join(json.dumps(one) + "\n" for one in self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._say(f"warning: cannot write {self._path}: {error.strerror}; the run is not affected")


def _words(part: str) -> str:
    return part.replace("_", " ")

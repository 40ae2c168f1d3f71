"""Stop and save requests: signals and trigger files, seen by every rank at the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_telechat.errors import StopAtStart
from megatron_telechat.locations import Url
from megatron_telechat.training.lease import Claims, Leases

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "stop-now"
SAVE_FILE = "save-now"
_LEFT_ALONE_WHEN_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""What nohup and a shell's background jobs ignore on purpose."""


class StopRequests:
    """Remembers a request until the training loop polls it.

    SIGTERM, SIGUSR1, SIGUSR2, SIGINT (Ctrl-C) and SIGHUP (the terminal was closed) ask for a checkpoint and an end; so
    does a file ``stop-now`` in the run folder. A file ``save-now`` asks for a checkpoint only. A signal may reach one
    rank alone: the loop reduces :meth:`poll` over the ranks before it acts.

    A person who has pressed Ctrl-C and asks again does not want to wait: the process ends at once, by that signal.
    Ctrl-C of a terminal reaches torchrun alone, which passes it on as SIGINT and a second one as SIGTERM.

    Args:
        run_dir: where the trigger files are looked for.
        watch_files: whether this rank looks.
        speaks: whether this rank says that it was asked.
    """

    def __init__(self, run_dir: Path, watch_files: bool, speaks: bool = False):
        self._run_dir = run_dir
        self._watch_files = watch_files
        self._speaks = speaks
        self.leases: Leases | None = None
        """Those of the run's folders, where this rank holds them. Losing one is a stop, without a checkpoint."""
        self.owned: tuple[tuple[Url, str], ...] = ()
        """The prefixes of object stores that the run writes to; see `Claims`."""
        self._first: int | None = None
        self._at_start = False
        self._started = time.monotonic()
        self._ends_at: float | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread only
        for number in STOP_SIGNALS:
            if number in _LEFT_ALONE_WHEN_IGNORED and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._first is not None

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Phases before the first step: there is nothing to save, so a stop ends them where they are.

        Raises:
            StopAtStart: a signal came.
        """
        self._at_start = True
        try:
            self._raise_if_asked()
            try:
                yield
            except Exception as error:
                # A rank that was asked first has left, or the signal waited behind a call that failed for it.
                if self.asked:
                    raise StopAtStart from error
                raise
            # It may have come where an exception cannot leave, such as a destructor.
            self._raise_if_asked()
        finally:
            self._at_start = False

    def _raise_if_asked(self) -> None:
        if self.asked:
            raise StopAtStart

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._first == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._first is None:
            self._first = number
            if self._at_start:
                raise StopAtStart
            self._say(number)

    def _say(self, number: int) -> None:
        if not self._speaks:
            return
        more = "; send it again to exit at once" if number == signal.SIGINT else ""
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint, then the run ends{more}\n".encode())

    def end_after(self, minutes: float | None) -> None:
        """Ask for a stop so many minutes after this object was made, at the start of the process; None: never."""
        self._ends_at = None if minutes is None else self._started + 60 * minutes

    def poll(self) -> tuple[bool, bool]:
        """(stop, save) as this rank sees them now."""
        stop, save = self.asked, False
        if self._watch_files:
            stop = stop or (self._run_dir / STOP_FILE).exists()
            save = (self._run_dir / SAVE_FILE).exists()
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            stop = True
        return stop or not self.may_write(), save

    def may_write(self) -> bool:
        """Whether the folders of the run are still ours, as far as was seen last."""
        return self.leases is None or not self.leases.lost

    @property
    def claims(self) -> Claims:
        """To be called before a write to the folders of the run; raises LeaseError where they are another job's."""
        return Claims(self.leases.claims.leases if self.leases is not None else (), self.owned)

    def asked_anywhere(self, device: Any) -> bool:
        """Whether some rank was asked to stop by now; a small collective over all ranks."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor([float(self.poll()[0])], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def clear_files(self, save_only: bool = False) -> None:
        """Remove the trigger files once they have been obeyed; ``save_only``: a stop is still to come."""
        if self._watch_files:
            for name in (SAVE_FILE,) if save_only else (STOP_FILE, SAVE_FILE):
                (self._run_dir / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

"""Stop and save requests: signals and trigger files, seen by every rank at the same step."""

from __future__ import annotations

import signal
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "stop-now"
SAVE_FILE = "save-now"


class StopRequests:
    """Remembers a request until the training loop polls it.

    SIGTERM, SIGUSR1 and SIGUSR2 ask for a checkpoint and an end; so does a file ``stop-now``
    in the run folder. A file ``save-now`` asks for a checkpoint only. A signal may reach one rank
    alone: the loop reduces :meth:`poll` over the ranks before it acts.
    """

    def __init__(self, run_dir: Path, watch_files: bool):
        self._run_dir = run_dir
        self._watch_files = watch_files
        self._stop = False
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def _on_signal(self, number, frame) -> None:
        self._stop = True

    def poll(self) -> tuple[bool, bool]:
        """(stop, save) as this rank sees them now."""
        stop, save = self._stop, False
        if self._watch_files:
            stop = stop or (self._run_dir / STOP_FILE).exists()
            save = (self._run_dir / SAVE_FILE).exists()
        return stop, save

    def clear_files(self) -> None:
        """Remove the trigger files once they have been obeyed."""
        if self._watch_files:
            for name in (STOP_FILE, SAVE_FILE):
                (self._run_dir / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

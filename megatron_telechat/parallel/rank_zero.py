"""One rank works, the others wait for it with a time limit and share its errors."""

from __future__ import annotations

import time
from datetime import timedelta

import torch

from megatron_telechat.errors import DataError, ResourceError, StopAtStart, UserError

_WAIT_MESSAGE_S = 30.0
# A signal is not taken while the store waits: how long it may take to be heard.
_TURN_S = 1.0
_STOPPED, _ERROR = "stopped", "error "
_STORE_PREFIX = "megatron_telechat/data"


class WordOfRankZero:
    """Rank 0 says a word (the name of the index it made) or what went wrong; the others wait for it and fail with it.

    The word goes through the process group's store rather than a collective: waiting has its own time limit,
    says what it waits for, and an error of rank 0 reaches everyone at once.
    """

    def __init__(self, limit_s: float):
        distributed = torch.distributed
        self.limit_s = limit_s
        self._told_s = time.monotonic()
        self.alone = not distributed.is_initialized() or distributed.get_world_size() == 1
        self.first = self.alone or distributed.get_rank() == 0
        if self.alone:
            return
        self.rank = distributed.get_rank()
        self.store = distributed.distributed_c10d._get_default_store()
        # A key of its own for each call: the store counts the calls of this rank.
        self.key = f"{_STORE_PREFIX}/{self.store.add(f'{_STORE_PREFIX}/calls/{self.rank}', 1)}"

    def say(self, word: str) -> None:
        """Rank 0 gives the word to those who `hear`; does nothing where it is alone."""
        if not self.alone:
            self.store.set(self.key, word)

    def say_failed(self, error: BaseException) -> None:
        """What went wrong, or that rank 0 was asked to stop."""
        stopped = isinstance(error, (StopAtStart, KeyboardInterrupt))
        self.say(_STOPPED if stopped else f"{_ERROR}{type(error).__name__}: {error}")

    def progress(self, text: str) -> None:
        """What rank 0 is at: printed every half minute, and told to those who wait."""
        if not self.first:
            return
        if not self.alone:
            self.store.set(f"{self.key}/progress", text)
        if time.monotonic() - self._told_s >= _WAIT_MESSAGE_S:
            self._told_s = time.monotonic()
            print(f"data: {text}", flush=True)

    def hear(self, expected: str | None = None) -> str:
        """Wait for the word and return it.

        Args:
            expected: what this rank found itself; another word is an error.

        Raises:
            UserError: rank 0 failed; of the class of its error, so that all ranks end with one exit code.
            DataError: rank 0 met an error that is not the user's, or it has other data than this rank.
            ResourceError: the time is up, or whoever keeps the store is gone.
            StopAtStart: rank 0 was asked to stop.
        """
        said = self._wait()
        if said == _STOPPED:
            raise StopAtStart
        if said.startswith(_ERROR):
            kind, _, text = said.removeprefix(_ERROR).partition(": ")
            known = {cls.__name__: cls for cls in UserError.__subclasses__()}
            raise known.get(kind, DataError)(f"rank 0 could not build the sample index: {text}")
        if expected is not None and said != expected:
            raise DataError(
                f"rank {self.rank} sees other data files than rank 0",
                fix="all nodes must read the same files; copy them again or mount one folder",
            )
        return said

    def _at(self) -> str:
        key = f"{self.key}/progress"
        return f": {self.store.get(key).decode()}" if self.store.check([key]) else ""

    def _wait(self) -> str:
        begin = told = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            if waited >= self.limit_s:
                raise ResourceError(
                    f"rank {self.rank} waited {self.limit_s / 60:g} minutes for rank 0 to build the sample "
                    f"index{self._at()}",
                    "data_index_timeout_minutes",
                    "raise --data-index-timeout-minutes, look at the output of rank 0, or build it before with "
                    "tools/build_index.py",
                )
            try:
                self.store.wait([self.key], timedelta(seconds=min(self.limit_s - waited, _TURN_S, _WAIT_MESSAGE_S)))
                return self.store.get(self.key).decode()
            except torch.distributed.DistNetworkError as error:
                raise ResourceError(
                    f"rank {self.rank} lost rank 0 while it waited for the sample index",
                    "torch.distributed",
                    "look at the output of rank 0, which ended first",
                ) from error
            except RuntimeError:  # torch's DistStoreError: this turn's time was up
                if self.rank == 1 and time.monotonic() - told >= _WAIT_MESSAGE_S:
                    told = time.monotonic()
                    print(f"waiting for rank 0 to build the sample index ({waited:.0f} s){self._at()}", flush=True)

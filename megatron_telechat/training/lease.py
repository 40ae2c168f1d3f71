"""The lease of a run folder: one job writes there at a time.

The lease is a file in the folder that names the job: host, process, boot of the machine, a random identifier. It is
made complete and put in place by a hard link, which exactly one of several jobs succeeds in, on NFS too. The holder
touches it every `BEAT_S` seconds. A lease is taken over

* at once, when its process is known to be dead: on this machine, or on this machine before its last boot. What this
  process may not see (``hidepid``) is not known to be dead;
* when it was not touched for `STALE_S` seconds. Ages are differences of times that the file system gave (the lease's,
  and that of a file just touched), so the clocks of two hosts may differ;
* with ``--steal-lock``, whoever holds it.

A job that finds another identifier in its lease stops before it writes again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.owner import require_owner
from megatron_telechat.errors import LeaseError, ResourceError
from megatron_telechat.host import boot_id, pid_namespace, process_lives, start_of_this_process
from megatron_telechat.locations import Url

LEASE_FILE = "lease.json"
BEAT_S = 1.0
STALE_S = 60.0
"""A lease that was not touched for so long belongs to nobody. A holder that only stood still finds that out."""

_LOOK_S = 0.1
_TOLD_AFTER_S = 3.0
_CLAIM_S = 10.0
"""A take-over takes milliseconds: one that is older was cut off."""
_REBOOT_S = 10.0
"""No machine boots in less. A younger lease with our host's name and another boot is one of a container elsewhere."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        identifier: random, of this lease.
        host, pid: where it runs.
        start: when the process started, in ticks since the boot; tells it from a later one with its number. 0 where
            that is not known.
        boot: identifier of the machine's boot.
        namespace: in which `pid` counts; containers of one machine have each their own.
        since: UTC, for people.
    """

    identifier: str
    host: str = ""
    pid: int = 0
    start: int = 0
    boot: str = ""
    namespace: str = ""
    since: str = ""

    @classmethod
    def this_process(cls) -> Holder:
        """A new lease of this process."""
        pid, now = os.getpid(), datetime.now(timezone.utc)
        return cls(
            uuid.uuid4().hex, socket.gethostname(), pid, start_of_this_process(), boot_id(), pid_namespace(),
            now.isoformat(timespec="seconds"),
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        """Read what `to_bytes` wrote. A file that is no lease is one of nobody known."""
        try:
            body = json.loads(data)
            return cls(**{name: kind(body[name]) for name, kind in _FIELDS.items()})
        except (ValueError, KeyError, TypeError):
            return cls("unreadable")

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def lives(self, seen_by: Holder, age_s: float) -> bool | None:
        """Whether its process lives; None where that cannot be told from here, and the time of its lease decides."""
        if not self.pid or self.host != seen_by.host:
            return None
        if sys.platform == "linux" and not all((self.boot, self.namespace, seen_by.boot, seen_by.namespace)):
            return None  # a container that may not read them: its numbers may be those of another one
        if self.boot != seen_by.boot:
            return False if age_s > _REBOOT_S else None
        return process_lives(self.pid, self.start) if self.namespace == seen_by.namespace else None

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}" if self.pid else "an unreadable lease"


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "identifier": str, "host": str, "pid": int, "start": int, "boot": str, "namespace": str, "since": str,
}  # fmt: skip


@dataclass(frozen=True)
class Claims:
    """What a run holds; called before a write, by this process or by one that writes for it.

    Attributes:
        leases: the files, and the identifier that each must have.
        owners: prefixes of object stores, and the run folder that each must belong to (`checkpoint.owner`).
    """

    leases: tuple[tuple[Path, str], ...] = ()
    owners: tuple[tuple[Url, str], ...] = ()

    def __call__(self) -> None:
        """Look at the leases.

        Raises:
            LeaseError: another job holds one by now, or nobody does.
            ResourceError: one cannot be read.
        """
        for path, identifier in self.leases:
            try:
                holder = Holder.from_bytes(path.read_bytes()) if path.exists() else None
            except OSError as error:
                raise ResourceError(
                    f"cannot read the lease of the run folder: {error.strerror or error}",
                    str(path),
                    "check the file system; run the same command again",
                ) from error
            if holder is None or holder.identifier != identifier:
                what = f"was taken by {holder}" if holder else "is gone"
                raise LeaseError(
                    f"the lease of the run folder {what}",
                    str(path),
                    "nothing was written since; if that was not meant, stop the other job and run the same command "
                    "again",
                )
        for root, run in self.owners:
            require_owner(root, run)


class Lease:
    """The lease of one folder; `take` before the first write, `release` after the last.

    Args:
        folder: made if it does not exist.
        say: how a take-over, or waiting for one, is told.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None):
        self.folder = folder
        self.path = folder / LEASE_FILE
        self.me = Holder.this_process()
        self.lost = False
        """Whether another job was seen to hold it."""
        self._say = say
        self._file: int | None = None

    def take(self, steal: bool = False) -> None:
        """Take the lease, that of a dead job over, or with `steal` that of anybody.

        Raises:
            LeaseError: it belongs to a job that lives.
            ResourceError: the folder cannot be written.
        """
        mine = self.folder / f".{LEASE_FILE}-{self.me.identifier}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(mine, "xb") as stream:
                stream.write(self.me.to_bytes())
                stream.flush()
                os.fsync(stream.fileno())
            try:
                self._put_in_place(mine, steal)
            finally:
                mine.unlink(missing_ok=True)
            # Not by its name later: that may be another job's by then.
            self._file = os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise ResourceError(
                f"cannot write the lease of the run folder: {error.strerror or error}",
                str(self.path),
                "choose a writable --run-dir",
            ) from error

    def beat(self) -> None:
        """Touch the lease and look whether it is still ours; never raises."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.utime(self._file)
            self.lost = self.lost or _identifier(self.path) != self.me.identifier

    @property
    def claim(self) -> tuple[Path, str]:
        """The file, and what it must say."""
        return self.path, self.me.identifier

    def release(self) -> None:
        """Give the folder free, if it is still ours; never raises."""
        with contextlib.suppress(OSError):
            self.lost = self.lost or _identifier(self.path) != self.me.identifier
            if not self.lost:
                self.path.unlink()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _put_in_place(self, mine: Path, steal: bool) -> None:
        first: tuple[str, int] | None = None
        told = False
        while not _link(mine, self.path):
            try:
                with open(self.path, "rb") as stream:  # opening asks an NFS server anew
                    holder, beat = Holder.from_bytes(stream.read()), os.fstat(stream.fileno()).st_mtime_ns
            except FileNotFoundError:
                continue
            os.utime(mine)
            age = (os.stat(mine).st_mtime_ns - beat) / 1e9
            lives = holder.lives(self.me, age)
            reason = "stolen" if steal else "its process is gone" if lives is False else ""
            if not reason and age > STALE_S:
                reason = f"not touched for {age:.0f} s"
            if reason:
                if self._take_over(mine, holder):
                    self._say(f"lease of {self.folder} taken over from {holder}: {reason}")
                    return
            elif (first or (holder.identifier, beat)) != (holder.identifier, beat) or lives:
                raise LeaseError(
                    f"the run folder {self.folder} belongs to another job: {holder}",
                    str(self.path),
                    "wait until it ends, stop it, or give another --run-dir; --steal-lock takes the folder, and that "
                    "job stops before its next write",
                )
            elif not told and age > _TOLD_AFTER_S:
                told = True
                self._say(
                    f"lease of {self.folder} is held by {holder}, which was not heard of for {age:.0f} s; it is taken "
                    f"over after {STALE_S:.0f} s"
                )
            first = first or (holder.identifier, beat)
            time.sleep(_LOOK_S)

    def _take_over(self, mine: Path, holder: Holder) -> bool:
        """Replace this holder's lease, unless another job is at it: only one may, or two would believe they hold it."""
        claim = self.folder / f".{LEASE_FILE}-claim-{holder.identifier}"
        if not _link(mine, claim):
            with contextlib.suppress(FileNotFoundError):
                if (os.stat(mine).st_mtime_ns - os.stat(claim).st_mtime_ns) / 1e9 > _CLAIM_S:
                    claim.unlink()
            return False
        try:
            if Holder.from_bytes(self.path.read_bytes()).identifier != holder.identifier:
                return False  # it was taken over in between
            os.rename(mine, self.path)
            return True
        except FileNotFoundError:
            return False
        finally:
            claim.unlink(missing_ok=True)


class Leases:
    """The leases of all folders that a run writes, with the thread that keeps them."""

    def __init__(self, leases: Sequence[Lease]):
        self._leases = leases
        self._over = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether another job was seen to hold one of them."""
        return any(lease.lost for lease in self._leases)

    @property
    def claims(self) -> Claims:
        """What is held, for whoever writes for the run."""
        return Claims(tuple(lease.claim for lease in self._leases))

    def keep(self) -> None:
        """Touch them until they are released; the body of a thread."""
        while not self._over.wait(BEAT_S):
            for lease in self._leases:
                lease.beat()

    def end(self) -> None:
        """Let `keep` return."""
        self._over.set()


@contextlib.contextmanager
def held(folders: Sequence[Path], steal: bool, say: Callable[[str], None]) -> Iterator[Leases]:
    """Hold the leases of these folders while the block runs.

    Raises:
        LeaseError: one belongs to a job that lives.
        ResourceError: one cannot be written.
    """
    with contextlib.ExitStack() as stack:
        taken: list[Lease] = []
        for folder in dict.fromkeys(path.absolute() for path in folders):
            lease = Lease(folder, say)
            lease.take(steal)
            stack.callback(lease.release)
            taken.append(lease)
        leases = Leases(taken)
        thread = threading.Thread(target=leases.keep, name="lease", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(leases.end)
        yield leases


def _identifier(path: Path) -> str:
    """Who a lease belongs to; "" where there is none."""
    try:
        return Holder.from_bytes(path.read_bytes()).identifier
    except FileNotFoundError:
        return ""


def _link(source: Path, target: Path) -> bool:
    """Put `source` in place as `target`; False where something is there."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        # An answer of an NFS server that was lost is asked for again, and then the link is there already: it is ours.
        with contextlib.suppress(FileNotFoundError):
            return os.path.samefile(source, target)
        return False
    except OSError as error:
        if target.exists():
            return False
        return _copy(source, target, error)


def _copy(source: Path, target: Path, refused: OSError) -> bool:
    """The same on a file system without hard links: the file appears first, its content a moment later."""
    try:
        handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError:
        raise refused from None
    try:
        os.write(handle, source.read_bytes())
        os.fsync(handle)
    finally:
        os.close(handle)
    return True

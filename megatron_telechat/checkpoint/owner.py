"""Who owns a prefix of an object store: one run folder. No torch.

A run folder has a lease that its holder touches every second (``training/lease.py``). A store has no such files: a
heartbeat would be a put a second, and taking over from a dead holder needs a compare-and-swap that few stores have. So
a prefix belongs to a run folder for good, by one object that is put where there is none (a conditional put). Of several
jobs on that run folder its lease lets one write; a job on another run folder is refused.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.disk import disk_error
from megatron_telechat.checkpoint.stores import ObjectStore, store_of
from megatron_telechat.errors import LeaseError
from megatron_telechat.locations import Url

OWNER = "owner.json"
RUN_ID = "run_id"
_MOST_TRIES = 10


@dataclass(frozen=True)
class Owner:
    """What the object says.

    Attributes:
        run: identifier of the run folder, random, in its file ``run_id``.
        folder, host, since: for people.
    """

    run: str
    folder: str = ""
    host: str = ""
    since: str = ""

    @classmethod
    def from_bytes(cls, data: bytes) -> Owner:
        """An object that is none of these belongs to nobody known."""
        try:
            body: Any = json.loads(data)
            return cls(*(str(body[name]) for name in ("run", "folder", "host", "since")))
        except (ValueError, KeyError, TypeError):
            return cls("unreadable")

    def to_bytes(self) -> bytes:
        """The content of the object."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def __str__(self) -> str:
        return f"the run folder {self.folder} (host {self.host}, since {self.since})" if self.folder else "nobody known"


def known_run_id(run_dir: Path) -> str:
    """The identifier of a run folder; "" where it has none yet. Raises OSError."""
    path = run_dir / RUN_ID
    return path.read_text().strip() if path.exists() else ""


def run_id(run_dir: Path) -> str:
    """The identifier of a run folder, made at the first call; by the holder of its lease. Raises ResourceError."""
    path = run_dir / RUN_ID
    try:
        if found := known_run_id(run_dir):
            return found
        beside = run_dir / f".{RUN_ID}-{uuid.uuid4().hex}"
        beside.write_text(f"{uuid.uuid4().hex}\n")
        beside.replace(path)
        return path.read_text().strip()
    except OSError as error:
        raise disk_error(path, error) from error


def claim_store(root: Url, run_dir: Path, steal: bool, say: Callable[[str], None]) -> tuple[Url, str]:
    """Take a prefix for a run folder, or find that it is its own.

    Args:
        steal: take it from another run folder.

    Returns:
        The prefix and the identifier that `require_owner` wants.

    Raises:
        LeaseError: it belongs to another run folder.
        ResourceError: the store does not answer, or refuses.
    """
    store = store_of(root)
    assert isinstance(store, ObjectStore)
    mine = Owner(
        run_id(run_dir),
        str(run_dir.absolute()),
        socket.gethostname(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    store.prepare(root)
    for _ in range(_MOST_TRIES):
        if store.put_new(root / OWNER, mine.to_bytes()):
            return root, mine.run
        owner = _owner(root)
        if owner is None:
            continue  # taken away in between
        if owner.run == mine.run:
            return root, mine.run
        if not steal:
            raise _other_owner(root, owner, "belongs to")
        store.put(root / OWNER, mine.to_bytes())
        say(f"{root} taken from {owner}: stolen")
        return root, mine.run
    raise LeaseError(f"{OWNER} comes and goes", str(root), "stop the other jobs that use this prefix")


def require_owner(root: Url, run: str) -> None:
    """Look whether the prefix is still that of a run folder; before a write.

    Raises:
        LeaseError: it is another's, or nobody's.
        ResourceError: the store does not answer.
    """
    owner = _owner(root)
    if owner is None:
        raise LeaseError(
            f"{OWNER} is gone", str(root), "run the same command again: it takes the prefix, if it is free"
        )
    if owner.run != run:
        raise _other_owner(root, owner, "was taken by")


def _other_owner(root: Url, owner: Owner, how: str) -> LeaseError:
    return LeaseError(
        f"{root} {how} {owner}",
        str(root / OWNER),
        "go on in that run folder, or give another prefix with --save; --steal-lock takes this one, and a job that "
        "uses it stops before its next write",
    )


def _owner(root: Url) -> Owner | None:
    try:
        return Owner.from_bytes(store_of(root).read(root / OWNER))
    except FileNotFoundError:
        return None

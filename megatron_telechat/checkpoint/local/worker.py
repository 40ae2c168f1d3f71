"""What the process beside a rank does for local checkpoints: functions that the rank lets it call. No torch.

The process listens to its peers in threads while the rank's own calls are carried out one after another. What writes
gives way to the steps: nobody waits for a local checkpoint. What is read by a rank that starts does not: it waits.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_telechat.checkpoint.checksums import crc32
from megatron_telechat.checkpoint.disk import fsync_folder, require_free_space, write_synced
from megatron_telechat.checkpoint.local import parts
from megatron_telechat.checkpoint.local.peers import (
    Address,
    Channel,
    Server,
    connect,
    require_file_name,
    require_place,
)
from megatron_telechat.checkpoint.manifest import Manifest, read_manifest
from megatron_telechat.checkpoint.names import MANIFEST, FileEntry
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.writer_process import FileImage, give_way, write_images
from megatron_telechat.errors import UserError

_MANIFEST_LIMIT = 1 << 30


@dataclass
class _Received:
    """Parts of other ranks that came here for one save: whole ones by rank, and where one failed."""

    step: int
    whole: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)


@dataclass
class _State:
    """Of this process, once it listens."""

    root: Path
    server: Server
    received: dict[str, _Received] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_state: list[_State] = []


@dataclass(frozen=True)
class LocalSave:
    """One part to be written.

    Attributes:
        root: the folder of the run on this node.
        run: identifier of the run.
        manifest: of the part, its files without checksums.
        images: its files in the memory of the rank.
        mirrors: processes of other nodes that keep a copy.
        require_writable: raises a UserError where the run belongs to another job by now.
    """

    root: Path
    run: str
    manifest: Manifest
    images: Sequence[FileImage]
    mirrors: Sequence[Address]
    secret: str
    require_writable: Callable[[], None]

    @property
    def rank(self) -> int:
        """Whose part it is."""
        assert self.manifest.part is not None
        return self.manifest.part["rank"]

    @property
    def save(self) -> str:
        """Id of the save."""
        assert self.manifest.save is not None
        return self.manifest.save

    @property
    def temporary(self) -> Path:
        """Where it is written."""
        return parts.temporary(self.root, self.rank, self.manifest.step, self.save)


def listen(root: Path, host: str, secret: str, cleans: bool) -> tuple[int, str]:
    """Make the folder of the run and answer peers from now on.

    Args:
        cleans: remove what killed saves have left; one process of each node.

    Returns:
        The port, and why nothing can be written here; "" where it can.
    """
    state = _State(root, Server(host, secret, {"put": _take_part, "get": _give_range}))
    _state[:] = [state]
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if root.is_symlink():
            return state.server.port, f"{root} is a link"
        if cleans:
            parts.clean(root)
        probe = root / f".probe-{state.server.port}"
        write_synced(probe, b"")
        probe.unlink()
    except (OSError, UserError) as error:
        return state.server.port, _in_words(error)
    return state.server.port, ""


def write_part(memory_fd: int, one: LocalSave) -> list[str]:
    """Write a part and send it to its mirrors, beside each other; both are durable then, and not yet committed.

    Returns:
        What went wrong with copies on other nodes.

    Raises:
        OSError, UserError: the part cannot be written here.
    """
    give_way()
    one.require_writable()
    written = threading.Event()
    said: list[bytes] = []
    errors: list[str] = []
    senders = [
        threading.Thread(target=_send, args=(memory_fd, one, mirror, written, said, errors), daemon=True)
        for mirror in one.mirrors
    ]
    for sender in senders:
        sender.start()
    try:
        said.append(_write_here(memory_fd, one))
    finally:
        written.set()
        for sender in senders:
            sender.join()
    return errors


def _write_here(memory_fd: int, one: LocalSave) -> bytes:
    temporary = one.temporary
    one.root.mkdir(exist_ok=True, mode=0o700)
    temporary.parent.mkdir(exist_ok=True)
    require_free_space(one.root, sum(image.stop - image.start for image in one.images))
    temporary.mkdir()
    content = replace(one.manifest, files=write_images(memory_fd, one.images)).to_bytes()
    write_synced(temporary / MANIFEST, content)
    fsync_folder(temporary)
    return content


def _send(
    memory_fd: int,
    one: LocalSave,
    mirror: Address,
    written: threading.Event,
    said: list[bytes],
    errors: list[str],
) -> None:
    """One mirror. The manifest comes last: it has the checksums that this node has written."""
    try:
        channel = connect(mirror, one.secret)
        with contextlib.closing(channel):
            files = [[image.path.name, image.stop - image.start] for image in one.images]
            about = {"do": "put", "rank": one.rank, "step": one.manifest.step, "save": one.save, "files": files}
            channel.send(about)
            size = max((image.stop for image in one.images), default=0)
            if size:
                with mmap.mmap(memory_fd, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as whole:
                    for image in one.images:
                        with whole[image.start : image.stop] as content:
                            channel.send_bytes(content)
            written.wait()
            if not said:
                return  # what the caller raises says why; the end of the connection ends the copy
            channel.send_sized(said[0])
            reply = channel.receive()
            if reply is None or not reply.get("ok"):
                raise OSError(str(reply.get("error")) if reply else "the connection ended")
    except (OSError, ValueError) as error:
        errors.append(f"{mirror[0]}: {_in_words(error)}")


def commit_part(one: LocalSave, keep_from: int | None) -> None:
    """Commit the part and those received for the same save.

    Args:
        keep_from: number of the oldest save that is kept on this node, where this process removes those before it;
            None: another one does.

    Raises:
        OSError: the part cannot be renamed.
    """
    parts.commit(one.root, one.rank, one.manifest.step, one.save)
    for rank in _received(one.save):
        # A copy that cannot be committed is one copy less.
        with contextlib.suppress(OSError):
            parts.commit(one.root, rank, one.manifest.step, one.save)
    if keep_from is not None:
        parts.prune(one.root, one.run, keep_from)


def give_up_part(one: LocalSave) -> None:
    """Remove what was written of a save; raises nothing."""
    received = None
    for state in _state:
        with state.lock:
            received = state.received.pop(one.save, None)
    ranks = {one.rank, *(received.begun if received else ())}
    for rank in ranks:
        shutil.rmtree(parts.temporary(one.root, rank, one.manifest.step, one.save), ignore_errors=True)


def _received(save: str) -> set[int]:
    """Ranks whose parts came here whole. What did not is removed."""
    state = _state[0]
    with state.lock:
        received = state.received.pop(save, None)
    if received is None:
        return set()
    for rank in received.begun - received.whole:
        shutil.rmtree(parts.temporary(state.root, rank, received.step, save), ignore_errors=True)
    return received.whole


def _take_part(channel: Channel, request: Mapping[str, Any]) -> None:
    """A peer's part, onto this disk. What cannot be kept is read to its end all the same, so that the peer hears
    why."""
    give_way()
    rank, step, save = require_place(request)
    files = [(require_file_name(name), int(size)) for name, size in request["files"]]
    state = _state[0]
    with state.lock:
        received = state.received.setdefault(save, _Received(step))
        received.begun.add(rank)
    folder = parts.temporary(state.root, rank, step, save)
    fault = ""
    try:
        folder.parent.mkdir(exist_ok=True)
        require_free_space(state.root, sum(size for _, size in files))
        folder.mkdir()
    except (OSError, UserError) as error:
        fault = _in_words(error)
    entries: dict[str, FileEntry] = {}
    for name, size in files:
        checksum, found = _take_file(channel, None if fault else folder / name, size)
        fault = fault or found
        entries[name] = FileEntry(size, checksum)
    content = channel.sized(_MANIFEST_LIMIT)
    try:
        if not fault:
            write_synced(folder / MANIFEST, content)
            fsync_folder(folder)
            fault = _fault_of(folder, entries)
    except (OSError, UserError) as error:
        fault = _in_words(error)
    if not fault:
        with state.lock:
            received.whole.add(rank)
    channel.send({"error": fault} if fault else {"ok": True})


def _take_file(channel: Channel, path: Path | None, size: int) -> tuple[str, str]:
    """(checksum of what came, why it could not be written). None as the path: it is not kept."""
    checksum, fault = 0, ""
    sink = None if path is None else store_of(path).create(path, aligned=True)
    with contextlib.ExitStack() as open_files:
        try:
            if sink is not None:
                open_files.enter_context(sink)
        except OSError as error:
            sink, fault = None, _in_words(error)
        for chunk in channel.chunks(size, in_pages=True):
            checksum = crc32(chunk, checksum)
            try:
                if sink is not None and not fault:
                    sink.write(chunk)
            except OSError as error:
                fault = _in_words(error)
        try:
            open_files.close()
        except OSError as error:
            fault = fault or _in_words(error)
    return f"{checksum:08x}", fault


def _fault_of(folder: Path, entries: Mapping[str, FileEntry]) -> str:
    """Whether the bytes that came are those that the owner has written."""
    return "" if dict(read_manifest(folder, part=True).files) == entries else "the bytes changed on their way"


def _give_range(channel: Channel, request: Mapping[str, Any]) -> None:
    rank, step, save = require_place(request)
    path = parts.committed(_state[0].root, rank, step, save) / require_file_name(request.get("file"))
    start, stop = int(request["start"]), int(request["stop"])
    try:
        data = store_of(path).read(path, max(start, 0), max(stop, 0))
    except OSError as error:
        channel.send({"error": _in_words(error)})
        return
    channel.send({"length": len(data)})
    channel.send_sized(data)


def _in_words(error: BaseException) -> str:
    if isinstance(error, UserError):
        problem = error.problems[0]
        return f"{problem.what} ({problem.where})" if problem.where else problem.what
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    place = getattr(error, "filename", None)
    return f"{text} ({place})" if place else str(text)

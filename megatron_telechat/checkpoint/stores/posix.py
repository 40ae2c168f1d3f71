"""Checkpoints on a file system that all ranks share: a folder is written under another name and then renamed. The
rename is the commit. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

from megatron_telechat.checkpoint.disk import fsync_folder, is_of_one_host, stale_seconds, write_synced
from megatron_telechat.checkpoint.names import (
    LATEST,
    MANIFEST,
    FileEntry,
    aside_name,
    folder_name,
    is_aside,
    is_leftover,
    replaced_name,
    step_of,
    temporary_name,
)
from megatron_telechat.checkpoint.stores.protocol import ALIGNMENT, Signature
from megatron_telechat.locations import Location

_READ_BYTES = 1 << 20  # stays in a core's cache between the read and the sum
_CHUNK_BYTES = 16 << 20
_SYNC_BYTES = 128 << 20
_LOOK_S = 0.5
_HINT_CHARACTERS = 256
_HINT = re.compile(rf"\.{LATEST}-[0-9a-f]+")


class PosixStore:
    """See :class:`Store`."""

    remote = False

    # ---- names ------------------------------------------------------------------------------

    def identity(self, place: Location) -> str:
        """See :class:`Store`: links resolved."""
        return os.path.realpath(_path(place))

    def is_link(self, place: Location) -> bool:
        """See :class:`Store`."""
        return _path(place).is_symlink()

    def is_file(self, place: Location) -> bool:
        """See :class:`Store`."""
        return _path(place).is_file()

    def is_folder(self, place: Location) -> bool:
        """See :class:`Store`."""
        return _path(place).is_dir()

    def folders(self, root: Location) -> list[Location]:
        """See :class:`Store`: the name tells. The newest, by the hint, is found by its name too: a network file system
        may show an old listing to a host that did not write it."""
        found = {path for path in _listed(_path(root)) if step_of(path) is not None and path.is_dir()}
        hinted = _hinted(_path(root))
        return sorted(found if hinted is None else {*found, hinted})

    def aside(self, root: Location) -> list[Location]:
        """See :class:`Store`."""
        return [path for path in _listed(_path(root)) if is_aside(path) and path.is_dir()]

    def files(self, folder: Location) -> list[str]:
        """See :class:`Store`; links to folders are not followed."""
        top, found = _path(folder), []
        for base, folders, names in os.walk(top):
            folders.sort()
            found += [Path(base, name).relative_to(top).as_posix() for name in sorted(names)]
        return found

    # ---- reading ----------------------------------------------------------------------------

    def faults(self, folder: Location, entries: Mapping[str, FileEntry], patient: bool = False) -> dict[str, str]:
        """See :class:`Store`."""
        top = _path(folder)
        found = _faults(top, entries)
        if found and patient:
            until = time.monotonic() + stale_seconds(top)
            while found and (left := until - time.monotonic()) > 0:
                time.sleep(min(_LOOK_S, left))
                _look_anew(top, found)
                found = _faults(top, {name: entries[name] for name in found})
        return found

    def signature(self, place: Location) -> Signature | None:
        """See :class:`Store`."""
        try:
            found = os.stat(_path(place))
        except OSError:
            return None
        return Signature((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino), found.st_ctime_ns)

    def read(self, place: Location, start: int = 0, stop: int | None = None) -> bytes:
        """See :class:`Store`. Raises OSError."""
        with open(_path(place), "rb") as stream:
            stream.seek(start)
            return stream.read() if stop is None else stream.read(stop - start)

    def pieces(self, place: Location, start: int, length: int) -> Iterator[memoryview]:
        """See :class:`Store`. Raises OSError."""
        view = memoryview(bytearray(min(_READ_BYTES, length)))
        with open(_path(place), "rb", buffering=0) as stream:
            stream.seek(start)
            while length:
                count = stream.readinto(view[: min(length, len(view))])
                if not count:
                    break
                yield view[:count]
                length -= count

    def hold(self, sizes: Mapping[Location, int]) -> None:
        """See :class:`Store`: the page cache does it."""

    def release(self, folder: Location) -> None:
        """See :class:`Store`."""

    # ---- writing ----------------------------------------------------------------------------

    def create(self, place: Location, aligned: bool = False) -> FileSink:
        """See :class:`Store`. Raises OSError, also where the file exists."""
        return FileSink(_path(place), aligned)

    def make_folder(self, folder: Location) -> None:
        """See :class:`Store`. Raises OSError."""
        _path(folder).mkdir(parents=True, exist_ok=True)

    def prepare(self, root: Location) -> None:
        """See :class:`Store`. Raises OSError."""
        _path(root).mkdir(parents=True, exist_ok=True)

    def clean(self, root: Location) -> list[Location]:
        """See :class:`Store`: temporary folders, and hints that were not renamed. Raises OSError."""
        removed: list[Location] = []
        for path in _listed(_path(root)):
            if is_leftover(path) and not path.is_symlink():
                shutil.rmtree(path)
                removed.append(path)
            elif _HINT.fullmatch(path.name):
                path.unlink()
        return removed

    # ---- commit -----------------------------------------------------------------------------

    def written_at(self, root: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`."""
        return root / temporary_name(step, identifier)

    def committed_at(self, root: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`."""
        return root / folder_name(step)

    def begin(self, folder: Location) -> None:
        """See :class:`Store`. Raises OSError."""
        _path(folder).mkdir()

    def commit(self, written: Location, final: Location, manifest: bytes, identifier: str) -> list[Location]:
        """See :class:`Store`: the rename of the folder is the commit. Raises OSError, ResourceError."""
        temporary, target = _path(written), _path(final)
        write_synced(temporary / MANIFEST, manifest)
        for folder, _, _ in os.walk(temporary):
            fsync_folder(Path(folder))
        replaced: list[Location] = []
        if target.exists():
            step = step_of(target)
            assert step is not None
            replaced.append(target.parent / replaced_name(step, identifier))
            os.rename(target, target.parent / replaced_name(step, identifier))
        os.rename(temporary, target)
        fsync_folder(target.parent)
        return replaced

    def abandon(self, written: Location) -> None:
        """See :class:`Store`."""
        shutil.rmtree(_path(written), ignore_errors=True)

    def remove(self, folder: Location, step: int, identifier: str) -> None:
        """See :class:`Store`: under a temporary name, so that no half of it is taken for a checkpoint. Raises
        OSError."""
        doomed = _path(folder).parent / temporary_name(step, identifier)
        os.rename(_path(folder), doomed)
        shutil.rmtree(doomed)

    def set_aside(self, folder: Location, step: int, identifier: str) -> Location:
        """See :class:`Store`: a rename. Raises OSError."""
        path = _path(folder)
        number, target = 0, path.parent / aside_name(step, identifier)
        while target.exists():
            number += 1
            target = path.parent / aside_name(step, f"{identifier}{number:x}")
        os.rename(path, target)
        return target

    def put_hint(self, root: Location, name: str, text: str, identifier: str) -> None:
        """See :class:`Store`. Raises OSError, ResourceError."""
        folder = _path(root)
        hint = folder / f".{name}-{identifier}"
        write_synced(hint, text.encode())
        os.replace(hint, folder / name)
        fsync_folder(folder)


class FileSink:
    """A new file. While it is written, another thread brings what there is to the disk.

    Aligned data goes from its memory to a disk of this host, past the page cache (``O_DIRECT``): a copy less, nothing
    for the kernel to bring out later, and what else the machine reads stays in the cache. File systems that cannot do
    it, or only for a part, get the rest in the other way.

    Args:
        aligned: see `Store.create`.

    Raises OSError where the disk is full, read-only or failing, or the file exists.
    """

    def __init__(self, path: Path, aligned: bool = False):
        self._path = path
        self._stream: FileIO
        self._direct = aligned
        self._syncs: ThreadPoolExecutor | None = None
        self._syncing: Future | None = None
        self._unsynced = 0

    def __enter__(self) -> FileSink:
        self._stream = open(self._path, "xb", buffering=0)
        self._direct = self._direct and is_of_one_host(self._path.parent) and self._go_direct(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.closing(self._stream):
            if self._syncs is not None:
                self._syncs.shutdown()
            if kind is None:
                if self._syncing is not None:
                    self._syncing.result()
                os.fsync(self._stream.fileno())

    def write(self, data: memoryview) -> None:
        """The next bytes. Raises OSError, also where an earlier part does not reach the disk."""
        position = 0
        while position < len(data):
            length = min(_CHUNK_BYTES, len(data) - position)
            if self._direct:
                length -= length % ALIGNMENT
                if position % ALIGNMENT or not length:
                    self._direct = self._go_direct(False)
                    continue
            # Released here: an error that keeps this frame must not keep shared memory from being closed.
            with data[position : position + length] as part:
                count = self._write(part)
            position += count
            self._written(count)

    def _write(self, part: memoryview) -> int:
        try:
            count = self._stream.write(part)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            self._direct = self._go_direct(False)
            count = self._stream.write(part)
        assert count is not None  # of a file that does not block
        return count

    def _go_direct(self, wanted: bool) -> bool:
        """Whether writes pass the page cache by from now on."""
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            import fcntl

            with contextlib.suppress(OSError):
                flags = fcntl.fcntl(self._stream, fcntl.F_GETFL)
                fcntl.fcntl(self._stream, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
                return wanted
        return False

    def _written(self, count: int) -> None:
        self._unsynced += 0 if self._direct else count
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._unsynced = 0
            self._syncs = self._syncs or ThreadPoolExecutor(1)
            self._syncing = self._syncs.submit(os.fsync, self._stream.fileno())


def _path(place: Location) -> Path:
    assert isinstance(place, Path), f"{place} is not in a file system"
    return place


def _listed(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _hinted(root: Path) -> Path | None:
    """The checkpoint that the hint names, if it is there; a hint may be damaged."""
    with contextlib.suppress(OSError, ValueError):
        name = (root / LATEST).read_text()[:_HINT_CHARACTERS].strip()
        if name == Path(name).name and step_of(root / name) is not None and (root / name / MANIFEST).is_file():
            return root / name
    return None


def _look_anew(top: Path, names: Iterable[str]) -> None:
    """Let a client of a network file system ask the server: it does when a folder is listed and a file is opened."""
    with contextlib.suppress(OSError):
        os.listdir(top)
    for name in names:
        with contextlib.suppress(OSError):
            os.close(os.open(top / name, os.O_RDONLY | os.O_NONBLOCK))


def _faults(top: Path, entries: Mapping[str, FileEntry]) -> dict[str, str]:
    found = {name: _fault(top / name, entry) for name, entry in entries.items()}
    return {name: fault for name, fault in found.items() if fault is not None}


def _fault(path: Path, entry: FileEntry) -> str | None:
    if path.is_symlink():
        return "the file is a symbolic link"
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    return None if size == entry.size else f"the file has {size} bytes, the manifest says {entry.size}"

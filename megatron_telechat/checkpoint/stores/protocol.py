"""What the commit protocol, the reader and the writer of checkpoints need of storage.

Places are `Path` in a file system and `Url` in an object store. A file that is not there is FileNotFoundError, which
readers take for damage. A file system raises OSError, whose caller knows the place and the fix. An object store that
does not answer, or refuses, raises ResourceError: that is no damage, and no reason to take an older checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.locations import Location

ALIGNMENT = 4096
"""What `Store.create` means by aligned, bytes; a multiple of the blocks of disks."""


class Signature(NamedTuple):
    """Tells whether a file was touched.

    Attributes:
        content: changes with the file.
        changed_ns: when it was changed, where a clock with ticks is all that tells; None where a change always shows.
    """

    content: tuple[Any, ...]
    changed_ns: int | None


class Sink(Protocol):
    """A new file; a context manager. Leaving it by an error leaves no whole file."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, data: memoryview) -> None:
        """The next bytes. They may change once this has returned."""
        ...


class Store(Protocol):
    """See the module.

    Attributes:
        remote: each look costs a request: what is known by its signature is kept.
    """

    remote: bool

    # ---- names ------------------------------------------------------------------------------

    def identity(self, place: Location) -> str:
        """A name that no other place has."""
        ...

    def is_link(self, place: Location) -> bool:
        """Whether it only points to another place."""
        ...

    def is_file(self, place: Location) -> bool:
        """Whether a file of this name is there."""
        ...

    def is_folder(self, place: Location) -> bool:
        """Whether a folder of this name is there."""
        ...

    def folders(self, root: Location) -> list[Location]:
        """What lies directly in ``root`` and may be a checkpoint by how this store commits, sorted by name."""
        ...

    def aside(self, root: Location) -> list[Location]:
        """The checkpoints of ``root`` that `set_aside` was called for, sorted by name."""
        ...

    def files(self, folder: Location) -> list[str]:
        """All files below, by their names relative to the folder."""
        ...

    # ---- reading ----------------------------------------------------------------------------

    def faults(self, folder: Location, entries: Mapping[str, FileEntry], patient: bool = False) -> dict[str, str]:
        """By name what is wrong with files of a folder that shows without reading them: missing, a link, another
        size.

        Args:
            patient: where another host may have written them, and this one may not see that yet, look for some time.
        """
        ...

    def signature(self, place: Location) -> Signature | None:
        """That of a file; None where there is none, or the store has no way to tell."""
        ...

    def read(self, place: Location, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends earlier."""
        ...

    def pieces(self, place: Location, start: int, length: int) -> Iterator[memoryview]:
        """The same in pieces; each is void when the next is asked for. Several calls for a file do not overlap."""
        ...

    def hold(self, sizes: Mapping[Location, int]) -> None:
        """Keep what `pieces` reads of these files in memory, if reading is slow and there is room, until `release`."""
        ...

    def release(self, folder: Location) -> None:
        """Give the memory of the folder's files back."""
        ...

    # ---- writing ----------------------------------------------------------------------------

    def create(self, place: Location, aligned: bool = False) -> Sink:
        """Write a new file; it is durable when the sink is left.

        Args:
            aligned: what is written lies at multiples of `ALIGNMENT` in memory and, but for the last time, is a
                multiple of it long: a store may hand it on without a copy.
        """
        ...

    def make_folder(self, folder: Location) -> None:
        """Make a folder and those above it, where files need one."""
        ...

    def prepare(self, root: Location) -> None:
        """Make the folder of checkpoints. Raises what `create` would, early."""
        ...

    def clean(self, root: Location) -> list[Location]:
        """Remove what killed saves and deletions have left in ``root``; returns what was removed."""
        ...

    # ---- commit -----------------------------------------------------------------------------

    def written_at(self, root: Location, step: int, identifier: str) -> Location:
        """Where the files of a save are written."""
        ...

    def committed_at(self, root: Location, step: int, identifier: str) -> Location:
        """Where the checkpoint lies once it is committed; another one of its step may lie there until then."""
        ...

    def begin(self, folder: Location) -> None:
        """Make the folder that `written_at` names."""
        ...

    def commit(self, written: Location, final: Location, manifest: bytes, identifier: str) -> list[Location]:
        """Write the manifest and make a checkpoint of the files, all at once or not at all.

        Returns:
            Earlier checkpoints of the step, which count until this one does.
        """
        ...

    def abandon(self, written: Location) -> None:
        """Remove the files of a save that was not committed; never a checkpoint. Raises nothing."""
        ...

    def remove(self, folder: Location, step: int, identifier: str) -> None:
        """Remove a checkpoint. Cut off anywhere, it leaves the whole one or none, and `clean` removes the rest."""
        ...

    def set_aside(self, folder: Location, step: int, identifier: str) -> Location:
        """Take a checkpoint out of those that `folders` gives; returns where it lies now. Nothing is deleted."""
        ...

    def put_hint(self, root: Location, name: str, text: str, identifier: str) -> None:
        """Replace a small file that people and scripts read."""
        ...

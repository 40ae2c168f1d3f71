"""Small files, folders and free space of a disk, and its errors. No torch."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

from megatron_telechat.checkpoint.names import FileEntry
from megatron_telechat.errors import ResourceError

FREE_SPACE_FACTOR = 1.2


def disk_error(path: Path, error: OSError) -> ResourceError:
    """The ResourceError of a write that failed: names ``path`` and the system's reason."""
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        fix="free some space, or give another folder (--save of a run, --output of a conversion); committed "
        "checkpoints are untouched",
    )


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a new small file and fsync it."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
    return FileEntry(len(data), f"{zlib.crc32(data):08x}")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before the first byte. ``needed_bytes`` is what will be written, without the margin.

    Raises ResourceError when less than 1.2 times that is free.
    """
    free = shutil.disk_usage(folder).free
    wanted = int(FREE_SPACE_FACTOR * needed_bytes)
    if free < wanted:
        raise ResourceError(
            f"{free / 2**30:.2f} GiB free, {wanted / 2**30:.2f} GiB wanted for the checkpoint "
            f"({needed_bytes / 2**30:.2f} GiB and a margin)",
            where=str(folder),
            fix="free some space, give another folder with --save, or keep fewer with --keep-last",
        )

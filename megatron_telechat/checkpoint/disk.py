"""Small files, folders and free space of a disk, and its errors. No torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_telechat.errors import ResourceError
from megatron_telechat.locations import Location, Url

FREE_SPACE_FACTOR = 1.2


def disk_error(path: Location, error: OSError) -> ResourceError:
    """The ResourceError of a write that failed: names ``path`` and the system's reason."""
    return ResourceError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        fix="free some space, or give another folder (--save of a run, --output of a conversion); committed "
        "checkpoints are untouched",
    )


def write_synced(path: Path, data: bytes) -> None:
    """Write a new small file and fsync it. Raises ResourceError."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (a rename is not, until its folder is synced)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_free_space(folder: Location, needed_bytes: int) -> None:
    """Refuse before the first byte. ``needed_bytes`` is what will be written, without the margin. An object store has
    no end that could be asked for.

    Raises ResourceError when less than 1.2 times that is free.
    """
    if isinstance(folder, Url):
        return
    free = shutil.disk_usage(folder).free
    wanted = int(FREE_SPACE_FACTOR * needed_bytes)
    if free < wanted:
        raise ResourceError(
            f"{free / 2**30:.2f} GiB free, {wanted / 2**30:.2f} GiB wanted for the checkpoint "
            f"({needed_bytes / 2**30:.2f} GiB and a margin)",
            where=str(folder),
            fix="free some space, give another folder with --save, or keep fewer with --keep-last",
        )

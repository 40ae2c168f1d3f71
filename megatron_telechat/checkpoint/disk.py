"""Small files, folders and free space of a disk, its errors, and how late it may show what is there. No torch."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_telechat.errors import ConfigError, ResourceError
from megatron_telechat.locations import Location, Url

FREE_SPACE_FACTOR = 1.2
STALE_SECONDS = "MEGATRON_TELECHAT_STALE_SECONDS"
"""Environment variable: how long a file that another host has written is looked for."""
_STALE_SECONDS = 30.0
"""An NFS client may believe for so long that a name is not there (``acdirmin``)."""
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_OF_ONE_HOST = frozenset(
    "bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs jfs overlay ramfs rootfs squashfs tmpfs vfat xfs zfs".split()
)


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


def stale_seconds(path: Path) -> float:
    """How long this host may not see what another one has written to ``path``: 0 on a file system of one host, 30 on
    others, or what ``MEGATRON_TELECHAT_STALE_SECONDS`` says. Raises ConfigError where that is no number."""
    told = os.environ.get(STALE_SECONDS)
    if told is None:
        return 0.0 if is_of_one_host(path) else _STALE_SECONDS
    try:
        if not 0 <= float(told) <= 3600:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{told!r} is no number of seconds", STALE_SECONDS, "give 0 to 3600, or unset it") from None
    return float(told)


def is_of_one_host(path: Path) -> bool:
    """Whether a path is known to be on a file system that no other host writes; true where there is no telling."""
    return _file_system(path) in _OF_ONE_HOST


def _file_system(path: Path) -> str:
    """The type of the file system that a path is on, as Linux calls it; that of one host where there is no telling."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return "rootfs"
    real = os.path.realpath(path)
    best = ("", "rootfs")
    for line in lines:
        mount, _, source = line.partition(" - ")
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), mount.split(" ")[4])
        if os.path.commonpath([real, point]) == point and len(point) >= len(best[0]):
            best = point, source.split(" ")[0]
    return best[1]


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

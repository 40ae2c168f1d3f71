"""A folder of index files in which every piece is whole or not there, and what killed builds have left beside them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_telechat.errors import ResourceError
from megatron_telechat.host import has_ended, process_mark

Say = Callable[[str], None]
LEFT_AFTER_S = 24 * 3600.0
"""What nobody has changed for so long is taken for left behind, where its process cannot be looked for."""

_PARTIAL = re.compile(r".+\.partial-(?P<mark>[0-9a-f]{12}-\d+-\d+)-[0-9a-f]{8}")
_PARTIAL_OF_OLDER_RELEASES = re.compile(r"(?:chat-[0-9a-f]{20}\.partial-\d+|.+\.partial-\d+-[0-9a-f]{8})")


def quiet(text: str) -> None:
    """A listener to progress that says nothing."""


class IndexFolder:
    """Pieces of an index, each a folder that is built beside its place and renamed into it.

    Args:
        path: the folder.
        builds: whether this process builds what is missing; only one process of a run does.
        say: told what is under way.
    """

    def __init__(self, path: Path, builds: bool = False, say: Say = quiet):
        self.path = path
        self.builds = builds
        self.say = say
        self.built: list[str] = []

    def piece(self, name: str, build: Callable[[Path], None]) -> Path:
        """The folder of a piece; ``build`` fills it where it is missing.

        Raises:
            FileNotFoundError: it is missing, and this process does not build.
            ResourceError: it cannot be written.
        """
        final = self.path / name
        if final.is_dir():
            return final
        if not self.builds:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(final))
        partial = self.path / partial_name(name)
        try:
            partial.mkdir(parents=True)
            build(partial)
            for path in partial.iterdir():
                _sync(path)
            os.rename(partial, final)
        except OSError as error:
            if not final.is_dir():  # else another run with the same data was faster
                raise cannot_write(error, self.path) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.built.append(name)
        return final

    def text(self, name: str, content: str) -> None:
        """A small file beside the pieces."""
        final = self.path / name
        if final.exists():
            return
        partial = self.path / partial_name(name)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial.write_text(content, encoding="utf-8")
            _sync(partial)
            os.replace(partial, final)
        except OSError as error:
            raise cannot_write(error, self.path) from error
        finally:
            partial.unlink(missing_ok=True)


def partial_name(name: str) -> str:
    """Of what will be renamed to ``name`` once it is whole; says which process is at it."""
    return f"{name}.partial-{process_mark()}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(cache: Path) -> list[Path]:
    """Remove what killed builds have left in a cache and in the folders of its indices. What is in progress stays,
    whoever builds it.

    It was left behind if its process is known to be gone, or, where that cannot be told from here (another host that
    shares the cache, another container, an earlier boot, an older release), if nothing in it has changed for
    `LEFT_AFTER_S`. Ages are differences of times that the file system gave, so the clocks of hosts may differ.

    Returns:
        What was removed. Raises nothing: what cannot be removed stays.
    """
    removed: list[Path] = []
    now_s: float | None = None
    for path in _partials(cache):
        match = _PARTIAL.fullmatch(path.name)
        gone = has_ended(match["mark"]) if match else None
        if gone is None:
            now_s = _clock_of(cache) if now_s is None else now_s
            gone = now_s - _last_change(path) > LEFT_AFTER_S
        if gone:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                removed.append(path)
    return removed


def _partials(cache: Path) -> Iterator[Path]:
    for folder in (cache, *(path for path in _listed(cache) if path.is_dir() and not path.is_symlink())):
        for path in _listed(folder):
            if _PARTIAL.fullmatch(path.name) or _PARTIAL_OF_OLDER_RELEASES.fullmatch(path.name):
                yield path


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _clock_of(folder: Path) -> float:
    """Seconds, by the clock of the file system; minus infinity, at which nothing is old, where it cannot be asked."""
    probe = folder / f".clock-{uuid.uuid4().hex}"
    try:
        probe.touch(exist_ok=False)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()
    except OSError:
        return float("-inf")


def _last_change(path: Path) -> float:
    """Seconds: of a file, or of a folder and all that lies in it; plus infinity where it cannot be asked."""
    try:
        inside = () if path.is_symlink() else path.rglob("*")
        return max(os.lstat(each).st_mtime for each in (path, *inside))
    except OSError:
        return float("inf")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def cannot_write(error: OSError, folder: Path) -> ResourceError:
    """The ResourceError of an index folder that cannot be written: names the cache it lies in."""
    return ResourceError(
        f"cannot write the sample index: {error}",
        str(folder.parent),
        "give --data-cache-path a folder with space that all nodes share",
    )


def roomy(size: int, least: int) -> int:
    """At least ``size``, at most an eighth more (or ``least``): lengths that differ a little share one file."""
    step = max(least, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step

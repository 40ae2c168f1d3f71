"""A folder of index files in which every piece is whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_telechat.errors import ResourceError

Say = Callable[[str], None]


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
        partial = self.path / f"{name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
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
        partial = self.path / f"{name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial.write_text(content, encoding="utf-8")
            _sync(partial)
            os.replace(partial, final)
        except OSError as error:
            raise cannot_write(error, self.path) from error
        finally:
            partial.unlink(missing_ok=True)


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

"""The folder a run of preprocess_data works in: partial files, a journal to go on from, a lock, and the final renames.

``PREFIX.partial/`` stands beside the output. The journal ``state.json`` says how much of each partial file is good and
where the input goes on; it is replaced by rename after the files were flushed to the disk. A killed run leaves the
folder; the same command cuts the files back to the journal and goes on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_telechat.data.indexed.format import ChunkSums, bytes_of, stored, sums_path, write_index, write_sums
from megatron_telechat.errors import ResourceError

_PARTS = ("bin", "lengths", "counts")


class Workspace:
    """Holds the lock from construction to ``close``.

    Args:
        prefix: ``--output-prefix``, with the mark of the shard.
        keys: one dataset ``{prefix}_{key}_document`` each.
        identity: what the output depends on; a journal of another identity is not taken up.
        extra: names of files of lines beside the datasets.

    Raises:
        ResourceError: the folder cannot be written, or another run holds the lock.
    """

    def __init__(
        self, prefix: str, keys: Sequence[str], dtype: type, identity: dict[str, Any] | None, extra: Sequence[str] = ()
    ):
        self.prefix, self.keys, self.dtype = prefix, tuple(keys), np.dtype(dtype)
        self.identity, self.extra = identity, tuple(extra)
        self.folder = Path(f"{prefix}.partial")
        self._state = self.folder / "state.json"
        self._files: dict[str, BinaryIO] = {}
        self.sums: dict[str, ChunkSums] = {}
        self.totals = {key: [0, 0, 0] for key in self.keys}  # tokens, sequences, documents
        self.journalled = False
        self.source_bytes = 0  # of the input, done; for the estimate of the space
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "a+", encoding="utf-8")
        except OSError as error:
            raise ResourceError(
                f"cannot write {self.folder}: {error.strerror}",
                "--output-prefix",
                "choose an --output-prefix you may write to",
            ) from error
        self._take_lock()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            who = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ResourceError(
                f"another run writes {self.prefix} (process {who})",
                str(self.folder),
                "wait for it, or choose another --output-prefix",
            ) from error
        if not os.fstat(self._lock.fileno()).st_nlink:
            self._lock.close()
            raise ResourceError(f"another run of {self.prefix} ended just now", str(self.folder), "start again")
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _part(self, key: str, part: str) -> Path:
        return self.folder / f"{key}.{part}"

    def final(self, key: str) -> str:
        """Prefix of a key's dataset, as `IndexedDataset` takes it."""
        return f"{self.prefix}_{key}_document"

    def _names(self) -> list[str]:
        return [*(f"{key}.{part}" for key in self.keys for part in _PARTS), *self.extra]

    def load(self) -> dict[str, Any] | None:
        """What an earlier run of the same identity left to go on from; None where there is nothing usable.

        A run that ended among its final renames is finished here; its journal then holds ``{"renamed": True, ...}``.
        """
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if self.identity is None or state.get("identity") != self.identity:
            return None
        if state.get("phase") == "rename":
            self._rename(state["renames"])
            return {**state["position"], "renamed": True}
        sizes = state["sizes"]
        paths = {name: self.folder / name for name in sizes}
        if any(not path.is_file() or path.stat().st_size < sizes[name] for name, path in paths.items()):
            return None
        for name, path in paths.items():
            os.truncate(path, sizes[name])
        self.totals = {key: list(totals) for key, totals in state["totals"].items()}
        for key in self.keys:
            self.sums[key] = ChunkSums.resumed(self._part(key, "bin"), sizes[f"{key}.bin"], state["chunks"][key])
        self.journalled = True
        return state["position"]

    def open(self, fresh: bool) -> None:
        """Open the partial files, empty or where ``load`` left them."""
        for file in self._files.values():
            file.close()
        for name in self._names():
            self._files[name] = open(self.folder / name, "wb" if fresh else "ab")
        if fresh:
            self._state.unlink(missing_ok=True)
            self.journalled = False
            self.totals = {key: [0, 0, 0] for key in self.keys}
            self.sums = {key: ChunkSums() for key in self.keys}

    def add(self, key: str, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> None:
        """Append documents: tokens in the dataset's dtype, int32 sequence lengths, int32 sequences of each document."""
        data = bytes_of(tokens) if tokens.size else b""
        self._files[f"{key}.bin"].write(data)
        self.sums[key].update(data)
        self._files[f"{key}.lengths"].write(lengths.astype("<i4").tobytes())
        self._files[f"{key}.counts"].write(counts.astype("<i4").tobytes())
        for place, size in enumerate((tokens.size, lengths.size, counts.size)):
            self.totals[key][place] += size

    def add_line(self, name: str, line: bytes) -> None:
        """Append a line, given without its end, to a file of ``extra``."""
        self._files[name].write(line + b"\n")

    @property
    def output_bytes(self) -> int:
        """Bytes the output has so far, indices included."""
        return sum(
            tokens * self.dtype.itemsize + 12 * sequences + 8 * documents
            for tokens, sequences, documents in self.totals.values()
        )

    def journal(self, position: dict[str, Any]) -> None:
        """Make what was added so far the point to go on from."""
        if self.identity is None:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {
            "phase": "encode",
            "identity": self.identity,
            "position": position,
            "totals": self.totals,
            "sizes": {name: file.tell() for name, file in self._files.items()},
            "chunks": {key: sums.whole_chunks() for key, sums in self.sums.items()},
        }
        self._write_state(state)
        self.journalled = True

    def _write_state(self, state: dict[str, Any]) -> None:
        partial = self._state.with_suffix(".new")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._state)

    def finish(self, position: dict[str, Any]) -> None:
        """Write the indices and checksums, then move everything to its final name, each index after its ``.bin``."""
        self._close_files()
        renames: list[tuple[str, str]] = []
        for key in self.keys:
            self._write_index(key)
            final = self.final(key)
            for suffix, target in (
                (".bin", f"{final}.bin"),
                (".idx", f"{final}.idx"),
                (".sums", str(sums_path(final))),
            ):
                renames.append((str(self.folder / f"{key}{suffix}"), target))
        for name in self.extra:
            if (self.folder / name).stat().st_size:
                renames.append((str(self.folder / name), f"{self.prefix}_{name}"))
            else:
                Path(f"{self.prefix}_{name}").unlink(missing_ok=True)
        self._write_state({"phase": "rename", "identity": self.identity, "position": position, "renames": renames})
        self._rename(renames)

    def _write_index(self, key: str) -> None:
        _, sequences, documents = self.totals[key]
        lengths, counts = self._part(key, "lengths"), self._part(key, "counts")
        with open(self._part(key, "idx"), "wb") as file:
            sums = write_index(
                file, self.dtype, sequences, documents, lambda: stored(lengths, "<i4"), lambda: stored(counts, "<i4")
            )
        write_sums(self.folder / f"{key}.sums", self.sums[key].result(), sums.result())

    def _rename(self, renames: Sequence[Sequence[str]]) -> None:
        # An old index beside a new .bin would be a readable lie: take it away first.
        if all(os.path.exists(source) for source, _ in renames):
            for _, target in renames:
                if not target.endswith(".bin"):
                    Path(target).unlink(missing_ok=True)
        for source, target in renames:
            if os.path.exists(source):
                os.replace(source, target)
        descriptor = os.open(self.folder.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.remove()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = {}

    def remove(self) -> None:
        """Take the folder away."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let go of the files and the lock; what is in the folder stays."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                continue  # a full disk refuses the last flush; the journal does not count those bytes
        self._files = {}
        self._lock.close()

    def refused(self, error: OSError, needed: int) -> ResourceError:
        """What to tell a person about an error of the disk."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder.parent).free
            kept = "the same command resumes from what is written" if self.journalled else "nothing is left behind"
            return ResourceError(
                f"no space left: the output needs about {needed:,} bytes, {self.output_bytes:,} of them are written, "
                f"{free:,} are free",
                str(self.folder.parent),
                f"free some space, or choose another --output-prefix; {kept}",
            )
        return ResourceError(
            f"cannot write in {self.folder}: {error.strerror or error}",
            str(self.folder.parent),
            "fix the disk or choose another --output-prefix",
        )

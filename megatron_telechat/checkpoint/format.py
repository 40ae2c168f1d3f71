"""The checkpoint format: writing one rank's part, reading any box of any tensor.

Neither side needs torch.distributed: conversion writes a checkpoint alone
(:class:`CheckpointWriter`), a training run writes one part a rank
(:class:`PartWriter`) and commits them together (``train_state.py``).
"""

from __future__ import annotations

import platform
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megatron_telechat.checkpoint import commit as protocol
from megatron_telechat.checkpoint.files import (
    FileEntry,
    LazyTensor,
    dtype_name,
    dtype_named,
    dtype_of_tag,
    lazy,
    open_tensors,
    read_file_error,
    write_safetensors,
)
from megatron_telechat.checkpoint.lineage import Branch, look_at
from megatron_telechat.checkpoint.manifest import Manifest, StoredBox, TensorEntry, read_manifest, usual_name
from megatron_telechat.checkpoint.names import RESTORE_OR_OTHER
from megatron_telechat.checkpoint.parts import Part, merge_parts
from megatron_telechat.checkpoint.stores import store_of
from megatron_telechat.checkpoint.verify import RANK, SAVE, STEP, check_files
from megatron_telechat.errors import CheckpointError, UserError
from megatron_telechat.locations import Location, location
from megatron_telechat.tensors.boxes import Box, intersect, whole

MAX_FILE_BYTES = 4 << 30
_OPEN_FILES = 16


class PartWriter:
    """Writes the boxes of one rank into ``rank_00012.safetensors`` of a save (and ``…-00001``, when large).

    Tensors are kept by reference until their file is full; they must not change before
    :meth:`close` returns.

    Args:
        write_file: writes a file of these tensors and returns its entry; `staging.FileImages.add` keeps it in memory.
    """

    def __init__(
        self,
        attempt: protocol.Attempt,
        rank: int,
        max_file_bytes: int = MAX_FILE_BYTES,
        write_file: Callable[[Location, Sequence[LazyTensor], Mapping[str, str]], FileEntry] = write_safetensors,
    ):
        self._folder = attempt.temporary
        self._rank = rank
        self._metadata = {SAVE: attempt.save, STEP: str(attempt.step), RANK: str(rank)}
        self._max_file_bytes = max_file_bytes
        self._write_file = write_file
        self._pending: list[LazyTensor] = []
        self._pending_bytes = 0
        self._part = Part()

    def add(self, key: str, global_shape: Sequence[int], offset: Sequence[int], tensor: torch.Tensor) -> None:
        """One box of the global tensor ``key``; every element of it must be added once by some rank."""
        box = Box(tuple(offset), tuple(tensor.shape))
        assert box.inside(global_shape), (key, box, global_shape)
        name = usual_name(key, offset)
        stored = StoredBox(self._queue(lazy(name, tensor)), name, box)
        dtype, shape = dtype_name(tensor.dtype), tuple(global_shape)
        known = self._part.tensors.setdefault(key, TensorEntry(dtype, shape, []))
        assert (known.dtype, known.shape) == (dtype, shape), key
        assert isinstance(known.boxes, list)
        known.boxes.append(stored)

    def add_rng(self, rank: int, state: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """State of this rank's random generators: JSON with the names of its tensors."""
        files = {self._queue(lazy(name, tensor)) for name, tensor in tensors.items()}
        assert len(files) == 1, "the generators' tensors are far smaller than a file"
        self._part.rng = {"rank": rank, "file": files.pop(), "state": state}

    def close(self) -> Part:
        """Write what is pending and return all that this rank has written. Raises ResourceError."""
        self._flush()
        return self._part

    def _queue(self, tensor: LazyTensor) -> str:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._pending.append(tensor)
        self._pending_bytes += tensor.nbytes
        return self._file_name()

    def _file_name(self) -> str:
        number = len(self._part.files)
        return f"rank_{self._rank:05d}{f'-{number:05d}' if number else ''}.safetensors"

    def _flush(self) -> None:
        if self._pending:
            name = self._file_name()
            self._part.files[name] = self._write_file(self._folder / name, self._pending, self._metadata)
            self._pending, self._pending_bytes = [], 0


def versions() -> dict[str, str]:
    """Versions of python, torch, this package and megatron-core, for the manifest; "unknown" if not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("megatron_telechat", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class CheckpointWriter:
    """Writes a whole checkpoint from one process. Used as a context manager; leaving it by an error commits nothing.

        with CheckpointWriter(root, step=0, config=yaml) as writer:
            writer.add("model/…", global_shape, offset, tensor)
        writer.path

    With a ``branch`` it is the next save of that line, as a training's is; without, it replaces a checkpoint of its
    step.
    """

    def __init__(
        self,
        root: Location | str,
        *,
        step: int,
        config: str,
        max_file_bytes: int = 1 << 30,
        extra: Mapping[str, Any] | None = None,
        branch: Branch | None = None,
    ):
        self._branch = branch
        self._attempt = protocol.begin(location(root), step)
        self._writer = PartWriter(self._attempt, 0, max_file_bytes)
        self._config = config
        self.extra: dict[str, Any] = dict(extra or {})
        self.files: dict[str, FileEntry] = {}
        self.path: Location | None = None

    @property
    def folder(self) -> Location:
        """Where the files are written, for companion files; list them in ``files``."""
        return self._attempt.temporary

    def add(self, key: str, global_shape: Sequence[int], offset: Sequence[int], tensor: torch.Tensor) -> None:
        """See :meth:`PartWriter.add`; here this process adds every element."""
        self._writer.add(key, global_shape, offset, tensor)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            protocol.abandon(self._attempt)
            return
        try:
            part = merge_parts([self._writer.close()])
            manifest = Manifest(
                step=self._attempt.step,
                consumed_samples=0,
                config=self._config,
                topology={"world_size": 1},
                versions=versions(),
                files={**part.files, **self.files},
                tensors=part.tensors,
                extra=self.extra,
                lineage=self._branch.next().to_json() if self._branch is not None else None,
                save=self._attempt.save,
            )
            self.path = protocol.commit(self._attempt, manifest, keep_replaced=self._branch is not None)
            if self._branch is not None:
                self._branch.saved(look_at(self.path))
        except BaseException:
            protocol.abandon(self._attempt)
            raise


class CheckpointReader:
    """Reads boxes of the global tensors of a committed checkpoint, for any number of threads.

    Opening checks the manifest and the size of every file; ``verify=True`` also the
    checksum of every byte. Raises CheckpointError naming the file at fault.

    Args:
        manifest: that of ``path``, where it was read and checked already.
        open_file: opens a file of the manifest by its name, where they do not lie in ``path``; what it returns is that
            of `open_tensors`.
    """

    def __init__(
        self,
        path: Location | str,
        verify: bool = False,
        check_sizes: bool = True,
        manifest: Manifest | None = None,
        open_file: Callable[[str], Any] | None = None,
    ):
        self._open_file = open_file
        self.path = location(path)
        self.manifest = read_manifest(self.path) if manifest is None else manifest
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._opening = threading.Lock()
        if check_sizes:
            self.check_files(checksums=verify)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """What is stored, by key: ``model/`` or ``optimizer/<name>/``, then the key of the tensor."""
        return self.manifest.tensors

    @property
    def config(self) -> str:
        """The resolved configuration of the run that saved it, as YAML."""
        return self.manifest.config

    def check_files(self, checksums: bool = False) -> None:
        """Sizes (and checksums) of all files. Raises CheckpointError listing every file at fault."""
        problems = check_files(self.path, self.manifest, self.manifest.files, checksums)
        if problems:
            raise CheckpointError(problems)

    def close(self) -> None:
        """Close the files; a later read opens what it needs again."""
        self._open.clear()
        store_of(self.path).release(self.path)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that ``key`` is stored in. Raises KeyError where there is no such tensor."""
        return dtype_named(self.entries[key].dtype)

    def read(self, key: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The box of ``key`` at ``offset`` (no offset or shape: the whole tensor), on the CPU, in the stored dtype."""
        entry = self.entries[key]
        box = whole(entry.shape) if offset is None or shape is None else Box(tuple(offset), tuple(shape))
        if not box.inside(entry.shape):
            raise ValueError(f"{box} is not inside {key} {entry.shape}")
        parts = []
        for stored in entry.boxes:
            common = intersect(stored.box, box)
            if common is not None:
                parts.append((common, self._read_box(key, entry, stored, common)))
        if len(parts) == 1:
            return parts[0][1]
        out = torch.empty(box.shape, dtype=dtype_named(entry.dtype))
        for common, values in parts:
            out[common.slices(box.offset)] = values
        return out

    def files_of(self, key: str, box: Box) -> Counter[str]:
        """Bytes of this box of ``key`` in each file; none where there is no such tensor."""
        found: Counter[str] = Counter()
        entry = self.entries.get(key)
        for stored in entry.boxes if entry is not None else ():
            common = intersect(stored.box, box)
            if common is not None:
                found[stored.file] += common.numel * self.dtype(key).itemsize
        return found

    def read_rng(self, rank: int) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """(JSON state, its tensors) of one rank's generators, None where none was saved."""
        for entry in self.manifest.rng:
            if entry["rank"] == rank:
                handle = self._handle(entry["file"])
                names = [name for name in handle.keys() if name.startswith("rng/")]
                return entry["state"], {name: handle.get_tensor(name) for name in names}
        return None

    def _read_box(self, key: str, entry: TensorEntry, stored: StoredBox, box: Box) -> torch.Tensor:
        path = self.path / stored.file
        try:
            view = self._handle(stored.file).get_slice(stored.name)
            found = (tuple(view.get_shape()), dtype_of_tag(view.get_dtype()))
            if found != (stored.box.shape, dtype_named(entry.dtype)):
                raise CheckpointError(
                    f"{stored.name} is {found[1]} {found[0]}, the manifest says {entry.dtype} {stored.box.shape}",
                    where=str(path),
                    fix=RESTORE_OR_OTHER,
                )
            return view[box.slices(stored.box.offset)]
        except UserError:
            raise
        except Exception as error:  # safetensors raises its own type, OSError and, for odd headers, others
            raise read_file_error(path, error) from error

    def _handle(self, name: str) -> Any:
        with self._opening:
            return self._opened(name)

    def _opened(self, name: str) -> Any:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            handle = self._open_here(name) if self._open_file is None else self._open_file(name)
        except UserError:
            raise
        except Exception as error:
            raise read_file_error(self.path / name, error) from error
        self._open[name] = handle
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return handle

    def _open_here(self, name: str) -> Any:
        fault = store_of(self.path).faults(self.path, {name: self.manifest.files[name]}, patient=True).get(name)
        if fault:
            raise CheckpointError(fault, where=str(self.path / name), fix=RESTORE_OR_OTHER)
        return open_tensors(self.path / name)

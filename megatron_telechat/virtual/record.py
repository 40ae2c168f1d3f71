"""What one virtual rank does: live bytes on its device, launches, exchanges and waits of the host."""

from __future__ import annotations

import sys
import sysconfig
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_telechat.device_kinds import HOST
from megatron_telechat.virtual.records import Call, ScopeWork

HOST_DEVICE = torch.device(HOST)

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds a block up to."""

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARY = Path(sysconfig.get_path("stdlib"))

_NOTHING_TO_LAUNCH = frozenset(
    "alias as_strided chunk detach diagonal empty empty_like empty_strided expand is_same_size lift_fresh movedim "
    "narrow new_empty new_empty_strided permute record_stream reshape resize_ select set_ slice split "
    "split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as_real _reshape_alias _unsafe_view "
    "_local_scalar_dense".split()
)
"""Operations that make views or allocate: no kernel runs."""


class Memory:
    """Bytes of the storages on the device that are alive.

    Attributes:
        now, peak: bytes.
        peaks: of each phase, the largest number of bytes while it ran.
        phase: name of the running one.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.phase = "start"
        self.peaks: dict[str, int] = defaultdict(int)
        self._sizes: dict[int, int] = {}

    def see(self, tensor: Any) -> None:
        """Count the storage of this tensor, if it is on the device and was not counted yet."""
        if not isinstance(tensor, FakeTensor) or tensor.fake_device == HOST_DEVICE:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        before = self._sizes.get(key)
        if before == size:
            return
        if before is None:
            weakref.finalize(storage, self._gone, key)
        self._sizes[key] = size
        self.now += size - (before or 0)
        self.peak = max(self.peak, self.now)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)

    def restart(self) -> None:
        """Forget the peaks, not what is alive."""
        self.peak = self.now
        self.peaks.clear()

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to this phase."""
        before, self.phase = self.phase, phase
        self.peaks[phase] = max(self.peaks[phase], self.now)
        try:
            yield
        finally:
            self.phase = before


@dataclass
class Record:
    """Everything recorded since :meth:`clear`.

    Attributes:
        work: of each scope, such as "layer 3 forward".
        calls: exchanges in the order of their starts, transfers included.
        syncs: waits of the host: (what, file:line) → how often.
    """

    work: dict[str, ScopeWork] = field(default_factory=lambda: defaultdict(ScopeWork))
    calls: list[Call] = field(default_factory=list)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    scope: str = "other"

    def clear(self) -> None:
        """Forget what was recorded, not what is alive."""
        self.work.clear()
        self.calls.clear()
        self.syncs.clear()

    def wait_of_host(self, what: str) -> None:
        """The host waits for the device, at the innermost line of the package that is on the stack."""
        self.syncs[what, _place()] += 1


class Recorder(TorchDispatchMode):
    """Sees every operation of torch and writes it down.

    Three collectives that the fake process group lacks, the coalesced ones, are taken apart.
    """

    def __init__(self, memory: Memory, record: Record):
        super().__init__()
        self.memory, self.record = memory, record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name in _COALESCED:
            return [self.__torch_dispatch__(part, types, each)[-1] for part, each in _COALESCED[name](*args)][-1]
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in (*outputs, *inputs):
            self.memory.see(tensor)
        if space == "c10d":
            self._exchange(name, args, kwargs, inputs)
        elif space != "prim" and name not in _NOTHING_TO_LAUNCH:
            self._kernel(name, args, kwargs, inputs, outputs)
        return out

    def _kernel(self, name: str, args: Any, kwargs: Any, inputs: list, outputs: list) -> None:
        devices = {tensor.device for tensor in (*inputs, *outputs)}
        if devices <= {HOST_DEVICE}:
            return
        if name in ("_to_copy", "copy_") and HOST_DEVICE in devices:
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if waits:
                self.record.wait_of_host("copy to it" if inputs[-1].device == HOST_DEVICE else "copy from the device")
        moved = sum(_bytes(tensor) for tensor in {id(t): t for t in (*inputs, *outputs)}.values())
        launches = len(args[0]) if name.startswith("_foreach") and isinstance(args[0], (list, tuple)) else 1
        # A multi-tensor kernel takes some hundred tensors at a time.
        launches = -(-launches // _TENSORS_A_LAUNCH) if name.startswith(("_foreach", "_fused_adamw")) else launches
        self.record.work[self.record.scope].add(launches, _flops(name, args, outputs), moved)

    def _exchange(self, name: str, args: Any, kwargs: Any, tensors: list) -> None:
        group = _group_of((args, kwargs))
        if group is None or name in ("barrier", "monitored_barrier_"):
            return
        splits: tuple[tuple[int, ...], ...] = ()
        if name == "alltoall_base_":
            parts = (part for part in args if isinstance(part, list) and all(type(n) is int for n in part))
            splits = tuple(tuple(part) for part in parts if part)  # none where the parts are equal
        peer = next((part for part in args if type(part) is int), None) if name in ("send", "recv_") else None
        largest = max(tensors, key=_bytes)
        self.record.calls.append(
            Call(
                kind=_KINDS.get(name, name),
                group=group.group_name,
                description=group.group_desc,
                size=group.size(),
                rank=group.rank(),
                bytes=_bytes(largest),
                dtype=str(largest.dtype).removeprefix("torch."),
                splits=splits,
                peer=peer,
                scope=self.record.scope,
            )
        )


_TENSORS_A_LAUNCH = 320
_KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


def _each_reduced(tensors: Any, group: Any, op: Any, *_: Any) -> Iterator[tuple[Any, Any]]:
    for tensor in tensors:
        yield torch.ops.c10d.allreduce_.default, ([tensor], group, op, None)


def _each_scattered(outputs: Any, inputs: Any, group: Any, op: Any, *_: Any) -> Iterator[tuple[Any, Any]]:
    for output, whole in zip(outputs, inputs, strict=True):
        yield torch.ops.c10d._reduce_scatter_base_.default, (output, whole, group, op)


def _each_gathered(outputs: Any, inputs: Any, group: Any, *_: Any) -> Iterator[tuple[Any, Any]]:
    for output, part in zip(outputs, inputs, strict=True):
        yield torch.ops.c10d._allgather_base_.default, (output, part, group)


_COALESCED = {
    "allreduce_coalesced_": _each_reduced,
    "reduce_scatter_tensor_coalesced_": _each_scattered,
    "allgather_into_tensor_coalesced_": _each_gathered,
}


def _group_of(arguments: Any) -> dist.ProcessGroup | None:
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(leaf)
            except RuntimeError:  # a reduce op, not a group
                continue
    return None


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(name: str, args: Any, outputs: list) -> float:
    """Of products and attention, two for each multiplication with its addition."""
    if name in ("mm", "bmm"):
        return 2.0 * args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm", "addmm_", "baddbmm_"):
        return 2.0 * args[1].numel() * args[2].shape[-1]
    if name == "_grouped_mm":
        a, b = args[0], args[1]
        return 2.0 * a.shape[-2] * a.shape[-1] * b.shape[-1]  # rows go to one expert each
    if "scaled_dot_product" in name and "backward" not in name:
        query, key = args[0], args[1]
        return 4.0 * query.numel() * key.shape[-2] / (2 if _is_causal(args) else 1)
    if "scaled_dot_product" in name:
        query, key = args[1], args[2]
        return 10.0 * query.numel() * key.shape[-2] / 2
    if name == "_flash_attention_forward":
        query, key, _, bounds = args[:4]
        return 4.0 * query[0].numel() * _pairs(query, key, bounds, _is_causal(args))
    if name == "_flash_attention_backward":
        query, key, bounds = args[1], args[2], args[6]
        return 10.0 * query[0].numel() * _pairs(query, key, bounds, _is_causal(args))
    return 0.0


def _pairs(query: torch.Tensor, key: torch.Tensor, bounds: torch.Tensor, causal: bool) -> float:
    """Pairs of a query and a key that it sees, in blocks taken for equal.

    Args:
        query, key: [rows, heads, d], the rows of all blocks.
        bounds: [blocks + 1].
        causal: the last query of a block sees its last key.
    """
    blocks = bounds.numel() - 1
    return query.shape[0] * (key.shape[0] - causal * query.shape[0] / 2) / blocks


def _is_causal(args: Any) -> bool:
    return any(value is True for value in args)


def _place() -> str:
    """file:line of the innermost frame that is not torch's, Python's own, or of this folder."""
    frame = sys._getframe(1)
    here = Path(__file__).parent
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _PACKAGE in path.parents and here not in path.parents:
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        if "site-packages" in path.parts:
            after = path.parts[path.parts.index("site-packages") + 1 :]
            if after[0] != "torch":
                return f"{'/'.join(after)}:{frame.f_lineno}"
        elif here not in path.parents and path.is_absolute() and _LIBRARY not in path.parents:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"

"""What stands in the place of a CUDA device, its process groups and its numbers, in one table.

A virtual rank runs the program itself on fake tensors (torch's FakeTensorMode): shapes, types, devices and strides are
real, numbers are not. What the program asks of the device outside of tensors is answered here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from megatron_telechat.backend import DeviceMemory
from megatron_telechat.backend.base import local_rank_of_environment
from megatron_telechat.backend.cuda import CudaBackend
from megatron_telechat.config.schema import ParallelConfig
from megatron_telechat.virtual.launch import played_device
from megatron_telechat.virtual.record import HOST_DEVICE, Memory, Record

aten = torch.ops.aten
# As torch has them: a rank is played inside of the context that its program was loaded in.
_join, _make_group, _make_tensor = dist.init_process_group, dist.new_group, torch.tensor
_TorchGenerator = torch.Generator


class _AnyGenerator(type(_TorchGenerator)):
    """Of a class whose instances are all of torch's generators."""

    def __instancecheck__(cls, one: Any) -> bool:
        return isinstance(one, _TorchGenerator)


class VirtualGenerator(_TorchGenerator, metaclass=_AnyGenerator):
    """A generator of the host, whatever device is asked for: nothing is drawn."""

    def __new__(cls, device: Any = None) -> Any:
        return _TorchGenerator()


CAPABILITY = (9, 0)
"""Compute capability of the device that is played."""


def _total_bytes() -> int:
    return int((played_device().memory_gib or 0) * 2**30)


class VirtualBackend(CudaBackend):
    """CUDA's backend, whose device is played; inside of :func:`virtual_cuda`."""

    distributed_backend = "fake"

    def __init__(self, memory: Memory):
        super().__init__(local_rank_of_environment())
        self._memory = memory

    def memory(self) -> DeviceMemory:
        """Bytes that are alive, and those of the device that is played."""
        return DeviceMemory(self._memory.now, self._memory.peak, _total_bytes())

    def pin(self, memory: torch.Tensor) -> None:
        """Nothing: there is no memory behind it."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing."""

    def host_bytes_free(self) -> int:
        """As much as anyone asks for: the hosts that are played are not this machine."""
        return 2**60


class _Stream:
    """A stream, and an event: nothing is under way when a fake operation returns."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait = wait_stream = wait_event = record = _nothing

    def record_event(self, event: Any = None) -> Any:
        return _Stream() if event is None else event

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@contextmanager
def virtual_cuda(rank: int, parallel: ParallelConfig, memory: Memory, record: Record) -> Iterator[None]:
    """Inside, this process is one rank of a CUDA world; torch is as before afterwards."""
    per_node = parallel.node_size
    local = rank % per_node
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(parallel.world_size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(per_node),
        # Of no machine: nobody is met.
        "MASTER_ADDR": "virtual",
        "MASTER_PORT": "1",
        # The kernels of Triton would be started on tensors without memory.
        "MEGATRON_TELECHAT_KERNELS": "0",
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        for place, names in (
            (torch.cuda, _cuda(local, per_node, memory, record)),
            (torch.cuda.random, _generators()),
            (dist, _process_groups(rank, parallel.world_size)),
            (torch, {"tensor": _tensor, "Generator": VirtualGenerator}),
            (FakeTensor, {"tolist": _tolist(record)}),
            (torch.Tensor, {"pin_memory": lambda self, *_: self}),
            (torch.nn.functional, {"scaled_dot_product_attention": _attention}),
            (fake_tensor, {"init_gpu_context": lambda device: None}),
            # FakeTensorMode asks for a device where it believes that there is one.
            (fake_tensor.FakeTensorMode, {"avoid_device_init": property(lambda self: True)}),
        ):
            for name, value in names.items():
                stack.enter_context(patch.object(place, name, value, create=True))  # a CPU build lacks some
        stack.enter_context(_whole_kernels())
        stack.enter_context(
            patch.dict(fake_impls.op_implementations_dict, {aten._local_scalar_dense.default: _scalar(record)})
        )
        yield


_KERNELS = ("silu_backward", "_fused_rms_norm")
"""Operations that are one kernel on CUDA, and that torch takes apart where it was built without CUDA."""


@contextmanager
def _whole_kernels() -> Iterator[None]:
    """Inside, these operations are whole, as on the device."""
    library = torch.library.Library("aten", "IMPL")

    def on_device(*_: Any) -> Any:
        raise AssertionError("a fake tensor holds no numbers")

    for name in _KERNELS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, on_device, "CUDA")
    try:
        yield
    finally:
        library._destroy()


def _cuda(local: int, per_node: int, memory: Memory, record: Record) -> Mapping[str, Any]:
    name = played_device().device_names[0]
    stream = _Stream()
    current = [local]

    def waits(what: str) -> Callable[..., None]:
        return lambda *_, **__: record.wait_of_host(what)

    class Event(_Stream):
        synchronize = waits("event")  # pyright: ignore[reportAssignmentType]

    class Stream(_Stream):
        synchronize = waits("stream")  # pyright: ignore[reportAssignmentType]

    def set_device(wanted: Any) -> None:
        index = wanted if isinstance(wanted, int) else torch.device(wanted).index
        current[0] = 0 if index is None else index

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: per_node,
        "current_device": lambda: current[0],
        "set_device": set_device,
        "get_device_name": lambda *_: name,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: SimpleNamespace(
            name=name,
            total_memory=_total_bytes(),
            major=CAPABILITY[0],
            minor=CAPABILITY[1],
            multi_processor_count=132,
        ),
        "memory_allocated": lambda *_: memory.now,
        "memory_reserved": lambda *_: memory.now,
        "max_memory_allocated": lambda *_: memory.peak,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "synchronize": waits("torch.cuda.synchronize"),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "default_generators": tuple(torch.Generator() for _ in range(per_node)),
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        **_generators(),
    }


def _generators() -> Mapping[str, Any]:
    state = torch.Generator().get_state()
    return {
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_, **__: state,
        "set_rng_state": lambda *_, **__: None,
    }


def _process_groups(rank: int, world: int) -> Mapping[str, Any]:
    def init_process_group(*_: Any, **__: Any) -> None:
        with unset_fake_temporarily():
            _join("fake", store=FakeStore(), rank=rank, world_size=world)

    def new_group(ranks: Any = None, *_: Any, group_desc: str | None = None, **__: Any) -> Any:
        with unset_fake_temporarily():
            return _make_group(ranks=ranks, group_desc=group_desc)

    class ProcessGroupNCCL:
        """Of megatron-core's interest: the options of a group."""

        class Options:
            def __init__(self, is_high_priority_stream: bool = False):
                self.is_high_priority_stream = is_high_priority_stream
                self.config = SimpleNamespace()

    def all_gather_object(everyone: list, own: Any, group: Any = None) -> None:
        everyone[:] = [own] * len(everyone)  # the ranks of one program agree

    return {
        "init_process_group": init_process_group,
        "new_group": new_group,
        "get_backend": lambda group=None: "nccl",
        "all_gather_object": all_gather_object,
        "broadcast_object_list": lambda *_, **__: None,
        "ProcessGroupNCCL": ProcessGroupNCCL,
    }


def _number(tensor: torch.Tensor) -> Any:
    """What a tensor without numbers answers to the host."""
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def _scalar(record: Record) -> Callable[..., Any]:
    def item(fake_mode: Any, func: Any, tensor: FakeTensor) -> Any:
        if tensor.fake_device != HOST_DEVICE:
            record.wait_of_host("item")
        return _number(tensor)

    return item


def _tolist(record: Record) -> Callable[..., Any]:
    def numbers(tensor: torch.Tensor, shape: tuple[int, ...]) -> Any:
        return _number(tensor) if not shape else [numbers(tensor, shape[1:]) for _ in range(shape[0])]

    def tolist(self: FakeTensor) -> Any:
        if self.fake_device != HOST_DEVICE:
            record.wait_of_host("tolist")
        return numbers(self, tuple(self.shape))

    return tolist


def _tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.tensor, of tensors without numbers among numbers too."""
    if isinstance(data, (list, tuple)):
        data = tree_map(lambda leaf: leaf.item() if isinstance(leaf, FakeTensor) else leaf, data)
    return _make_tensor(data, *args, **kwargs)


def numbers_of_host(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, read where tensors hold numbers."""
    while True:
        with unset_fake_temporarily():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of tensors that hold numbers."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that a GPU takes: flash attention for 16-bit types, the memory-efficient one for fp32.

    Without a device torch would take the plain products, which hold a matrix of s x s.
    """
    assert attn_mask is None, "flash attention takes no mask"
    if query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, dropout_p, is_causal, scale=scale
    )[0]

"""Ranks on NVIDIA GPUs, talking over NCCL."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend.base import Backend, DeviceMemory
from megatron_telechat.errors import ResourceError

if TYPE_CHECKING:
    import torch

_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Environment variable: hardware queues of a process. Read when the CUDA context is made."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with settings of torch's allocator: the name since torch 2.9, and the one before."""
_SEGMENTS = "expandable_segments:True"
"""One range of addresses that grows, in place of many blocks: the experts' buffers have another size in every step,
and blocks of fixed sizes fill up with holes."""
_FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_WATCHDOG = {
    # A collective that fails or takes too long ends the process, whose thread cannot be stopped inside of a kernel.
    # Its communicators are left as they are: aborting them can hang.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # Before that, every rank writes its last collectives to disk: which rank did not come, and to which of them.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # The watchdog itself may hang in a call of the driver: after so many seconds without a sign, the process ends.
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
}
"""What happens when a rank is lost. torch's defaults today, which have changed before."""
_REDIRECTION = "torch_npu.contrib.transfer_to_npu"
"""Module that, once imported, has put torch_npu in the place of torch.cuda for the whole process."""


class CudaBackend(Backend):
    """The GPU whose number is the local rank."""

    name = "cuda"
    distributed_backend = "nccl"

    @staticmethod
    def present() -> bool:
        """Whether torch was built for CUDA and the driver shows a device."""
        # After torch_npu has redirected torch.cuda to its devices, torch.cuda answers for those.
        return _REDIRECTION not in sys.modules and _is_available()

    @property
    def device(self) -> torch.device:
        """``cuda:N``, where N is the local rank; `install` says whether there are so many."""
        import torch

        return torch.device("cuda", self.local_rank)

    def _select_device(self) -> None:
        import torch

        # Sequence parallelism overlaps its collectives with the GEMMs only where kernels are
        # queued in the order they were issued; before the first question to CUDA.
        os.environ.setdefault(_QUEUES, "1")
        if not _is_available():
            raise ResourceError(
                "no CUDA device: torch.cuda.is_available() is false",
                "--device cuda",
                "use --device cpu, or install a CUDA build of torch",
            )
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ResourceError(
                f"local rank {self.local_rank} has no device: this machine shows {count} CUDA device(s)",
                "torchrun --nproc-per-node",
                f"start at most {count} rank(s) on this node, or use --device cpu",
            )
        _set_allocator()
        _set_watchdog()
        torch.cuda.set_device(self.local_rank)

    def open_queues(self) -> None:
        """Set CUDA_DEVICE_MAX_CONNECTIONS to 8, unless it is set; CUDA reads it when it makes its context."""
        # CUDA's usual number. With the one queue of `_select_device` the exchange would stand behind the kernels.
        os.environ.setdefault(_QUEUES, "8")

    def overlap_warning(self) -> str | None:
        """A warning where CUDA_DEVICE_MAX_CONNECTIONS is 1, so that all kernels stand in one queue."""
        if os.environ.get(_QUEUES) != "1":
            return None
        return (
            f"{_QUEUES}=1 queues exchanges behind the kernels that they should run beside (of the experts with "
            "--moe-input-chunks, of the attention with context parallelism): unset it"
        )

    def use_deterministic_algorithms(self) -> None:
        """Turn torch's deterministic algorithms on; give cuBLAS a fixed work space, unless the environment names one.

        An operation that has no deterministic kernel is an error of torch from now on.
        """
        import torch

        # cuBLAS splits a sum by the work space it finds; torch refuses products without a fixed one. This is the size
        # that torch takes on Hopper anyway; read at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The backward of torch's attention sums its blocks in any order unless this is set, and not only as a warning.
        torch.use_deterministic_algorithms(True)
        # Finds reads of memory that nobody wrote; costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (a property of the module)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        import torch

        torch.cuda.synchronize(self.device)

    def pin(self, memory: torch.Tensor) -> None:
        """cudaHostRegister; memory that the driver does not take stays as it is, and copies are slower."""
        import torch

        with torch.cuda.device(self.device):
            _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)

    def unpin(self, memory: torch.Tensor) -> None:
        """cudaHostUnregister."""
        import torch

        with torch.cuda.device(self.device):
            _runtime().cudaHostUnregister(memory.data_ptr())

    def memory(self) -> DeviceMemory:
        """Bytes of tensors in torch's allocator, now and at most since `reset_peak_memory`, and the memory of the GPU.

        The CUDA context and NCCL's buffers are not in the first two.
        """
        import torch

        total = torch.cuda.get_device_properties(self.device).total_memory
        return DeviceMemory(
            torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device), total
        )

    def reset_peak_memory(self) -> None:
        """The peak begins anew at what is allocated now."""
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)

    def device_name(self) -> str:
        """What the driver calls the product, such as ``NVIDIA H200``."""
        import torch

        return torch.cuda.get_device_name(self.device)

    def empty_cache(self) -> None:
        """Return the allocator's unused blocks to the driver, which other libraries take memory from."""
        import torch

        torch.cuda.empty_cache()

    def _seed_device(self, value: int) -> None:
        import torch

        torch.cuda.manual_seed(value)

    def _device_rng_state(self) -> Any:
        import torch

        return torch.cuda.get_rng_state(self.device)

    def _set_device_rng_state(self, state: Any) -> None:
        import torch

        torch.cuda.set_rng_state(state, self.device)


def _runtime() -> Any:
    """The CUDA runtime's functions."""
    import torch

    return torch.cuda.cudart()


def _is_available() -> bool:
    """torch.cuda.is_available(), by a look at NVML: CUDA's own answer starts the driver, and what the environment says
    of its queues must be there before that."""
    import torch

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.is_available()


def _set_allocator() -> None:
    """Let torch's allocator grow its segments, unless the environment has settings of its own; before the first
    tensor."""
    import torch

    if any(name in os.environ for name in _ALLOCATOR):
        return
    os.environ[_ALLOCATOR[0]] = _SEGMENTS
    # torch may have read the environment when it was imported.
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if tell is not None:
        tell(_SEGMENTS)


def _set_watchdog() -> None:
    """What torch's NCCL groups do when a collective does not end, and what they write down of it; before the first
    group. What the environment says is left as it is."""
    for name, value in _WATCHDOG.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in _FLIGHT_RECORDER):
        os.environ[_FLIGHT_RECORDER[0]] = "2000"

"""Ranks on Ascend NPUs, talking over HCCL, through torch_npu."""

from __future__ import annotations

import importlib.util
import math
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend.base import Backend, DeviceMemory
from megatron_telechat.errors import ResourceError

if TYPE_CHECKING:
    import torch

INSTALL = "pip install torch-npu (the release that matches your torch and CANN), or use --device cpu"

CONNECT_SECONDS = (120, 7200)
"""Range of HCCL_CONNECT_TIMEOUT: how long a rank waits for others to open a communicator."""
MOST_EXEC_SECONDS = 2**31 - 1
"""Largest HCCL_EXEC_TIMEOUT; 0 would mean for ever."""


class NpuBackend(Backend):
    """The Ascend NPU whose number is the local rank."""

    name = "npu"
    distributed_backend = "hccl"

    @staticmethod
    def present() -> bool:
        """Whether torch_npu can be imported and shows a device."""
        if importlib.util.find_spec("torch_npu") is None:
            return False
        try:
            return _torch_npu().npu.is_available()
        except ResourceError:
            return False

    @property
    def device(self) -> torch.device:
        """``npu:N``, where N is the local rank. torch knows this name once torch_npu is imported.

        Raises:
            ResourceError: torch_npu cannot be imported.
        """
        import torch

        _torch_npu()
        return torch.device("npu", self.local_rank)

    def _select_device(self) -> None:
        npu = _torch_npu().npu
        count = npu.device_count() if npu.is_available() else 0
        if self.local_rank >= count:
            raise ResourceError(
                f"local rank {self.local_rank} has no device: this machine shows {count} NPU(s)",
                "torchrun --nproc-per-node",
                f"start at most {count} rank(s) on this node" if count else INSTALL,
            )
        # torch_npu's own redirection of torch.cuda, device='cuda', Tensor.cuda and "nccl" to the NPU.
        # It is process-wide, and the one way that Ascend supports for code written for CUDA.
        from torch_npu.contrib import transfer_to_npu  # noqa: F401 # pyright: ignore[reportMissingImports] (Ascend only)

        npu.set_device(self.local_rank)

    def limit_waits(self, timeout: timedelta) -> None:
        """HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT, in seconds, within what CANN takes."""
        # HCCL looks at its environment when it opens a communicator. Its own limits (120 s to connect, 1836 s in an
        # operation) know nothing of the run's.
        seconds = max(1, math.ceil(timeout.total_seconds()))
        least, most = CONNECT_SECONDS
        os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, least), most)))
        os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(min(seconds, MOST_EXEC_SECONDS)))

    def use_deterministic_algorithms(self) -> None:
        """torch's switch, which torch_npu passes on to its kernels, and HCCL_DETERMINISTIC for the reductions."""
        import torch

        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        torch.use_deterministic_algorithms(True)
        # Finds reads of memory that nobody wrote; costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (a property of the module)

    def synchronize(self) -> None:
        """Wait for all streams of the current device, which `install` has chosen."""
        _torch_npu().npu.synchronize()

    def memory(self) -> DeviceMemory:
        """Bytes of tensors in torch_npu's allocator, now and at most since the last reset, and the device's memory."""
        npu = _torch_npu().npu
        total = npu.get_device_properties(self.local_rank).total_memory
        return DeviceMemory(npu.memory_allocated(), npu.max_memory_allocated(), total)

    def reset_peak_memory(self) -> None:
        """The peak begins anew at what is allocated now."""
        _torch_npu().npu.reset_peak_memory_stats()

    def device_name(self) -> str:
        """What torch_npu calls the product."""
        return _torch_npu().npu.get_device_name(self.local_rank)

    def empty_cache(self) -> None:
        """Return the allocator's unused blocks to the device."""
        _torch_npu().npu.empty_cache()

    def _seed_device(self, value: int) -> None:
        _torch_npu().npu.manual_seed(value)

    def _device_rng_state(self) -> Any:
        return _torch_npu().npu.get_rng_state(self.local_rank)

    def _set_device_rng_state(self, state: Any) -> None:
        _torch_npu().npu.set_rng_state(state, self.local_rank)


def _torch_npu() -> Any:
    """The torch_npu module.

    Raises:
        ResourceError: it is not installed, or its CANN libraries do not load.
    """
    try:
        import torch_npu  # pyright: ignore[reportMissingImports] (installed on Ascend machines only)
    except ImportError as error:
        raise ResourceError(f"torch_npu cannot be imported: {error}", "--device npu", INSTALL) from error
    return torch_npu

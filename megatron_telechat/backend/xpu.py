"""Ranks on Intel GPUs, talking over XCCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_telechat.backend.base import Backend, DeviceMemory
from megatron_telechat.errors import ResourceError

if TYPE_CHECKING:
    import torch


class XpuBackend(Backend):
    """The Intel GPU whose number is the local rank."""

    name = "xpu"
    distributed_backend = "xccl"

    @staticmethod
    def present() -> bool:
        """Whether torch was built for Intel GPUs and the driver shows one."""
        import torch

        return torch.xpu.is_available()

    @property
    def device(self) -> torch.device:
        """``xpu:N``, where N is the local rank."""
        import torch

        return torch.device("xpu", self.local_rank)

    def _select_device(self) -> None:
        import torch

        count = torch.xpu.device_count() if torch.xpu.is_available() else 0
        if self.local_rank >= count:
            raise ResourceError(
                f"local rank {self.local_rank} has no device: this machine shows {count} Intel GPU(s)",
                "torchrun --nproc-per-node",
                f"start at most {count} rank(s) on this node, or use --device cpu",
            )
        torch.xpu.set_device(self.local_rank)

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        torch.xpu.synchronize(self.device)

    def memory(self) -> DeviceMemory:
        """Bytes in torch's allocator, now and at most, and of the device."""
        import torch

        total = torch.xpu.get_device_properties(self.device).total_memory
        return DeviceMemory(torch.xpu.memory_allocated(self.device), torch.xpu.max_memory_allocated(self.device), total)

    def reset_peak_memory(self) -> None:
        """The peak begins anew."""
        import torch

        torch.xpu.reset_peak_memory_stats(self.device)

    def device_name(self) -> str:
        """Product name."""
        import torch

        return torch.xpu.get_device_name(self.device)

    def empty_cache(self) -> None:
        """Return unused blocks to the driver."""
        import torch

        torch.xpu.empty_cache()

    def _seed_device(self, value: int) -> None:
        import torch

        torch.xpu.manual_seed(value)

    def _device_rng_state(self) -> Any:
        import torch

        return torch.xpu.get_rng_state(self.device)

    def _set_device_rng_state(self, state: Any) -> None:
        import torch

        torch.xpu.set_rng_state(state, self.device)

"""The device under the ranks: ``cuda``, ``npu`` or ``cpu``, and the named fixes for megatron-core."""

from __future__ import annotations

from megatron_telechat.backend.base import Backend, DeviceMemory, local_rank_of_environment
from megatron_telechat.errors import ConfigError

__all__ = ["BACKENDS", "Backend", "DeviceMemory", "get_backend"]

BACKENDS = ("auto", "cuda", "npu", "cpu")


def get_backend(name: str = "auto") -> Backend:
    """The backend of this name, on the device of LOCAL_RANK; call ``install()`` before megatron.core is used.

    Args:
        name: cuda, npu, cpu, or auto (the first of these that is present).

    Raises:
        ConfigError: unknown name.
    """
    from megatron_telechat.backend.cpu import CpuBackend
    from megatron_telechat.backend.cuda import CudaBackend
    from megatron_telechat.backend.npu import NpuBackend

    local_rank = local_rank_of_environment()
    if name == "auto":
        name = "cuda" if CudaBackend.present() else "npu" if NpuBackend.present() else "cpu"
    classes = {"cuda": CudaBackend, "npu": NpuBackend, "cpu": CpuBackend}
    if name not in classes:
        raise ConfigError(f"unknown device '{name}'", "--device", f"one of {', '.join(BACKENDS)}")
    return classes[name](local_rank)

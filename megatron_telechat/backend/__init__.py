"""The device under the ranks: ``cuda``, ``npu`` or ``cpu``, and the named fixes for megatron-core."""

from __future__ import annotations

from pkgutil import resolve_name

from megatron_telechat.backend.base import Backend, DeviceMemory, local_rank_of_environment, traits_of
from megatron_telechat.backend.core_patch import CorePatch
from megatron_telechat.device_kinds import DEVICE_CHOICES, DEVICE_KINDS
from megatron_telechat.errors import ConfigError

__all__ = ["Backend", "DeviceMemory", "get_backend", "traits_of"]


def get_backend(name: str = "auto") -> Backend:
    """The backend of this name, on the device of LOCAL_RANK; call ``install()`` before megatron.core is used.

    Args:
        name: a kind of device, or auto (the kind that this process already runs on, else the first that is present, in
            the order of `DEVICE_KINDS`).

    Raises:
        ConfigError: unknown name.
    """
    if name not in DEVICE_CHOICES:
        raise ConfigError(f"unknown device '{name}'", "--device", f"one of {', '.join(DEVICE_CHOICES)}")
    local_rank = local_rank_of_environment()
    taken = CorePatch.installed()
    if name == "auto" and taken is not None:  # a process has one kind of device: no second look may find another
        name = taken.backend
    kinds = DEVICE_KINDS if name == "auto" else (name,)
    classes: list[type[Backend]] = [resolve_name(DEVICE_KINDS[kind].backend) for kind in kinds]
    return next(cls for cls in classes if name != "auto" or cls.present())(local_rank)

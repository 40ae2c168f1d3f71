"""What every device offers to the rooms above."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from megatron_telechat.errors import ConfigError


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of the device of this rank, in bytes. On the CPU: of the process, and of the machine."""

    allocated_bytes: int
    peak_bytes: int
    total_bytes: int


class Backend(ABC):
    """The device under one rank. Construct through `get_backend`; nothing is touched before `install`."""

    name: str
    distributed_backend: str

    def __init__(self, local_rank: int):
        self.local_rank = local_rank

    @property
    @abstractmethod
    def device(self) -> Any:
        """torch.device of this rank."""

    @abstractmethod
    def _select_device(self) -> None:
        """Make `device` the current device, or say why it cannot be had."""

    def install(self) -> tuple[str, ...]:
        """Select the device and apply the named megatron-core fixes; before megatron.core is used. Idempotent.

        Returns:
            Names of the fixes applied.

        Raises:
            ResourceError: no device for this local rank.
            ConfigError: see `mcore_fixes.apply_fixes`.
        """
        from megatron_telechat.backend.mcore_fixes import apply_fixes

        self._select_device()
        return apply_fixes(self.name, self.device)

    def use_deterministic_algorithms(self) -> None:
        """From now on this process takes kernels that give the same bits in every run; before the first product.

        Nothing to do on the CPU, whose kernels all do.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done its work."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Memory in use now, at its peak, and in all."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Let the peak begin anew, where the device can."""

    @abstractmethod
    def device_name(self) -> str:
        """Product name of the device, for the log and the table of peak FLOP rates."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give cached device memory back to the system."""

    def seed(self, value: int) -> None:
        """Seed every generator of this process: python, numpy, torch on the CPU and on the device."""
        import numpy
        import torch

        random.seed(value)
        numpy.random.seed(value % 2**32)
        torch.default_generator.manual_seed(value)
        self._seed_device(value)

    def rng_state(self) -> dict[str, Any]:
        """State of every generator of this process, RNG tracker of megatron-core included.

        Plain python values and uint8 tensors on the CPU; `set_rng_state` takes it back.
        """
        import numpy
        import torch
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "device": self._device_rng_state(),
            "tracker": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()},
        }

    def can_restore(self, state: dict[str, Any]) -> bool:
        """Whether `set_rng_state` takes this state: those of the CPU and of an accelerator have nothing in common."""
        return (state["device"] is None) == (self._device_rng_state() is None)

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` gave on a device of this kind; tuples may come back as lists (JSON)."""
        import numpy
        import torch
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.asarray(keys, dtype=numpy.uint32), *rest))
        torch.set_rng_state(state["torch"])
        self._set_device_rng_state(state["device"])
        get_cuda_rng_tracker().set_states({name: saved.clone() for name, saved in state["tracker"].items()})

    def _seed_device(self, value: int) -> None:
        """Seed the device's own generator, where it has one."""

    def _device_rng_state(self) -> Any:
        return None

    def _set_device_rng_state(self, state: Any) -> None:
        pass


def local_rank_of_environment() -> int:
    """LOCAL_RANK as torchrun sets it; 0 without torchrun.

    Raises:
        ConfigError: not a number.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdigit():
        raise ConfigError(f"LOCAL_RANK is '{text}', not a number", "environment", "start the ranks with torchrun")
    return int(text)

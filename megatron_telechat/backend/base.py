"""What every device offers to the rooms above."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_telechat.backend.host_memory import HostMemory
from megatron_telechat.backend.lanes import Lane
from megatron_telechat.device_kinds import DEVICE_KINDS, DeviceTraits
from megatron_telechat.errors import ConfigError
from megatron_telechat.host import available_bytes

if TYPE_CHECKING:
    import torch
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of the device of this rank, in bytes. On the CPU: of the process, and of the machine."""

    allocated_bytes: int
    peak_bytes: int
    total_bytes: int


class Backend(ABC):
    """The device under one rank. Construct through `get_backend`; nothing is touched before `install`.

    Attributes:
        host_memory: what the rank keeps for its device in the memory of the host.
    """

    name: str
    distributed_backend: str

    def __init__(self, local_rank: int):
        self.local_rank = local_rank
        self.host_memory = HostMemory(self)

    @staticmethod
    @abstractmethod
    def present() -> bool:
        """Whether this machine has such a device; loads what is needed to find out, and touches no device."""

    @property
    def traits(self) -> DeviceTraits:
        """What is true of every device of this kind."""
        return DEVICE_KINDS[self.name]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """torch.device of this rank."""

    @property
    def widest_float(self) -> torch.dtype:
        """Type that sums of losses and tokens are taken in."""
        import torch

        return getattr(torch, self.traits.widest_float)

    @property
    def known_as(self) -> str:
        """What `costs.devices.device_spec` finds this device by: the name of its kind's file, or of the product."""
        return self.traits.device_file or self.device_name()

    def open_queues(self) -> None:  # noqa: B027 (most devices have nothing to open)
        """Let an exchange of the experts or of the attention run beside kernels. To be called before `install`; what
        the environment says is left as it is."""

    def limit_waits(self, timeout: timedelta) -> None:  # noqa: B027 (most libraries take it from the process group)
        """Let the communication library wait no longer for another rank than the process groups do. To be called before
        ranks are joined; what the environment says is left as it is."""

    def overlap_warning(self) -> str | None:
        """What in the environment makes exchanges wait for kernels that they should run beside, and the remedy; None
        where nothing does."""
        return None

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

    def process_group_options(self) -> dict[str, Any]:
        """Arguments of torch's init_process_group beside backend and timeout."""
        return {"device_id": self.device} if self.traits.binds_communicators else {}

    def use_deterministic_algorithms(self) -> None:  # noqa: B027 (nothing to do on the CPU)
        """From now on this process takes kernels that give the same bits in every run; before the first product.

        Nothing to do on the CPU: all of its kernels do.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done its work."""

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor of the host in memory that the device reads by itself, so that the host need not wait for
        an upload with ``non_blocking``; the tensor itself where the device has no such memory. Any thread may ask.

        torch's allocator of this memory notes each such upload, and gives the memory to nobody else before it is over:
        the tensor may be let go at once.
        """
        if not self.traits.pins_uploads:
            return tensor
        import torch

        with getattr(torch, self.name).device(self.device):  # a new thread begins on device 0
            return tensor.pin_memory()

    def pin(self, memory: torch.Tensor) -> None:  # noqa: B027 (most devices read any memory of the host alike)
        """Let the device copy from and to this memory of the host by itself, until `unpin`."""

    def unpin(self, memory: torch.Tensor) -> None:  # noqa: B027
        """Take `pin` back, before the memory is given back."""

    def lane(self, beside: bool) -> Lane:
        """A queue of the device for copies between it and `pin`ned memory.

        Args:
            beside: one of its own, beside the kernels; otherwise that of the kernels.
        """
        import torch

        return Lane(getattr(torch, self.name) if self.traits.pins_uploads else None, beside)

    def host_bytes_free(self) -> int:
        """Host memory that this process could still get."""
        return available_bytes()

    @contextmanager
    def copies_beside(self) -> Iterator[None]:
        """Copies from the device to the host that are queued inside run beside its kernels; leaving waits for them.

        Any thread may use it. What they read must be there: see `synchronize`.
        """
        if not self.traits.pins_uploads:
            yield
            return
        import torch

        module = getattr(torch, self.name)
        with module.device(self.device):  # a new thread begins on device 0
            stream = module.Stream()
            with module.stream(stream):
                yield
            stream.synchronize()

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

        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "device": self._device_rng_state(),
            "tracker": {name: state.clone() for name, state in _rng_tracker().get_states().items()},
        }

    def can_restore(self, state: dict[str, Any]) -> bool:
        """Whether `set_rng_state` takes this state: those of the CPU and of an accelerator have nothing in common."""
        return (state["device"] is None) == (self._device_rng_state() is None)

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Restore what `rng_state` gave on a device of this kind; tuples may come back as lists (JSON)."""
        import numpy
        import torch

        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.asarray(keys, dtype=numpy.uint32), *rest))
        torch.set_rng_state(state["torch"])
        self._set_device_rng_state(state["device"])
        _rng_tracker().set_states({name: saved.clone() for name, saved in state["tracker"].items()})

    def _seed_device(self, value: int) -> None:  # noqa: B027 (the CPU has no generator of its own)
        """Seed the device's own generator, where it has one."""

    def _device_rng_state(self) -> Any:
        return None

    def _set_device_rng_state(self, state: Any) -> None:  # noqa: B027
        """Restore the device's own generator, where it has one."""


def traits_of(device: torch.device) -> DeviceTraits:
    """What is true of every device of this one's kind, for code that has a tensor in its hands and no backend."""
    return DEVICE_KINDS[device.type]


def _rng_tracker() -> CudaRNGStatesTracker:
    """megatron-core's tracker of generator states, made on first use."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "get_cuda_rng_tracker makes one"
    return tracker


def local_rank_of_environment() -> int:
    """LOCAL_RANK as torchrun sets it; 0 without torchrun.

    Raises:
        ConfigError: not a number.
    """
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdigit():
        raise ConfigError(f"LOCAL_RANK is '{text}', not a number", "environment", "start the ranks with torchrun")
    return int(text)

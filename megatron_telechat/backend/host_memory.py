"""Memory of the host that a rank keeps for its device, and a ledger of it.

On the CPU host and device are one memory; the ledger tells what lies there in the place of a host.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from megatron_telechat.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from megatron_telechat.backend.base import Backend


class HostBlock:
    """Memory of the host that the device copies from and to by itself. It is given back with the last reference to it.

    Attributes:
        memory: uint8, zeros at first.
    """

    def __init__(self, backend: Backend, memory: torch.Tensor):
        self.memory = memory
        backend.pin(memory)
        # The memory must be there until it is unpinned, so the finalizer holds it; at the end of the process the driver
        # does all of that.
        weakref.finalize(self, backend.unpin, memory).atexit = False


class HostMemory:
    """The ledger of one rank.

    Args:
        backend: its device.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        self._blocks: weakref.WeakSet[HostBlock] = weakref.WeakSet()

    def take(self, nbytes: int, purpose: str) -> HostBlock:
        """So many bytes, filled with zeros.

        Args:
            purpose: what for, such as "optimizer state".

        Raises:
            ResourceError: the system has not that much.
        """
        import torch

        try:
            memory = torch.zeros(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise ResourceError(
                f"no {nbytes / 2**30:.2f} GiB of host memory for {purpose}: {error}",
                "the memory of this node",
                "fewer ranks on the node, or more memory",
            ) from error
        block = HostBlock(self._backend, memory)
        self._blocks.add(block)
        return block

    @property
    def nbytes(self) -> int:
        """Bytes that the rank holds."""
        return sum(block.memory.nbytes for block in self._blocks)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        storage = tensor.untyped_storage()._cdata
        return any(block.memory.untyped_storage()._cdata == storage for block in self._blocks)

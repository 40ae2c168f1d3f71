"""Ranks on the CPU, talking over gloo."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.backend.base import Backend, DeviceMemory

if TYPE_CHECKING:
    import torch


class CpuBackend(Backend):
    """The processor of this machine, whose cores its ranks share."""

    name = "cpu"
    distributed_backend = "gloo"

    @staticmethod
    def present() -> bool:
        """True: every machine has one."""
        return True

    @property
    def device(self) -> torch.device:
        """``cpu`` without a number, the same for all ranks of a machine."""
        import torch

        return torch.device("cpu")

    def _select_device(self) -> None:
        """Share the cores among the ranks of this machine, unless OMP_NUM_THREADS says otherwise.

        torch starts a thread for every core in every rank; the threads that wait spin, and the collectives of
        tensor-parallel ranks then take ten times as long (docs/performance.md).
        """
        import torch

        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))

    def synchronize(self) -> None:
        """Nothing to wait for: work on the CPU is done when the call returns."""
        pass

    def memory(self) -> DeviceMemory:
        """Resident bytes of the process, now and at most since its start (getrusage), and the machine's memory."""
        import psutil

        allocated = psutil.Process().memory_info().rss
        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 if platform.system() == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return DeviceMemory(allocated, max(allocated, peak), psutil.virtual_memory().total)

    def reset_peak_memory(self) -> None:
        """Does nothing: the peak that getrusage gives is counted from the start of the process."""
        pass

    def device_name(self) -> str:
        """``model name`` of /proc/cpuinfo; where there is no such line (macOS, ARM), what ``platform`` says."""
        info = Path("/proc/cpuinfo")
        if info.exists():
            for line in info.read_text(errors="replace").splitlines():
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
        return platform.processor() or platform.machine()

    def empty_cache(self) -> None:
        """Does nothing: torch has no cache of freed memory on the CPU."""
        pass

"""What is known of the devices: peak compute, memory, links. One YAML file a device, each figure with its source."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Mapping, Optional

import yaml

_FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device. What is not known is None, or absent from `peak_tflops`."""

    name: str
    description: str = ""
    device_names: tuple[str, ...] = ()
    """Names that torch reports for it."""
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    """Dense peak in TFLOP/s by precision: bf16, fp16, fp32."""
    memory_gib: Optional[float] = None
    """Memory a process can use, in GiB."""
    hbm_bandwidth_gb_s: Optional[float] = None
    """Device memory bandwidth, 1e9 bytes a second."""
    intra_node_bandwidth_gb_s: Optional[float] = None
    """Bandwidth to the other devices of the node, in one direction."""
    inter_node_bandwidth_gb_s: Optional[float] = None
    """Bandwidth to other nodes for each device, in one direction."""

    def peak(self, precision: str) -> Optional[float]:
        """Dense peak TFLOP/s at this precision; None where it is not known."""
        return self.peak_tflops.get(precision)


def device_spec_names() -> list[str]:
    """Names of the device files that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def _read(path: Path) -> tuple[DeviceSpec, dict[str, dict[str, float]]]:
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    variants = entries.pop("variants", {})
    entries["device_names"] = tuple(entries["device_names"])
    return DeviceSpec(**entries), variants


def device_spec(name: str) -> Optional[DeviceSpec]:
    """The device with this file name (``h100-80g``) or torch device name (``NVIDIA H100 80GB HBM3``); None if unknown.

    A torch name is matched whole, without regard to case; parts that share a chip but not a speed
    (H100 PCIe, H20) are other devices and do not match.
    """
    wanted = name.strip().lower()
    for stem in device_spec_names():
        spec, variants = _read(_FOLDER / f"{stem}.yaml")
        if wanted == stem or wanted in (known.lower() for known in spec.device_names):
            return spec
        for variant, peak in variants.items():
            if wanted == variant.lower():
                return replace(spec, description=f"{spec.description} [{variant}]", peak_tflops=peak)
    return None

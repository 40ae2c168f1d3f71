"""What is known of the devices: peak compute, memory, links. One YAML file a device, each figure with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_telechat.device_kinds import DEVICE_KINDS, HOST
from megatron_telechat.errors import ConfigError

_FOLDER = Path(__file__).parent / "devices"


EFFICIENCIES = (
    *("gemm", "grouped_gemm", "fp8_gemm", "attention", "attention_flash2", "attention_flash2_ordered"),
    *("hbm", "link", "link_between_nodes", "stack"),
)


@dataclass(frozen=True)
class Measured:
    """Times of the parts of a model on a device, medians in seconds.

    Attributes:
        conditions: what the times depend on; `costs.time.conditions` of a run they hold for equals it.
        layers: for each kind of layer (dense, moe): forward, backward, and extra.MODES: what recompute adds.
        embedding, output_layer: forward and backward.
        p2p: one micro-batch's hidden states to the next stage.
        optimizer_per_parameter: of an optimizer step, for each parameter of a rank.
        step: the rest of an iteration, whatever its size.
        alone: time of a micro-batch while the other ranks of the node wait, over its time beside them; 1: the same.
        jitter: standard deviation of an op over its mean, beside what all ranks share.
        gradient_gb_s: what a rank passes on while gradients are reduced within a node, 1e9 bytes a second, as a ring
            counts them; None: no rank that was measured shared its parameters.
        source: when, where and how they were taken.
    """

    conditions: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, float]]
    embedding: Mapping[str, float]
    output_layer: Mapping[str, float]
    p2p: float
    optimizer_per_parameter: float
    step: float = 0.0
    alone: float = 1.0
    jitter: float = 0.0
    gradient_gb_s: float | None = None
    source: str = ""


@dataclass(frozen=True)
class DeviceSpec:
    """One kind of device. What is not known is None, or absent from `peak_tflops`."""

    name: str
    kind: str = ""
    """Kind of device (`device_kinds`); empty where the file does not say."""
    description: str = ""
    device_names: tuple[str, ...] = ()
    """Names that torch reports for it."""
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    """Dense peak in TFLOP/s by precision: bf16, fp16, fp32."""
    memory_gib: float | None = None
    """Memory a process can use, in GiB."""
    hbm_bandwidth_gb_s: float | None = None
    """Device memory bandwidth, 1e9 bytes a second."""
    intra_node_bandwidth_gb_s: float | None = None
    """Bandwidth to the other devices of the node, in one direction."""
    inter_node_bandwidth_gb_s: float | None = None
    """Bandwidth to other nodes for each device, in one direction."""
    host_bandwidth_gb_s: float | None = None
    """What large copies between the device and pinned memory of its host reach, in one direction."""
    error: float = 0.3
    """Share of a prediction within which nine in ten runs lie that were held against it."""
    node_devices: int | None = None
    """Devices that the links inside a node join, where they are more than the usual eight."""
    efficiency: Mapping[str, float] = field(default_factory=dict)
    """Share that real work reaches. Of peak_tflops: gemm, grouped_gemm, fp8_gemm, attention (attention_flash2: with
    FlashAttention-2, attention_flash2_ordered: its backward in a fixed order). Of the bandwidths: hbm, link,
    link_between_nodes. Of all of it: stack, which a program's throughput fits (`--calibrate --from`)."""
    gemm_edge: float = 0.0
    """Elements by which a product of c columns and depth d is longer: 1 + gemm_edge (1/c + 1/d) times."""
    gemm_start_s: float = 0.0
    """Seconds of one product apart from its size."""
    collective_latency_s: float = 0.0
    """Seconds of one collective or message apart from its bytes."""
    measured: tuple[Measured, ...] = ()
    """Times taken on such a device, each for the shapes of one run; they come before every other figure."""

    def peak(self, precision: str) -> float | None:
        """Dense peak TFLOP/s at this precision; None where it is not known."""
        return self.peak_tflops.get(precision)


def device_spec_names() -> list[str]:
    """Names of the device files that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def _read(path: Path) -> tuple[DeviceSpec, dict[str, dict[str, float]]]:
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    variants = entries.pop("variants", {})
    entries["device_names"] = tuple(entries["device_names"])
    entries["measured"] = tuple(Measured(**entry) for entry in entries.get("measured") or ())
    return DeviceSpec(**entries), variants


def read_device_file(path: Path) -> DeviceSpec:
    """A device file of one's own, such as `write_device_file` makes.

    Raises:
        ConfigError: no such file, or not a device file; says which key is wrong.
    """
    try:
        return _checked(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read the device file: {error.strerror}", str(path), _FILE_HELP) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the device file is not YAML: {error}", str(path), _FILE_HELP) from None


_FILE_HELP = f"a file as those in costs/devices/, or one of {', '.join(sorted(p.stem for p in _FOLDER.glob('*.yaml')))}"


def _checked(entries: Any, where: str) -> DeviceSpec:
    if not isinstance(entries, dict) or not isinstance(entries.get("name"), str):
        raise ConfigError("the device file has no name", where, _FILE_HELP)
    entries = {key: value for key, value in entries.items() if value is not None}
    entries["kind"] = entries.get("kind") or _kind_by_name(entries["name"])
    entries.pop("variants", None)
    if entries["kind"] and entries["kind"] not in DEVICE_KINDS:
        raise ConfigError(f"kind: {entries['kind']!r} is no kind of device", where, f"one of {', '.join(DEVICE_KINDS)}")
    unknown = sorted(set(entries) - {item.name for item in fields(DeviceSpec)})
    unknown += [f"efficiency.{key}" for key in entries.get("efficiency") or {} if key not in EFFICIENCIES]
    if unknown:
        raise ConfigError(f"the device file has unknown keys: {', '.join(unknown)}", where, _FILE_HELP)
    for key in ("peak_tflops", "efficiency"):
        entries[key] = entries.get(key) or {}
        _check_numbers(entries[key], key, where)
    single = ("memory_gib", "hbm_bandwidth_gb_s", "intra_node_bandwidth_gb_s", "inter_node_bandwidth_gb_s")
    single += ("host_bandwidth_gb_s",)
    may_be_0 = ("error", "gemm_edge", "gemm_start_s", "collective_latency_s")
    given = {key: entries[key] for key in (*single, "node_devices", *may_be_0) if key in entries}
    _check_numbers({key: value for key, value in given.items() if key not in may_be_0 or value != 0}, "", where)
    entries["device_names"] = tuple(entries.get("device_names") or ())
    try:
        entries["measured"] = tuple(Measured(**entry) for entry in entries.get("measured") or ())
    except TypeError as error:
        raise ConfigError(f"an entry of measured is damaged: {error}", where, "calibrate again") from None
    return DeviceSpec(**entries)


def _kind_by_name(name: str) -> str:
    """Of files that were written before they told their kind: cpu, and cpu-..., are CPUs."""
    kind, _, _ = name.partition("-")
    return kind if kind == HOST else ""


def _check_numbers(values: Any, name: str, where: str) -> None:
    bad = values if not isinstance(values, dict) else {
        key: value for key, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf")
    }  # fmt: skip
    if bad:
        raise ConfigError(f"{name or 'the device file'}: {bad!r} is not above 0", where, "a finite number above 0")


def write_device_file(path: Path, spec: DeviceSpec) -> None:
    """Write a device with its measured entries; `read_device_file` reads it."""
    entries = asdict(spec)
    entries["device_names"] = list(spec.device_names)
    entries["measured"] = [asdict(entry) for entry in spec.measured]
    path.write_text(yaml.safe_dump(_plain(entries), sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Mappings and tuples as dicts and lists, which YAML's safe form takes."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def device_spec(name: str) -> DeviceSpec | None:
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

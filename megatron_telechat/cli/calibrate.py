"""--calibrate of plan_pipeline: measures the device at hand and writes its device file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.plan_request import Request, on_device
from megatron_telechat.cli.text import table
from megatron_telechat.costs.devices import (
    DeviceSpec,
    Measured,
    device_spec,
    device_spec_names,
    read_device_file,
    write_device_file,
)
from megatron_telechat.errors import EXIT_OK, ConfigError, ResourceError

if TYPE_CHECKING:
    from megatron_telechat.backend import Backend


def calibrate_door(request: Request) -> int:
    """Measure this run's layers on all ranks at hand; rank 0 writes the file.

    An entry for the same shapes is replaced, others stay: one file serves several runs.

    Raises:
        ConfigError: the ranks do not hold one stage of the run; FP8 was asked for.
        ResourceError: the file cannot be written.
    """
    import torch.distributed as dist

    from megatron_telechat.backend import get_backend
    from megatron_telechat.training.calibrate import calibrate

    options = request.options
    run = request.load().run
    if run.training.fp8_format is not None:
        raise ConfigError("calibration measures bf16 products, not FP8", "fp8_format", "drop --fp8-format")
    named = None if options.device is None else _named(options.device)
    if named is not None:
        run = on_device(run, named)
    output, backend = Path(options.output), get_backend(run.training.device)
    device = calibrate(run, request.kinds, named or _base(output, backend), options.rounds)
    try:
        if os.environ.get("RANK", "0") == "0":
            write_file(output, device)
            print("\n".join(_summary(device, output, backend.traits.ranks_share_cores)), flush=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return EXIT_OK


def _named(name: str) -> DeviceSpec:
    """The device that a person names, to which the measured times are added."""
    spec = read_device_file(Path(name)) if Path(name).is_file() else device_spec(name)
    if spec is None:
        raise ConfigError(
            f"unknown device {name!r}", "--device", f"one of {', '.join(device_spec_names())}, or a device file"
        )
    return spec


def _base(output: Path, backend: Backend) -> DeviceSpec:
    """Where nobody names a device: the file written before, the one known for the device at hand, or a new one."""
    if output.is_file():
        return read_device_file(output)
    name = backend.device_name()
    return device_spec(backend.known_as) or DeviceSpec(name, kind=backend.name, device_names=(name,))


def write_file(path: Path, device: DeviceSpec) -> None:
    """Write a device file whole, or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_device_file(part, device)
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}", "--output", "name a file you may write") from None


def _summary(device: DeviceSpec, path: Path, ranks_share_cores: bool) -> list[str]:
    """What was measured last, in milliseconds."""
    entry: Measured = device.measured[-1]
    rows = [["part", "forward ms", "backward ms", "recompute adds ms"]]
    for kind, times in entry.layers.items():
        extra = [f"{key[6:]} {value * 1e3:.3g}" for key, value in times.items() if key.startswith("extra.")]
        rows.append(
            [f"{kind} layer", f"{times['forward'] * 1e3:.4g}", f"{times['backward'] * 1e3:.4g}", ", ".join(extra)]
        )
    for part, times in (("embedding", entry.embedding), ("output layer", entry.output_layer)):
        rows.append([part, f"{times['forward'] * 1e3:.4g}", f"{times['backward'] * 1e3:.4g}", ""])
    lines = [f"{device.name}: {entry.source}", *table(rows, left=(0, 3))]
    lines.append(
        f"message {entry.p2p * 1e3:.3g} ms, optimizer {entry.optimizer_per_parameter * 1e9:.3g} ns a parameter"
    )
    if entry.gradient_gb_s is not None:
        lines.append(f"gradients are reduced at {entry.gradient_gb_s:.3g} GB/s a rank")
    if entry.alone < 1 or entry.jitter:
        lines.append(
            f"with the other ranks idle an op takes {entry.alone:.2f} of its time under load; op times vary by "
            f"{entry.jitter:.0%}"
        )
    ranks, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.cpu_count() or 1
    if ranks_share_cores and ranks > cores:
        lines.append(
            f"! {ranks} ranks share {cores} cores: a waiting stage frees its core for another, so "
            f"predicted times are rough"
        )
    return [*lines, f"written: {path}  (plan with --device {path})"]

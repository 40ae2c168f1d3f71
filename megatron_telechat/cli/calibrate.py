"""--calibrate of plan_pipeline: measures the device at hand and writes its device file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_telechat.backend import Backend, get_backend
from megatron_telechat.cli.plan_request import Request
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
from megatron_telechat.training.calibrate import calibrate


def calibrate_door(request: Request) -> int:
    """Measure this run's layers on all ranks at hand; rank 0 writes the file.

    An entry for the same shapes is replaced, others stay: one file serves several runs.

    Raises:
        ConfigError: the ranks do not hold one stage of the run.
        ResourceError: the file cannot be written.
    """
    options = request.options
    run = request.load().run
    if options.device == "cpu":
        run = replace(run, training=replace(run.training, device="cpu"))
    output, backend = Path(options.output), get_backend(run.training.device)
    device = calibrate(run, request.kinds, _base(options.device, output, backend), options.rounds)
    try:
        if os.environ.get("RANK", "0") == "0":
            _write(output, device)
            print("\n".join(_summary(device.measured[-1], device.name, output)), flush=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return EXIT_OK


def _base(name: str | None, output: Path, backend: Backend) -> DeviceSpec:
    """The device file to add to: the one named, the one written before, the one known for this device, or a new one."""
    if name is not None:
        spec = read_device_file(Path(name)) if Path(name).is_file() else device_spec(name)
        if spec is None:
            raise ConfigError(
                f"unknown device {name!r}", "--device", f"one of {', '.join(device_spec_names())}, or a device file"
            )
        return spec
    if output.is_file():
        return read_device_file(output)
    known = device_spec("cpu" if backend.name == "cpu" else backend.device_name())
    return known or DeviceSpec(backend.device_name(), device_names=(backend.device_name(),))


def _write(path: Path, device: DeviceSpec) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_device_file(part, device)
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}", "--output", "name a file you may write") from None


def _summary(entry: Measured, name: str, path: Path) -> list[str]:
    """What was measured, in milliseconds."""
    rows = [["part", "forward ms", "backward ms", "recompute adds ms"]]
    for kind, times in entry.layers.items():
        extra = [f"{key[6:]} {value * 1e3:.3g}" for key, value in times.items() if key.startswith("extra.")]
        rows.append(
            [f"{kind} layer", f"{times['forward'] * 1e3:.4g}", f"{times['backward'] * 1e3:.4g}", ", ".join(extra)]
        )
    for part, times in (("embedding", entry.embedding), ("output layer", entry.output_layer)):
        rows.append([part, f"{times['forward'] * 1e3:.4g}", f"{times['backward'] * 1e3:.4g}", ""])
    lines = [f"{name}: {entry.source}", *table(rows, left=(0, 3))]
    lines.append(
        f"message {entry.p2p * 1e3:.3g} ms, optimizer {entry.optimizer_per_parameter * 1e9:.3g} ns a parameter"
    )
    if entry.alone < 1 or entry.jitter:
        lines.append(
            f"with the other ranks idle an op takes {entry.alone:.2f} of its time under load; op times vary by "
            f"{entry.jitter:.0%}"
        )
    ranks, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.cpu_count() or 1
    if name == "cpu" and ranks > cores:
        lines.append(
            f"! {ranks} ranks share {cores} cores: a waiting stage frees its core for another, so "
            f"predicted times are rough"
        )
    return [*lines, f"written: {path}  (plan with --device {path})"]

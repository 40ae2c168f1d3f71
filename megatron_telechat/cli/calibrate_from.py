"""--calibrate --from of plan_pipeline: one known throughput fits the factor of a program, without measuring."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.calibrate import write_file
from megatron_telechat.cli.plan_request import Request, read_device, software_of
from megatron_telechat.config.loader import LoadedConfig, load_run_config
from megatron_telechat.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from megatron_telechat.config.schema import RunConfig

WARM_UP = 3
"""Records of a run folder that are passed over: allocator, kernels and links are not warm."""
FARTHEST = 8.0
"""A factor beyond this, up or down, is a wrong unit rather than a program."""
UNIT = "tokens a second and device"


def calibrate_from_door(request: Request) -> int:
    """Write a device file whose `efficiency.stack` makes this run's prediction the throughput that was seen.

    Raises:
        ConfigError: no device; a number that is no throughput, or a run folder without steps; times of the device were
            measured for these shapes.
        ResourceError: the file cannot be written.
    """
    from megatron_telechat.planner.predict import predict

    options = request.options
    loaded = _loaded(request)
    device, run = read_device(options.device, loaded.run)
    software, _ = software_of(loaded, run)
    seen = _throughput(options.from_, run)
    bare = replace(device, efficiency={key: value for key, value in device.efficiency.items() if key != "stack"})
    prediction = predict(run, bare, software)
    if prediction.constant or any(dict(entry.conditions) == _conditions(run) for entry in device.measured):
        raise ConfigError(
            f"{device.name} holds times that were measured for these shapes; a factor would not change them",
            "--from",
            "calibrate again on the ranks (--calibrate without --from), or name a device file without them",
        )
    factor = seen / prediction.tokens_per_s_per_device
    if not 1 / FARTHEST < factor < FARTHEST:
        raise ConfigError(
            f"{seen:,.0f} {UNIT} is {factor:.3g} times the prediction of {prediction.tokens_per_s_per_device:,.0f}",
            "--from",
            f"the number of {UNIT}, not of the whole machine, and the flags of the run that reached it",
        )
    where = f"one run of {run.parallel.world_size} ranks at {seen:,.0f} {UNIT}"
    fitted = replace(
        bare,
        description=f"{device.description}; stack fitted to {where}",
        efficiency={**bare.efficiency, "stack": round(factor, 4)},
    )
    write_file(Path(options.output), fitted)
    print(
        f"{device.name}: predicted {prediction.tokens_per_s_per_device:,.0f}, seen {seen:,.0f} {UNIT}: "
        f"efficiency.stack {factor:.3f}\nwritten: {options.output}  (plan with --device {options.output})"
    )
    return EXIT_OK


def _conditions(run: RunConfig) -> dict:
    from megatron_telechat.costs.conditions import conditions

    return conditions(run)


def _loaded(request: Request) -> LoadedConfig:
    """The run with its own layout: of the command line, else of the folder that --from names."""
    words = list(request.words)
    config = Path(request.options.from_) / "config.yaml"
    if not words and config.is_file():
        words = ["--config", str(config)]
    return load_run_config([*words, "--dry-run"], {}, described=True, stage=request.options.stage)


def _throughput(text: str, run: RunConfig) -> float:
    """Tokens a second and device: a number, or the median of a run folder."""
    if Path(text).exists():
        from megatron_telechat.training.metrics_file import read_metrics

        _, values = read_metrics(Path(text)).series("tokens_per_s")
        values = values[WARM_UP:] or values
        if not values:
            raise ConfigError(f"{text} holds no throughput", "--from", "a run folder with logged steps")
        return statistics.median(values) / max(run.parallel.world_size, 1)
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise ConfigError(f"{text!r} is neither a run folder nor a throughput", "--from", f"a folder, or {UNIT}")
    return value

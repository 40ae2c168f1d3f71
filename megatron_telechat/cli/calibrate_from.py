"""--calibrate --from of plan_pipeline, without measuring: one known throughput fits the factor of a program, the logged
steps of a run fit the times of its parts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_telechat.cli.calibrate import write_file
from megatron_telechat.cli.plan_request import Request, on_device, read_device, software_of
from megatron_telechat.config.loader import LoadedConfig, load_run_config
from megatron_telechat.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from megatron_telechat.config.schema import RunConfig
    from megatron_telechat.costs.devices import DeviceSpec
    from megatron_telechat.costs.time import Software
    from megatron_telechat.planner.from_run import SeenRun

WARM_UP = 3
"""Records of a run folder that are passed over: allocator, kernels and links are not warm."""
LEAST = 5
"""Records that fit the times of parts."""
FARTHEST = 8.0
"""A factor beyond this, up or down, is a wrong unit rather than a program."""
UNIT = "tokens a second and device"


def calibrate_from_door(request: Request) -> int:
    """Write a device file with which this run's prediction is what was seen: with the times of a run's parts where
    enough logged steps of a run of ours are there, else with an `efficiency.stack`.

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
    logged = seen_run(options.from_)
    if logged is not None:
        fitted, lines = fit_device(run, device, logged, software)
        write_file(Path(options.output), fitted)
        print("\n".join([*lines, f"written: {options.output}  (plan with --device {options.output})"]))
        return EXIT_OK
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


def device_of_run(request: Request, device: DeviceSpec) -> tuple[DeviceSpec, tuple[str, ...]]:
    """The device with the times of the run whose folder --from names, and what to say of it.

    Raises ConfigError where the folder has no configuration or too few logged steps; as `fit_to_run`.
    """
    folder = request.options.from_
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{folder} holds no config.yaml", "--from", "the folder of a run of ours")
    logged = seen_run(folder)
    if logged is None:
        raise ConfigError(
            f"{folder} has fewer than {WARM_UP + LEAST} logged steps of one configuration",
            "--from",
            "wait for more, or log more often (--log-interval); --calibrate --from fits one factor to fewer",
        )
    loaded = _load(request, ["--config", str(config)])
    run = on_device(loaded.run, device)
    return fit_device(run, device, logged, software_of(loaded, run)[0])


def seen_run(folder: str) -> SeenRun | None:
    """What a run folder says of its steps: medians behind the last resume and the first records; None where it is no
    run folder, or too few steps were logged with the compute of their stages.

    Raises DataError for a damaged metrics file.
    """
    from megatron_telechat.planner.from_run import SeenRun
    from megatron_telechat.training.metrics_file import read_metrics

    if not Path(folder).exists():
        return None
    records = [record for record in read_metrics(Path(folder)).settled() if "stage_compute_s" in record][WARM_UP:]
    if len(records) < LEAST:
        return None
    stages = zip(*(record["stage_compute_s"] for record in records), strict=True)
    return SeenRun(
        statistics.median(record["iteration_time_s"] for record in records),
        tuple(statistics.median(of_stage) for of_stage in stages),
        f"{len(records)} records of {folder}",
    )


def fit_device(
    run: RunConfig, device: DeviceSpec, seen: SeenRun, software: Software
) -> tuple[DeviceSpec, tuple[str, ...]]:
    """The device with the times of a run's parts, and what to say of it. Raises ConfigError as `fit_to_run`."""
    from megatron_telechat.planner.from_run import fit_to_run

    fitted = fit_to_run(run, device, seen, software)
    entry = fitted.device.measured[0]
    return fitted.device, (
        f"{seen.source}: {seen.iteration_s:.4g} s a step; pipeline ranks computed "
        + ", ".join(f"{seconds:.4g}" for seconds in seen.stage_compute_s)
        + " s of it",
        f"{device.name}: a layer takes {fitted.layers:.3f} times as long as the file says, embedding and output layer "
        f"{fitted.ends:.3f} times",
        f"a step by these times {fitted.schedule_s:.4g} s; with ops that vary by {entry.jitter:.0%} and a rest of "
        f"{entry.step * 1e3:.3g} ms {fitted.predicted_s:.4g} s",
    )


def _conditions(run: RunConfig) -> dict:
    from megatron_telechat.costs.conditions import conditions

    return conditions(run)


def _loaded(request: Request) -> LoadedConfig:
    """The run with its own layout: of the command line, else of the folder that --from names."""
    words = list(request.words)
    config = Path(request.options.from_) / "config.yaml"
    if not words and config.is_file():
        words = ["--config", str(config)]
    return _load(request, words)


def _load(request: Request, words: Sequence[str]) -> LoadedConfig:
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

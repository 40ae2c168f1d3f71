"""What a model costs on a device under a layout: the stable door of the cost model for other programs.

    from megatron_telechat.planner.estimate import estimate
    answer = estimate(ModelConfig(...), ParallelConfig(...), TrainingConfig(...), device_spec("h100-80g"))
    answer.step_s, answer.slowest_s, answer.memory_bytes, answer.fits

Nothing is planned and no rule of the training is asked: a layout that our training refuses is estimated too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_telechat.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.costs.devices import DeviceSpec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.costs.software import Software
from megatron_telechat.errors import ConfigError
from megatron_telechat.planner.predict import Prediction, predict

CONTEXT_GIB = 0.7
"""Memory that the device's context takes. A plan leaves more free (`planner.build.RESERVE_GIB`): this answers whether a
run would go, not whether it would be wise."""


@dataclass(frozen=True)
class Estimate:
    """The answer.

    Attributes:
        step_s: seconds of an iteration.
        error: nine in ten runs like this one lie within this share of the prediction (`planner.predict.error_bar`).
        tokens_per_s: tokens a second and device.
        memory_bytes: of the fullest rank, without what the device keeps for itself.
        usable_bytes: of a device, without its context; None where its file names no memory.
        prediction: the parts of `step_s`.
    """

    step_s: float
    error: float
    tokens_per_s: float
    memory_bytes: float
    usable_bytes: float | None
    prediction: Prediction

    @property
    def fastest_s(self) -> float:
        """Seconds of an iteration at the lower end of the error bar."""
        return self.step_s * (1 - self.error)

    @property
    def slowest_s(self) -> float:
        """Seconds of an iteration at the upper end of the error bar."""
        return self.step_s * (1 + self.error)

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits into a device; None where that is not known."""
        return None if self.usable_bytes is None else self.memory_bytes <= self.usable_bytes


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    device: DeviceSpec,
    software: Software | None = None,
) -> Estimate:
    """Seconds of a step, memory, and how far to trust them.

    Args:
        model: layers, widths, vocabulary; also models that our training does not build.
        parallel: ranks, parallel sizes, and whether exchanges overlap.
        training: length, batch, precision, recompute.
        device: `costs.devices.device_spec`, or a device file.
        software: what the program does beyond that; unset: the fastest kernels, no overlap but that of `parallel`.

    Raises:
        ConfigError: the sizes do not divide ranks, batch or layers; nothing is known of the device at this precision.
    """
    run = RunConfig(model=model, parallel=parallel, training=replace(training, device=device.kind or training.device))
    software = software or Software()
    _check(run)
    prediction = predict(run, device, software)
    memory = max(stage.device_bytes for stage in stage_memory(run, software.moe_imbalance, software))
    usable = (device.memory_gib - CONTEXT_GIB) * 2**30 if device.memory_gib else None
    return Estimate(
        step_s=prediction.iteration,
        error=prediction.error,
        tokens_per_s=prediction.tokens_per_s_per_device,
        memory_bytes=memory,
        usable_bytes=usable,
        prediction=prediction,
    )


def _check(run: RunConfig) -> None:
    parallel, training = run.parallel, run.training
    shared = (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )
    if parallel.world_size % shared:
        raise ConfigError(
            f"TP x CP x PP = {shared} does not divide {parallel.world_size} ranks", "layout", "sizes that divide it"
        )
    if training.global_batch_size % (training.micro_batch_size * parallel.data_parallel_size):
        raise ConfigError(
            f"a global batch of {training.global_batch_size} is no whole number of micro-batches of "
            f"{training.micro_batch_size} on {parallel.data_parallel_size} data-parallel ranks",
            "layout",
            "a multiple of them",
        )

"""What a run is: typed schema, presets, Megatron flag names, and every rule a configuration must keep."""

from __future__ import annotations

from megatron_telechat.config.flags import Actions
from megatron_telechat.config.loader import LoadedConfig, load_run_config
from megatron_telechat.config.schema import (
    AverageConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "Actions",
    "AverageConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoadedConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "load_run_config",
]

"""Plan files: what tools/plan_pipeline.py --output writes and --plan reads.

A JSON object: ``sets`` (fields of the run, as flags would give them), ``made_for`` (what the run must have in common
with the planned one), ``predicted`` (what the cost model expects), and for people ``flags`` and ``proof``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_telechat.config.fields import fields_by_name, values_of
from megatron_telechat.config.layout import parse_stages
from megatron_telechat.config.schema import PLANNED_ONLY, RunConfig
from megatron_telechat.errors import ConfigError

FORMAT = "megatron_telechat plan 1"
SETS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
    "cp_keep_received",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "micro_batch_size",
    "num_virtual_stages_per_pipeline_rank",
    "microbatch_group_size_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_layout",
)
"""Fields that a plan may set; the expert sizes only where the model has experts."""
MADE_FOR = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "seq_length",
    "precision",
)
"""Fields that must be as they were: another value is another problem with another solution; beside these, what the
training does not build, where it is not the default."""
PREDICTED_FOR = ("world_size", "global_batch_size")
"""Fields on which the predictions depend, though the plan can be run without them."""
_FIX = "write one with tools/plan_pipeline.py --output FILE, or --plan none"


@dataclass(frozen=True)
class Predicted:
    """What the cost model expects of a plan: seconds of a step, GiB of one rank of each stage (no reserve counted)."""

    device: str
    iteration_s: float
    memory_gib: tuple[float, ...]
    tokens_per_s_per_device: float


@dataclass(frozen=True)
class PlanFile:
    """A plan, read.

    Attributes:
        path: where it was read, or will be written.
        sets: field name → value (None unsets).
        made_for: field name → value the run must have.
        predicted_for: world_size, global_batch_size of the prediction.
        predicted: None where no device was named.
        about: flags and proof, for people.
    """

    path: str
    sets: Mapping[str, Any]
    made_for: Mapping[str, Any]
    predicted_for: Mapping[str, Any]
    predicted: Predicted | None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Origin of its values in ``--print-config`` and in errors."""
        return f"plan {self.path}"

    def differences(self, run: RunConfig) -> list[str]:
        """How this run differs from the one that was planned, such as ``hidden_size=128, this run 4096``."""
        values = values_of(run)
        made_for = {**{name: fields_by_name()[name].default for name in PLANNED_ONLY}, **self.made_for}
        own = [name for name in self.sets if name.endswith("_size") and self.sets[name] != values[name]]
        return [f"{name}={self.sets[name]}, this run {values[name]}" for name in own] + [
            f"{name}={value}, this run {values[name]}" for name, value in made_for.items() if values[name] != value
        ]

    def prediction_for(self, run: RunConfig) -> Predicted | None:
        """The prediction, if it holds for this run's number of ranks and batch."""
        values = values_of(run)
        return self.predicted if all(values[name] == value for name, value in self.predicted_for.items()) else None

    def to_json(self) -> dict[str, Any]:
        """The content of a plan file; ``PlanFile`` reads it back unchanged."""
        out: dict[str, Any] = {"format": FORMAT, "sets": dict(self.sets), "made_for": dict(self.made_for)}
        out["predicted_for"] = dict(self.predicted_for)
        out["predicted"] = None if self.predicted is None else {**vars(self.predicted)}
        return {**out, **self.about}


def plan_of(run: RunConfig, path: str, predicted: Predicted | None, about: Mapping[str, Any]) -> PlanFile:
    """The plan file of a run that has its layout and recompute in place."""
    values = values_of(run)
    sets = {name: values[name] for name in SETS if run.model.is_moe or not name.startswith("expert_")}
    if run.model.is_moe:
        sets["expert_model_parallel_size"], sets["expert_tensor_parallel_size"] = run.parallel.expert_sizes
    picked = ({name: values[name] for name in names} for names in (MADE_FOR, PREDICTED_FOR))
    return PlanFile(path, sets, {**next(picked), **run.model.not_built}, next(picked), predicted, about)


def same_value(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a field say the same; layouts are compared unrolled.

    Raises:
        ConfigError: a layout that is none.
    """
    if name == "pipeline_model_parallel_layout" and one is not None and other is not None:
        return parse_stages(one) == parse_stages(other)
    return one == other


def read_plan(path: str) -> PlanFile:
    """Read a plan file.

    Raises:
        ConfigError: no such file, or none that plan_pipeline wrote; says which key is wrong.
    """
    where = f"plan {path}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the plan: {error.strerror}", where, _FIX) from None
    except ValueError as error:
        raise ConfigError(f"the plan is not JSON: {error}", where, _FIX) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"not a plan file: its format is not {FORMAT!r}", where, _FIX)
    for key, names in (("sets", SETS), ("made_for", (*MADE_FOR, *PLANNED_ONLY)), ("predicted_for", PREDICTED_FOR)):
        _check(data.get(key), key, names, where)
    sets = {name: tuple(value) if isinstance(value, list) else value for name, value in data["sets"].items()}
    return PlanFile(path, sets, data["made_for"], data["predicted_for"], _predicted(data.get("predicted"), where))


def _check(values: Any, key: str, names: tuple[str, ...], where: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"the plan has no {key}", where, _FIX)
    known = fields_by_name()
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{key}.{name} is not a field of a plan", where, _FIX)
        unset = value is None and known[name].optional
        kind = (int, float) if known[name].kind is float else known[name].kind
        items = value if known[name].many and isinstance(value, list) else [value]
        if not unset and any(not isinstance(item, kind) or isinstance(item, bool) != (kind is bool) for item in items):
            raise ConfigError(f"{key}.{name} = {value!r}, not {known[name].expects()}", where, _FIX)
    if key == "sets" and "pipeline_model_parallel_layout" not in values:
        raise ConfigError("sets.pipeline_model_parallel_layout is missing", where, _FIX)


def _predicted(data: Any, where: str) -> Predicted | None:
    if data is None:
        return None
    try:
        memory = tuple(float(value) for value in data["memory_gib"])
        return Predicted(
            str(data["device"]), float(data["iteration_s"]), memory, float(data["tokens_per_s_per_device"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"predicted is damaged: {error!r}", where, _FIX) from None

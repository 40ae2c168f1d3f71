"""One merge, from what was asked to what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_telechat import __version__
from megatron_telechat.checkpoint.averages import KINDS, require_average
from megatron_telechat.checkpoint.lineage import folder_of_step, saved_in
from megatron_telechat.errors import CheckpointError, ConfigError
from megatron_telechat.huggingface.convert import DTYPES, KEEP
from megatron_telechat.locations import Location, Url
from megatron_telechat.merging.alike import require_alike
from megatron_telechat.merging.inputs import (
    MODEL,
    CheckpointInput,
    Input,
    has_masters,
    open_input,
    provenance_of,
    without_master,
)
from megatron_telechat.merging.losses import losses_of
from megatron_telechat.merging.merged import Merged, optimizer_keys
from megatron_telechat.merging.methods import Dare, Linear, Method, Slerp, TaskArithmetic, Ties
from megatron_telechat.merging.outputs import Progress, progress_of, require_new, write_checkpoint, write_folder
from megatron_telechat.merging.request import ON_A_BASE, MergeRequest
from megatron_telechat.merging.weighting import (
    LayerWeights,
    decay_weights,
    loss_weights,
    read_layer_weights,
    settled,
)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        path: the checkpoint or the Hugging Face folder.
        inputs: the paths that were merged, in order.
        weights: common weight of each.
        losses: of each, where the weights come from them.
        values: what took part: weights, master, or the kind of an average.
        size_bytes: of the tensors written.
        notes: what a person should know.
    """

    path: Location
    inputs: tuple[Location, ...]
    weights: tuple[float, ...]
    losses: tuple[float, ...] | None
    values: str
    size_bytes: int
    notes: tuple[str, ...]


def merge(request: MergeRequest) -> MergeReport:
    """Merge as asked.

    Raises:
        ConfigError: arguments that do not go together.
        CheckpointError: an input is missing, damaged or of another model or tokenizer; the output is there already.
        DataError: examples or tokenizer cannot be used.
        NumericsError: a value is not finite.
        ResourceError: the disk. Nothing is left behind by any of them.
    """
    require_sense(request)
    require_new(request.output)
    models: list[Input] = [open_input(path, request.verify) for path in _input_paths(request)]
    base = [] if request.base is None else [open_input(request.base, request.verify)]
    inputs: list[Input] = [*models, *base]
    notes = [note for one in inputs for note in getattr(one, "notes", ())]
    notes += require_alike(inputs, request.allow_model_change)
    weights, losses = _weights(request, models)
    weights.require_use(list(_keys(models[0])))
    counting = _counting(weights, len(models), len(base))
    values = _values(request, [inputs[number] for number in counting])
    dtype = None if request.dtype == KEEP else DTYPES[request.dtype]
    of_base = "master" if values in KINDS else values
    merged = Merged(inputs, _method(request, weights), [values] * len(models) + [of_base] * len(base), counting, dtype)
    progress = Progress()
    if request.optimizer:
        _require_no_negative(weights, "--optimizer", "would make a second moment of Adam negative")
        progress = progress_of(models, optimizer_keys(models))
    provenance = _provenance(request, inputs, weights, losses, values)
    as_checkpoint = request.format == "checkpoint" or (
        request.format is None and all(isinstance(one, CheckpointInput) for one in inputs)
    )
    if request.optimizer and not as_checkpoint:
        raise ConfigError("a Hugging Face folder has no optimizer state", "--optimizer", "--format checkpoint")
    if isinstance(request.output, Url) and not as_checkpoint:
        raise ConfigError(
            "a Hugging Face folder is not written to an object store", "--output", "a folder, or --format checkpoint"
        )
    if as_checkpoint:
        written = write_checkpoint(merged, request.output, progress, provenance)
    else:
        assert isinstance(request.output, Path)
        tokenizer = request.examples.tokenizer if request.examples else None
        written = write_folder(merged, request.output, provenance, tokenizer, request.max_shard_bytes)
    return MergeReport(
        written.path,
        tuple(one.path for one in models),
        weights.common,
        losses,
        values,
        written.size_bytes,
        (*notes, *written.notes),
    )


def require_sense(request: MergeRequest) -> None:
    """Raises ConfigError where what is asked does not go together; nothing is opened."""
    given = {
        "--weights": request.weights,
        "--layer-weights": request.layer_weights,
        "--examples": request.examples,
        "--window or --steps": request.window,
    }
    told = [flag for flag, value in given.items() if value is not None]
    if len(told) > 1:
        raise ConfigError(f"{' and '.join(told)} each give the weights", "command line", "one of them")
    count = len(request.inputs)
    if request.weights is not None and len(request.weights) != count:
        raise ConfigError(f"{len(request.weights)} weights for {count} inputs", "--weights", "one weight an input")
    if request.window is not None and count != 1:
        raise ConfigError(f"a window of one run, and {count} inputs", "command line", "one folder of checkpoints")
    on_base = request.method in ON_A_BASE
    if on_base != (request.base is not None):
        what = "needs the model that the others began from" if on_base else "has no base"
        raise ConfigError(f"--method {request.method} {what}", "--base", "--base PATH" if on_base else "leave it out")
    if request.method == "slerp" and (count != 2 or request.window is not None):
        raise ConfigError(f"slerp is between two models, not {count}", "--method", "two inputs, or --method linear")
    if request.values in KINDS:
        _require_averages_alone(request)
    if request.optimizer and request.method != "linear":
        raise ConfigError(
            f"the optimizer's state has no {request.method}", "--optimizer", "--method linear, or no optimizer state"
        )


def _require_averages_alone(request: MergeRequest) -> None:
    """What belongs to the weights themselves does not go with an average of them."""
    if request.optimizer:
        raise ConfigError(
            "the optimizer's state belongs to the weights, not to their average", "--optimizer", "leave it out"
        )
    if request.examples is not None:
        raise ConfigError(
            "losses are those of the weights, not of their average",
            "--examples",
            "export each average first (tools/convert_checkpoint.py export --values), and merge the folders",
        )


def _input_paths(request: MergeRequest) -> Sequence[Location]:
    window = request.window
    if window is None:
        return request.inputs
    (root,) = request.inputs
    if window.steps is not None:
        return [folder_of_step(root, step) for step in sorted(window.steps)]
    assert window.last is not None
    saved = saved_in(root)
    if len(saved) < window.last:
        steps = ", ".join(str(one.step) for one in saved) or "none"
        raise CheckpointError(
            f"a window of {window.last} checkpoints, and these steps are there: {steps}",
            str(root),
            "a smaller --window",
        )
    return [one.path for one in saved[-window.last :]]


def _weights(request: MergeRequest, models: Sequence[Input]) -> tuple[LayerWeights, tuple[float, ...] | None]:
    """The weights of the models, and the losses that they come from."""
    on_base, count = request.method in ON_A_BASE, len(models)
    how = request.weights_sum or ("any" if on_base else "one")
    if request.layer_weights is not None:
        return read_layer_weights(request.layer_weights, count, how), None
    if request.examples is not None:
        losses = tuple(losses_of(models, request.examples))
        return LayerWeights(loss_weights(losses, request.examples.temperature)), losses
    if request.window is not None:
        _require_equal_steps(request, models)
        return LayerWeights(decay_weights(request.window.decay, count)), None
    if request.weights is not None:
        return LayerWeights(settled(request.weights, how, "--weights")), None
    return LayerWeights((1.0 if on_base else 1.0 / count,) * count), None


def _require_equal_steps(request: MergeRequest, models: Sequence[Input]) -> None:
    assert request.window is not None
    steps = [one.step or 0 for one in models]
    distances = {b - a for a, b in zip(steps, steps[1:], strict=False)}
    if len(distances) > 1 and request.window.decay not in ("latest", "mean"):
        raise ConfigError(
            f"the steps {', '.join(map(str, steps))} are not equally spaced, so that their average stands for no "
            f"{request.window.decay} decay",
            "--decay",
            "equally spaced --steps, or --decay mean",
        )


def _counting(weights: LayerWeights, models: int, bases: int) -> list[int]:
    lists = [weights.common, *(rule.weights for rule in weights.rules)]
    return [number for number in range(models) if any(one[number] != 0 for one in lists)] + [
        models + number for number in range(bases)
    ]


def _values(request: MergeRequest, inputs: Sequence[Input]) -> str:
    """Weights, master or the kind of an average: what takes part. With the optimizer's state the masters do, else
    weights and masters would part.

    Args:
        inputs: those that count; a base, which is the last, has no average to give.
    """
    if request.values in KINDS:
        for one in inputs[: len(inputs) - (request.base is not None)]:
            require_average(one.extra, request.values, str(one.path))
        return request.values
    for one in inputs:
        key = without_master(one)
        if key is not None and request.values == "master":
            raise CheckpointError(
                f"it holds no fp32 master of {key}", str(one.path), "--values weights, or a checkpoint of a training"
            )
        if key is not None:
            return "weights"
    masters = (request.optimizer or request.values != "weights") and any(map(has_masters, inputs))
    return "master" if masters else "weights"


def _require_no_negative(weights: LayerWeights, where: str, why: str) -> None:
    if any(weight < 0 for weight in [*weights.common, *(w for rule in weights.rules for w in rule.weights)]):
        raise ConfigError(f"a negative weight {why}", where, "weights from 0")


def _method(request: MergeRequest, weights: LayerWeights) -> Method:
    if request.method == "linear":
        return Linear(weights)
    if request.method == "slerp":
        return Slerp(weights)
    if request.method == "task-arithmetic":
        return TaskArithmetic(weights, request.scale)
    if request.method in ("ties", "dare-ties"):
        _require_no_negative(weights, "--method", "has no part in an election of signs")
    if request.method == "ties":
        return Ties(weights, request.scale, request.density, request.trim == "model")
    return Dare(weights, request.scale, request.drop, request.seed, request.method == "dare-ties")


def _keys(one: Input) -> list[str]:
    return [key.removeprefix(MODEL) for key in one.keys if key.startswith(MODEL)]


def _provenance(
    request: MergeRequest,
    inputs: Sequence[Input],
    weights: LayerWeights,
    losses: Sequence[float] | None,
    values: str,
) -> dict[str, Any]:
    models = len(inputs) - (request.base is not None)
    described = []
    for number, one in enumerate(inputs):
        entry: dict[str, Any] = {"path": str(one.path), **one.identity()}
        if number < models:
            entry["weight"] = weights.common[number]
        if losses is not None and number < models:
            entry["loss"] = losses[number]
        if one.tokenizer is not None:
            entry["tokenizer"] = dict(one.tokenizer)
        earlier = provenance_of(one)
        if earlier is not None:
            entry["merged_from"] = earlier
        described.append(entry)
    return {
        "program": "megatron_telechat",
        "version": __version__,
        "command": list(request.command),
        "method": {"name": request.method, **_parameters(request)},
        "weights_from": _weights_from(request),
        "rules": [
            {"layers": None if rule.layers is None else sorted(rule.layers), "tensors": rule.tensors,
             "weights": list(rule.weights)}
            for rule in weights.rules
        ],
        "values": values,
        "dtype": request.dtype,
        "optimizer": "average" if request.optimizer else "none",
        "inputs": described[:models],
        "base": described[models] if len(described) > models else None,
    }  # fmt: skip


def _parameters(request: MergeRequest) -> dict[str, Any]:
    """The numbers that the method computes with."""
    scale = {"scale": request.scale}
    return {
        "task-arithmetic": scale,
        "ties": {**scale, "density": request.density, "trim": request.trim},
        "dare": {**scale, "drop": request.drop, "seed": request.seed},
        "dare-ties": {**scale, "drop": request.drop, "seed": request.seed},
    }.get(request.method, {})


def _weights_from(request: MergeRequest) -> Mapping[str, Any]:
    if request.examples is not None:
        wanted = request.examples
        return {"losses on": str(wanted.file), "temperature": wanted.temperature}
    if request.window is not None:
        return {"decay": request.window.decay}
    if request.layer_weights is not None:
        return {"file": str(request.layer_weights)}
    return {"given": list(request.weights)} if request.weights is not None else {"equal": True}

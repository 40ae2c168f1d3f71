"""How much each input weighs: given, by decay shape, by loss, by layer. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_telechat.errors import ConfigError, Problem
from megatron_telechat.tensors.patterns import TensorPattern, layer_numbers

Sum = Literal["one", "normalize", "any"]
"""What weights must add up to: one; divided by their sum; taken as they are."""

_TOLERANCE = 1e-6

DECAYS: Mapping[str, Callable[[float], float]] = {
    "latest": lambda x: 1.0,
    "mean": lambda x: 1.0 - x,
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""Shape of a learning-rate decay: share of the peak at ``x`` of the window, 0 < x < 1. A linear decay weighs every
checkpoint alike, so it is the mean."""


def settled(weights: Sequence[float], how: Sum, where: str) -> tuple[float, ...]:
    """The weights that a merge computes with.

    Args:
        how: "one": refuse a sum that is not 1 (to 1e-6), and take off what rounding the text left; "normalize": divide
            by the sum; "any": as they are.
        where: they were said, for messages.

    Raises:
        ConfigError: not finite, or of another sum.
    """
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"the weights {_text(weights)} are not all finite", where, "finite numbers")
    if how == "any":
        return tuple(map(float, weights))
    total = math.fsum(weights)
    if how == "one" and abs(total - 1) > _TOLERANCE:
        raise ConfigError(
            f"the weights {_text(weights)} add up to {total:.9g}, not to 1",
            where,
            "--normalize divides them by their sum, --any-sum takes them as they are",
        )
    if how == "normalize" and abs(total) < _TOLERANCE:
        raise ConfigError(f"the weights {_text(weights)} add up to {total:.3g}", where, "weights with a sum above 0")
    return tuple(weight / total for weight in weights)


def _text(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


def decay_weights(shape: str, count: int) -> tuple[float, ...]:
    """Weights of ``count`` equally spaced checkpoints of a run with constant learning rate, oldest first, whose average
    stands for the end of a run that decays over the same steps.

    WSM, arXiv 2507.17634: with decay factors 1 >= w_1 >= ... >= w_k >= 0 on the updates between k + 1 checkpoints, the
    weights are c_0 = 1 - w_1, c_j = w_j - w_(j+1) and c_k = w_k. Here w_i is the shape at i / (k + 1), so that the
    last update keeps a part of its learning rate.
    """
    decay = DECAYS[shape]
    factors = [1.0, *(decay(i / count) for i in range(1, count)), 0.0]
    return tuple(a - b for a, b in zip(factors, factors[1:], strict=False))


def loss_weights(losses: Sequence[float], temperature: float) -> tuple[float, ...]:
    """softmax(-loss / temperature): LM-Cocktail, arXiv 2311.13534, section 2.

    Does not depend on the order of the losses, bit for bit.
    """
    least = min(losses)
    powers = [math.exp((least - loss) / temperature) for loss in losses]
    total = math.fsum(powers)
    return tuple(power / total for power in powers)


@dataclass(frozen=True)
class LayerRule:
    """Weights of the tensors that it names: those of these layers whose key fits the pattern; unset fits all."""

    layers: frozenset[int] | None
    tensors: str | None
    weights: tuple[float, ...]
    origin: str

    def fits(self, key: str) -> bool:
        """Whether it names the tensor of the model with this key."""
        return TensorPattern(self.layers, self.tensors).fits(key)


@dataclass(frozen=True)
class LayerWeights:
    """Weights tensor by tensor: those of the first rule that fits, else the common ones."""

    common: tuple[float, ...]
    rules: tuple[LayerRule, ...] = ()

    def of(self, key: str) -> tuple[float, ...]:
        """The weights of the tensor of the model with this key."""
        return next((rule.weights for rule in self.rules if rule.fits(key)), self.common)

    def require_use(self, keys: Sequence[str]) -> None:
        """Raises ConfigError naming the rules that fit no tensor of the model."""
        idle = [rule.origin for rule in self.rules if not any(rule.fits(key) for key in keys)]
        if idle:
            raise ConfigError(
                [
                    Problem("the rule fits no tensor of the model", origin, "layers count from 0; docs/merging.md")
                    for origin in idle
                ]
            )


_KEYS = ("layers", "tensors", "weights")


def read_layer_weights(path: Path, count: int, how: Sum) -> LayerWeights:
    """Weights from a YAML file: ``weights:`` of all tensors, and ``rules:`` with ``layers:`` (``0-3,7``), ``tensors:``
    (a pattern with ``*``) and ``weights:`` of their own.

    Args:
        count: number of inputs.
        how: see :func:`settled`; held for each list.

    Raises:
        ConfigError: the file cannot be read, or what it says is none of this; every fault at once.
    """
    import yaml

    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the file: {str(error).splitlines()[0]}", str(path), "a YAML file") from error
    reader = _LayerFile(str(path), count, how)
    found = reader.read(body)
    if reader.problems or found is None:
        raise ConfigError(reader.problems)
    return found


class _LayerFile:
    def __init__(self, file: str, count: int, how: Sum):
        self.file, self.count = file, count
        self.how: Sum = how
        self.problems: list[Problem] = []

    def read(self, body: Any) -> LayerWeights | None:
        if not isinstance(body, dict) or "weights" not in body or not set(body) <= {"weights", "rules"}:
            self.complain("the file is not a mapping of weights and rules", self.file)
            return None
        common = self.weights(body["weights"], f"{self.file}: weights")
        rules = body.get("rules") or []
        if not isinstance(rules, list):
            self.complain("rules is not a list", self.file)
            return None
        return LayerWeights(common, tuple(self.rule(rule, number) for number, rule in enumerate(rules, 1)))

    def rule(self, body: Any, number: int) -> LayerRule:
        origin = f"{self.file}: rule {number}"
        if not isinstance(body, dict) or not set(body) <= set(_KEYS) or "weights" not in body or len(body) < 2:
            self.complain("the rule is not a mapping of weights with layers, tensors, or both", origin)
            return LayerRule(None, None, (), origin)
        tensors = body.get("tensors")
        if tensors is not None and not isinstance(tensors, str):
            self.complain("tensors is not a pattern", origin)
        layers = None if body.get("layers") is None else self.layers(body["layers"], origin)
        return LayerRule(layers, tensors, self.weights(body["weights"], origin), origin)

    def layers(self, value: Any, origin: str) -> frozenset[int]:
        try:
            return layer_numbers(str(value))
        except ValueError:
            self.complain(f"layers is {value!r}, not numbers and ranges such as 0-3,7", origin)
            return frozenset()

    def weights(self, value: Any, origin: str) -> tuple[float, ...]:
        numbers = value if isinstance(value, list) else []
        if len(numbers) != self.count or not all(
            isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers
        ):
            self.complain(f"weights is {value!r}, not a list of {self.count} numbers, one an input", origin)
            return ()
        try:
            return settled(numbers, self.how, origin)
        except ConfigError as error:
            self.problems.extend(error.problems)
            return ()

    def complain(self, what: str, where: str) -> None:
        self.problems.append(Problem(what, where, "docs/merging.md shows the form"))

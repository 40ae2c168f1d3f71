"""Two recordings of the experts' choices, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_telechat.config.routing import Recording
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.routing_files import StepReader


@dataclass(frozen=True)
class Choice:
    """What both recordings say of one token.

    Attributes:
        sample: number within the step.
        position: in the sample.
        experts: the chosen experts of both, sorted.
        gaps: the smallest chosen logit less the largest that was not chosen, of both.
    """

    sample: int
    position: int
    experts: tuple[tuple[int, ...], tuple[int, ...]]
    gaps: tuple[float, float]

    @property
    def gap(self) -> float:
        """The larger one: rounding by up to half of it cannot have changed the choice."""
        return max(self.gaps)


@dataclass(frozen=True)
class LayerDifference:
    """Where two recordings of one layer and step part.

    Attributes:
        tokens: how many there are.
        different: how many go to other experts (their order does not count).
        ties: of these, how many are ties: neither recording's gap is above the bound.
        worst: the different token with the largest gap.
    """

    step: int
    layer: int
    tokens: int
    different: int
    ties: int
    worst: Choice

    @property
    def beyond_ties(self) -> int:
        """Different choices that are not ties."""
        return self.different - self.ties


def common_steps(one: Recording, other: Recording, wanted: range | None = None) -> tuple[int, ...]:
    """Steps that are to be compared.

    Raises:
        ConfigError: the recordings are of runs of another shape; one lacks a wanted step, or they share none.
    """
    different = [
        f"{name} is {value} and {other.shape[name]}" for name, value in one.shape.items() if other.shape[name] != value
    ]
    if different:
        raise ConfigError(
            f"the recordings cannot be compared: {'; '.join(different)}", "", "two recordings of one model and batch"
        )
    steps = sorted(set(one.steps()) & set(other.steps()))
    if wanted is not None:
        missing = sorted(set(wanted) - set(steps))
        if missing:
            raise ConfigError(
                f"step {missing[0]} is not in both recordings", "--steps", f"steps of these: {_shown(steps)}"
            )
        steps = list(wanted)
    if not steps:
        raise ConfigError("the recordings have no step in common", "", "record the same steps of both runs")
    return tuple(steps)


def differences(one: Recording, other: Recording, steps: Sequence[int], tie: float) -> Iterator[LayerDifference]:
    """Layers in which the choices differ, by step and then by layer: what comes first may be the cause of the rest.

    Args:
        tie: gap of logits up to which a difference is a tie.

    Raises:
        DataError: a recording is damaged.
    """
    samples, length = range(one.shape["global_batch_size"]), one.shape["seq_length"]
    layers = range(0, one.shape["num_layers"], one.shape["moe_layer_freq"])
    for step in steps:
        readers = [StepReader(recording.path, step) for recording in (one, other)]
        for layer in layers:
            experts = [np.sort(reader.read("experts", layer, samples, 0, length), -1) for reader in readers]
            parted = (experts[0] != experts[1]).any(-1)
            if not parted.any():
                continue
            gaps = np.stack([reader.read("gaps", layer, samples, 0, length)[parted] for reader in readers])
            larger = gaps.max(0)
            # A gap that is not a number is no tie, and worse than any.
            at = int(np.nan_to_num(larger, nan=np.inf).argmax())
            sample, position = (int(index[at]) for index in parted.nonzero())
            both = tuple(tuple(int(e) for e in array[sample, position]) for array in experts)
            worst = Choice(sample, position, (both[0], both[1]), (float(gaps[0, at]), float(gaps[1, at])))
            yield LayerDifference(step, layer, parted.size, int(parted.sum()), int((larger <= tie).sum()), worst)


def _shown(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "none"

"""Rows of the bench: all arms in turn over one link, medians of the slowest rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from turns import agree_on_errors, rates, reshape, take_turns

from overlap.arms import Arms

FIXED = (1, 2, 4, 8)
CORE = "megatron-core"
AUTO = "auto"
SERIAL = "serial"
CONTROL = "negative control"
# Relative, against one chunk; the arms differ in the order of sums.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
CALIBRATION_ROUNDS = 5


@dataclass(frozen=True)
class Options:
    """What is measured how often."""

    rounds: int = 7
    fixed: tuple[int, ...] = FIXED
    control_chunks: int = 4


class Bench:
    """The rows of one run.

    Args:
        arms: around the layers.
        options: of the run.
        set_rate: reshapes the links to so many Mbit/s, None: no limit. None where nothing can be reshaped.
        num_tokens, dtype, device: for the choice of `auto`.
        say: prints a line on rank 0.
    """

    def __init__(
        self,
        arms: Arms,
        options: Options,
        set_rate: Callable[[float | None], None] | None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.arms, self.options, self.set_rate, self.say = arms, options, set_rate, say

    # ---- before the time is taken --------------------------------------------------------------

    def verify(self) -> dict[str, float]:
        """Largest relative error of every arm against one chunk, over the ranks. Collective.

        Raises:
            ArmsDisagree: on all ranks, with the arm and what differs.
        """
        arms, limit = self.arms, TOLERANCE[self.arms.shape.dtype]
        expected = arms.results(arms.chunks(1))
        cases = {f"k={k}": arms.chunks(k) for k in self.options.fixed if k > 1}
        cases |= {f"only-compute k={k}": arms.compute(k) for k in self._ends}
        cases |= {SERIAL: arms.control(1), CONTROL: arms.control(self.options.control_chunks), CORE: arms.core()}
        worst = {}
        for name, arm in cases.items():
            errors = arms.results(arm).errors(expected)
            worst[name] = max(errors.values())
            if worst[name] > limit:
                self.say(f"{name}: relative errors against k=1 {errors}")
        return agree_on_errors(worst, limit, "k=1")

    def wire_bytes(self) -> dict[str, int]:
        """Bytes that leave rank 0 in a step, from the split sizes."""
        names = {f"k={k}": k for k in self.options.fixed} | {CORE: None}
        return {name: self.arms.wire_bytes(k) for name, k in names.items()}

    @property
    def _ends(self) -> tuple[int, ...]:
        return (1, self.options.control_chunks)

    # ---- rows ---------------------------------------------------------------------------------

    def rates(self, ratios: Sequence[float]) -> dict[float, float]:
        """Mbit/s for which the link takes so many times as long as the computation, in a forward with one chunk."""
        return rates(self._ratio, ratios)

    def _ratio(self, mbit: float) -> float:
        """Link over computation, forward, k=1."""
        reshape(self.set_rate, mbit)
        arms = {"only-compute k=1": self.arms.compute(1), "only-link k=1": self.arms.link(1)}
        times = take_turns(arms, CALIBRATION_ROUNDS)
        compute, link = (median(forward for forward, *_ in times[name]) for name in arms)
        self.say(f"at {mbit:.0f} Mbit/s: link {link * 1e3:.1f} ms, computation {compute * 1e3:.1f} ms (forward, k=1)")
        return link / compute

    def row(self, label: str, mbit: float | None = None, target: float | None = None) -> dict[str, Any]:
        """Time all arms on one link. Collective.

        Args:
            label: of the row.
            mbit: reshape the links to this; None: no limit.
            target: link/FFN ratio that the rate was chosen for.
        """
        reshape(self.set_rate, mbit)
        choice = self._choose()
        arms: dict[str, Any] = {f"k={k}": self.arms.chunks(k) for k in self.options.fixed}
        arms[AUTO] = self.arms.chunks(choice["num_chunks"])
        arms |= {f"only-compute k={k}": self.arms.compute(k) for k in self._ends}
        arms |= {f"only-link k={k}": self.arms.link(k) for k in self._ends}
        arms[CORE] = self.arms.core()
        arms |= {SERIAL: self.arms.control(1), CONTROL: self.arms.control(self.options.control_chunks)}
        times = take_turns(arms, self.options.rounds)
        return {"label": label, "mbit": mbit, "target_ratio": target, "auto": choice, **summary(times)}

    def _choose(self) -> dict[str, Any]:
        from megatron_telechat.moe.autotune import choose_num_chunks

        shape, block = self.arms.shape, self.arms.block
        self.arms.chunks(1).prepare()
        choice = choose_num_chunks(block, shape.tokens, shape.torch_dtype, torch.device("cpu"))
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in (asdict(choice) | {"num_chunks": choice.num_chunks}).items()
        }


def summary(times: Mapping[str, Sequence[tuple[float, ...]]]) -> dict[str, Any]:
    """Medians in ms, ratios within the rounds, and the limit of many chunks.

    With A the computation and B the link alone, both of one chunk, one after the other takes A + B; many chunks at no
    cost come to max(A, B), forward and backward each. One chunk is better than A + B already: the gradients of the
    weights run beside the last exchange. The share of an arm is therefore the time that it saves against the serial
    arm, over what there is to save, min(A, B) of both passes; what k=1 could gain at most is given too.
    """
    medians = {name: [median(column) for column in zip(*runs, strict=True)] for name, runs in times.items()}
    compute, link = medians["only-compute k=1"], medians["only-link k=1"]
    serial = sum(compute[:2]) + sum(link[:2])
    ideal = sum(max(a, b) for a, b in zip(compute[:2], link[:2], strict=True))

    def ratio(name: str, other: str) -> float:
        """How many times as fast as the other, in the median of the rounds."""
        return median(theirs[2] / ours[2] for ours, theirs in zip(times[name], times[other], strict=True))

    arms = {}
    for name, (forward, backward, total, exposed, sent) in medians.items():
        arms[name] = {
            "forward_ms": forward * 1e3,
            "backward_ms": backward * 1e3,
            "total_ms": total * 1e3,
            "best_total_ms": min(run[2] for run in times[name]) * 1e3,
            "exposed_ms": None if name == CORE else exposed * 1e3,
            "interface_bytes": int(sent),
            "against_k1": ratio(name, "k=1"),
            "against_core": ratio(name, CORE),
            "against_serial": ratio(name, SERIAL),
            "share_of_ideal": (medians[SERIAL][2] - total) / (serial - ideal),
            "samples_ms": [run[2] * 1e3 for run in times[name]],
        }
    return {
        "ratio": link[0] / compute[0],
        "ideal_ms": ideal * 1e3,
        "ideal_gain": serial / ideal,
        "ideal_gain_of_k1": medians["k=1"][2] / ideal,
        "arms": arms,
    }

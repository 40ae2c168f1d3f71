"""TeleChat2's published training layouts and throughputs, to hold the cost model against.

Layouts: the training YAMLs of MindFormers, `research/telechat2`, which the presets carry. Throughputs: the README
there, tokens a second and NPU on Atlas 800T A2 at 8192 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec, device_spec
from megatron_telechat.costs.time import Software
from megatron_telechat.planner.build import balance_problem
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem

DEVICE = "ascend-910b-64g"


@dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        preset: of its model, layout and recompute.
        world_size: ranks of the published YAML.
        tokens_per_s: published, for each device.
        memory_gb: memory cap of the published YAML, 1e9 bytes.
        software: what is known of the program that ran it.
    """

    preset: str
    world_size: int
    tokens_per_s: float
    memory_gb: float
    software: Software = Software()

    def run(self) -> RunConfig:
        """The run as published. The YAMLs say nothing of overlaps, which the presets turn on for this program."""
        flags = ["--preset", self.preset, "--dry-run", "--world-size", str(self.world_size), "--no-overlap-grad-reduce"]
        return load_run_config(flags, {}).run

    def problem(self, device: DeviceSpec, kinds: Sequence[str] = ("full",)) -> BalanceProblem:
        """Its balance problem under the published memory cap, of which nothing is held back."""
        return balance_problem(
            self.run(), device, kinds, mem_limit_bytes=self.memory_gb * 1e9, reserve_bytes=0.0, software=self.software
        )

    def ratio(self, device: DeviceSpec) -> float:
        """Predicted over published tokens a second."""
        return predict(self.run(), device, self.software).tokens_per_s_per_device / self.tokens_per_s


PUBLISHED = (
    Published("telechat2-7b", 8, 2950.0, 58.0),
    Published("telechat2-35b", 16, 516.0, 57.0),
    Published("telechat2-115b", 512, 158.0, 54.5),
    # capacity_factor 1.2: every expert works on 1.2 times its even share of rows, padded
    Published("telechat2-39b-a12b", 1024, 865.0, 53.0, Software(moe_imbalance=1.2)),
)


def published_device() -> DeviceSpec:
    """The device that all of them ran on."""
    device = device_spec(DEVICE)
    assert device is not None  # it comes with the package
    return device


def fit_gemm(entry: Published, device: DeviceSpec, steps: int = 40) -> DeviceSpec:
    """The device with the shares of its peak in products (gemm, grouped_gemm, in their ratio) that give this
    throughput."""
    low, high = 0.05, 2.0
    for _ in range(steps):
        middle = (low + high) / 2
        if entry.ratio(_with_gemm(device, middle)) < 1:
            low = middle
        else:
            high = middle
    return _with_gemm(device, (low + high) / 2)


def _with_gemm(device: DeviceSpec, gemm: float) -> DeviceSpec:
    shares = device.efficiency
    grouped = gemm * shares["grouped_gemm"] / shares["gemm"]
    return replace(device, efficiency={**shares, "gemm": gemm, "grouped_gemm": grouped})

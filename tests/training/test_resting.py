"""State that rests elsewhere, with one optimizer alone: the bits of a plain step, and one that counts by group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.checkpoint.optimizer_state import MASTER, MOMENTS, adam_steps, set_adam_step
from megatron_telechat.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_telechat.training.resting import RestingAdam, offloaded
from megatron_telechat.training.shelves import ALIGNMENT

SHAPES = ((40, 33), (7,), (129,), (64, 3))
STEPS = 4


class CountsByGroup(torch.optim.Optimizer):
    """Momentum alone; its count of steps is in the group and its state is named as Adam's, as in Transformer Engine's
    FusedAdam. Its list of masters, as apex has one, is made anew where there is none."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 1e-2})
        self.param_groups_master: list | None = None

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.param_groups_master is None:
            self.param_groups_master = [list(group["params"]) for group in self.param_groups]
        for group, masters in zip(self.param_groups, self.param_groups_master, strict=True):
            group["step"] = group.get("step", 0) + 1
            for tensor, _ in zip(group["params"], masters, strict=True):
                state = self.state[tensor]
                for name in MOMENTS:
                    state.setdefault(name, torch.zeros_like(tensor))
                state["exp_avg"].mul_(0.9).add_(tensor.grad)
                tensor.sub_(state["exp_avg"] * group["lr"] / group["step"])


def fused_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def run_of(fraction: float, overlap: bool = True, moments: Literal["fp32", "bf16"] = "fp32") -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            name="one", num_layers=1, hidden_size=64, ffn_hidden_size=64, num_attention_heads=1, vocab_size=64
        ),
        parallel=ParallelConfig(
            optimizer_cpu_offload=fraction > 0,
            optimizer_offload_fraction=fraction or 1.0,
            overlap_cpu_optimizer_d2h_h2d=overlap,
        ),
        training=TrainingConfig(device="cpu", precision="bf16", seq_length=8, global_batch_size=1),
        optimizer=OptimizerConfig(exp_avg_dtype=moments, exp_avg_sq_dtype=moments),
    )  # fmt: skip


def part_of(make) -> Any:
    """As megatron-core's optimizer of 16-bit parameters without sharding: two groups, of which one has decay."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    masters = [weight.float() for weight in weights]
    groups = [{"params": masters[:2], "weight_decay": 0.1}, {"params": masters[2:], "weight_decay": 0.0}]
    return SimpleNamespace(
        optimizer=make(groups), is_stub_optimizer=False,
        float16_groups=[weights[:2], weights[2:]], fp32_from_float16_groups=[masters[:2], masters[2:]],
        fp32_from_fp32_groups=[[], []],
    )  # fmt: skip


def step(part: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in part.optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
    part.optimizer.step()


def flat(part: Any, leaves: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Kind of the state → of each leaf."""
    resting = part.optimizer if isinstance(part.optimizer, RestingAdam) else None
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*MOMENTS, MASTER)}
    for leaf in leaves:
        views = resting.at_rest(leaf) if resting is not None else None
        state = part.optimizer.state[leaf] if leaf in part.optimizer.state else {}
        for name in found:
            value = views[name] if views is not None and name in views else state.get(name, leaf)
            found[name].append(value.detach().reshape(-1).clone())
    return found


@pytest.mark.parametrize("make", [fused_adam, CountsByGroup])
@pytest.mark.parametrize("fraction,overlap", [(1.0, True), (1.0, False), (0.5, True)])
def test_the_bits_of_a_plain_step(make, fraction, overlap):
    plain, resting = part_of(make), part_of(make)
    plain_leaves = [one for group in plain.fp32_from_float16_groups for one in group]
    leaves = [one for group in resting.fp32_from_float16_groups for one in group]
    resting.optimizer = RestingAdam(resting, run_of(fraction, overlap), get_backend("cpu"), 2 * ALIGNMENT)
    for number in range(STEPS):
        step(plain, number)
        step(resting, number)
        for weights, masters in zip(plain.float16_groups, plain.fp32_from_float16_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
    expected, found = flat(plain, plain_leaves), flat(resting, leaves)
    for name in expected:
        assert all(map(torch.equal, expected[name], found[name])), name
    for ours, theirs in zip(resting.float16_groups, plain.float16_groups, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert adam_steps(resting) == adam_steps(plain) == {STEPS}


def test_a_master_that_is_away_reads_as_nan_and_cannot_be_written():
    part = part_of(fused_adam)
    part.optimizer = RestingAdam(part, run_of(1.0), get_backend("cpu"), ALIGNMENT)
    for leaf in (one for group in part.fp32_from_float16_groups for one in group):
        assert leaf.isnan().all() and leaf.untyped_storage().nbytes() == 4
        with pytest.raises(RuntimeError):
            leaf.copy_(torch.zeros(leaf.shape))


def test_moments_are_rounded_to_the_nearest():
    """One step from nothing: exp_avg is (1 - beta1) g, rounded once."""
    part = part_of(fused_adam)
    leaves = [one for group in part.fp32_from_float16_groups for one in group]
    part.optimizer = RestingAdam(part, run_of(0.0, moments="bf16"), get_backend("cpu"), 2 * ALIGNMENT)
    wide = part_of(fused_adam)
    step(part, 0)
    step(wide, 0)
    expected = flat(wide, [one for group in wide.fp32_from_float16_groups for one in group])
    found = flat(part, leaves)
    for name in MOMENTS:
        for narrow, exact in zip(found[name], expected[name], strict=True):
            assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, exact.bfloat16())
    assert all(map(torch.equal, found[MASTER], expected[MASTER])), "the step itself is in fp32"


def test_the_count_of_steps_goes_on_where_it_is_set():
    part = part_of(fused_adam)
    part.optimizer = RestingAdam(part, run_of(0.5), get_backend("cpu"), ALIGNMENT)
    step(part, 0)
    set_adam_step(part, 7)
    step(part, 1)
    assert adam_steps(part) == {8}


@pytest.mark.parametrize("fraction,expected", [(0.0, 0), (0.3, 1), (0.97, 3), (1.0, 4)])
def test_the_first_parameters_go_to_the_host(fraction, expected):
    leaves: Any = [SimpleNamespace(own_master=False, stepped=torch.empty(size)) for size in (40, 40, 40, 4)]
    assert len(offloaded(leaves, fraction)) == expected


def test_the_ledger_forgets_what_is_gone():
    backend = get_backend("cpu")
    block = backend.host_memory.take(1000, "a test")
    assert backend.host_memory.nbytes == 1000 and backend.host_memory.holds(block.memory[10:20])
    assert not backend.host_memory.holds(torch.zeros(3))
    del block
    assert backend.host_memory.nbytes == 0

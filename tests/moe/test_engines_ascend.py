"""The grouped engine on the products of torch_npu (a stand-in of plain torch), and on products one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_telechat import device_kinds
from megatron_telechat.backend import grouped
from megatron_telechat.device_kinds import DEVICE_KINDS, HOST
from megatron_telechat.moe import engine_grouped, engine_loop
from megatron_telechat.moe.dispatch import ExpertGroups
from megatron_telechat.moe.engines import engine_for
from tests.backend import torch_npu_stand_in as stand_in
from tests.backend.ascend_here import ascend_here
from tests.moe.reference import relative_error
from tests.moe.test_engines import EXPERTS, HIDDEN, TOKENS, make_case, reference, run

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("output", "tokens", "probabilities", "fc1", "fc2", "bias")


@pytest.fixture(scope="module")
def groups():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    yield ExpertGroups(world, world, world)
    dist.destroy_process_group()


@pytest.fixture
def one_by_one(monkeypatch):
    """No type is multiplied in one kernel."""
    row = replace(DEVICE_KINDS[HOST], grouped_mm_types=frozenset())
    monkeypatch.setitem(device_kinds.DEVICE_KINDS, HOST, row)  # type: ignore[arg-type]
    grouped._one_kernel.cache_clear()
    yield
    grouped._one_kernel.cache_clear()


@pytest.fixture
def no_grouped_mm(monkeypatch):
    """torch's fallback would copy the group sizes to the host in every product."""
    monkeypatch.setattr(F, "grouped_mm", None)


def gradient(dtype):
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)


def check_engine(groups, dtype, route, chunks, recompute):
    tokens, routing, weights = make_case(route, dtype)
    found = run(groups, engine_grouped, tokens, routing, weights, gradient(dtype), chunks, recompute)
    for name, value, expected in zip(NAMES, found, reference(tokens, routing, weights, gradient(dtype)), strict=True):
        assert relative_error(value, expected) < TOLERANCE[dtype], name
    return found


def check_main_grad(groups, dtype):
    tokens, routing, weights = make_case("two_experts", dtype)
    expected = reference(tokens, routing, weights, gradient(dtype))[3:]
    for part in (weights.fc1, weights.fc2, weights.bias):
        part.main_grad, part.grad_added_to_main_grad = torch.ones(part.shape), False
    run(groups, engine_grouped, tokens, routing, weights, gradient(dtype), 3)
    for part, wanted in zip((weights.fc1, weights.fc2, weights.bias), expected, strict=True):
        assert relative_error(part.main_grad - 1, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("route", ("even", "two_experts"))
@pytest.mark.parametrize("chunks,recompute", ((1, False), (3, True)))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_npu_products_match_the_plain_loop(groups, no_grouped_mm, dtype, chunks, recompute, route):
    tokens, routing, weights = make_case(route, dtype)
    looped = run(groups, engine_loop, tokens, routing, weights, gradient(dtype), chunks, recompute)
    with ascend_here():
        assert engine_for(tokens.device) is engine_grouped
        found = check_engine(groups, dtype, route, chunks, recompute)
        for value, other in zip(found, looped, strict=True):
            assert relative_error(value, other) < 2 * TOLERANCE[dtype]
        # Of the check of the kernel itself 9 products and sums a type; the engine's own come on top.
        assert stand_in.calls["npu_grouped_matmul 0"] > 3 * 6 and stand_in.calls["npu_swiglu"] > 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_npu_weight_gradients_go_into_main_grad(groups, no_grouped_mm, dtype):
    with ascend_here():
        check_main_grad(groups, dtype)
        assert torch.finfo(dtype).bits == 32 or stand_in.calls["npu_grouped_matmul_add_"] > 12


@pytest.mark.parametrize("route", ("even", "two_experts"))
@pytest.mark.parametrize("chunks,recompute", ((1, False), (3, True)))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_one_by_one_match_the_plain_loop(groups, one_by_one, no_grouped_mm, dtype, chunks, recompute, route):
    check_engine(groups, dtype, route, chunks, recompute)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_weight_gradients_one_by_one_go_into_main_grad(groups, one_by_one, no_grouped_mm, dtype):
    check_main_grad(groups, dtype)


def test_a_sum_over_no_rows_is_zero_whatever_the_kernel_writes(groups, monkeypatch):
    """torch's kernel leaves the gradient of an expert without rows as it was on some devices."""
    real = F.grouped_mm

    def leaves_rubbish(a, b, *, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 3:
            counts = torch.diff(offs, prepend=offs.new_zeros(1))
            out[counts == 0] = float("nan")
        return out

    monkeypatch.setattr(F, "grouped_mm", leaves_rubbish)
    found = check_engine(groups, torch.float32, "two_experts", 1, False)
    assert found[3].abs().flatten(1).sum(1).eq(0).sum() == EXPERTS - 2


def test_which_types_cuda_multiplies_at_once(monkeypatch):
    """bf16 on compute capability 9 and 10; elsewhere torch loops with a copy to the host."""
    grouped._one_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), True), ((10, 3), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        device = torch.device("cuda", 0)
        assert grouped._one_kernel(device, torch.bfloat16) is expected
        assert not grouped._one_kernel(device, torch.float16) and not grouped._one_kernel(device, torch.float32)
        grouped._one_kernel.cache_clear()

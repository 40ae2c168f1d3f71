"""Both engines of the experts, in one process, against the plain loop."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_telechat.moe import engine_grouped, engine_loop
from megatron_telechat.moe.dispatch import Dispatch, ExpertGroups, RowFormat
from megatron_telechat.moe.engine import ExpertWeights, Gradients, sum_bags
from megatron_telechat.moe.gradients import WeightGradient
from megatron_telechat.moe.pipeline import ChunkPipeline
from megatron_telechat.moe.router import Routing
from tests.moe.reference import relative_error

EXPERTS, HIDDEN, WIDTH, TOKENS, TOPK = 4, 16, 24, 37, 2
ENGINES = {"loop": engine_loop, "grouped": engine_grouped}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def groups():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    yield ExpertGroups(world, world, world)
    dist.destroy_process_group()


def make_case(route: str, dtype: torch.dtype):
    """Tokens, routing and weights; the values are of `dtype`, so that only the arithmetic is rounded."""
    generator = torch.Generator().manual_seed(3)
    tokens, fc1, fc2, bias = (
        (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
        for shape in ((TOKENS, HIDDEN), (EXPERTS, 2, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, HIDDEN))
    )
    logits = torch.rand(TOKENS, EXPERTS, generator=generator)
    if route == "two_experts":  # the others get nothing
        logits[:, :2] += 2
    chosen = logits.topk(TOPK, dim=1)
    counts = torch.bincount(chosen.indices.flatten(), minlength=EXPERTS)
    return tokens, Routing(torch.softmax(chosen.values, 1), chosen.indices, counts), ExpertWeights(fc1, fc2, bias)


def reference(tokens, routing, weights, grad, adds_bias=True):
    """Output and the gradients of tokens, probabilities, fc1, fc2, bias: fp64, one expert after another."""
    x, p, fc1, fc2, bias = (
        t.double().requires_grad_() for t in (tokens, routing.weights, weights.fc1, weights.fc2, weights.bias)
    )
    output = torch.zeros_like(x)
    for expert in range(EXPERTS):
        y = (torch.nn.functional.silu(x @ fc1[expert, 0].t()) * (x @ fc1[expert, 1].t())) @ fc2[expert].t()
        y = y + (bias[expert] if adds_bias else 0.0)
        output = output + (p * (routing.experts == expert)).sum(1, keepdim=True) * y
    gradients = torch.autograd.grad(output, (x, p, fc1, fc2, bias), grad.double(), allow_unused=True)
    return [output.detach(), *gradients]


class NoLink:
    """One rank has nobody to send to."""

    def start(self, rows, send, receive):
        raise AssertionError("a transfer among one rank")


def run(groups, engine, tokens, routing, weights, grad, chunks, recompute=False, keep=True):
    form = RowFormat(HIDDEN, tokens.dtype)
    pipeline = ChunkPipeline(Dispatch(routing, groups, chunks, form), NoLink(), engine, recompute=recompute)
    output, kept = pipeline.forward(tokens, routing.weights, weights, keep)
    if not keep:
        assert not kept
        return [output]
    gradients = Gradients.of(weights, len(kept))
    return [output, *pipeline.backward(grad, weights, kept, gradients), *gradients.results()]


@pytest.mark.parametrize("route", ("even", "two_experts"))
@pytest.mark.parametrize("chunks,recompute", ((1, False), (3, True), (5, False), (50, False)))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_matches_the_plain_loop(groups, engine, dtype, chunks, recompute, route):
    tokens, routing, weights = make_case(route, dtype)
    grad = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    found = run(groups, ENGINES[engine], tokens, routing, weights, grad, chunks, recompute)
    names = ("output", "tokens", "probabilities", "fc1", "fc2", "bias")
    for name, value, expected in zip(names, found, reference(tokens, routing, weights, grad), strict=True):
        assert relative_error(value, expected) < TOLERANCE[dtype], name
    assert all(part.dtype == dtype for part in found[3:])
    (output,) = run(groups, ENGINES[engine], tokens, routing, weights, grad, chunks, keep=False)
    assert torch.equal(output, found[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slice_without_the_bias(groups, engine):
    """One of the ranks with slices of an expert adds the bias; all of them give it its gradient."""
    tokens, routing, weights = make_case("even", torch.float32)
    grad = torch.ones(TOKENS, HIDDEN)
    plain = replace(weights, adds_bias=False)
    found = run(groups, ENGINES[engine], tokens, routing, plain, grad, 2)
    expected = reference(tokens, routing, weights, grad, adds_bias=False)
    for value, wanted in zip(found[:5], expected[:5], strict=True):
        assert relative_error(value, wanted) < 1e-6
    assert relative_error(found[5], reference(tokens, routing, weights, grad)[5]) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_weight_gradients_go_into_main_grad(groups, engine, dtype):
    tokens, routing, weights = make_case("two_experts", dtype)
    grad = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected = reference(tokens, routing, weights, grad)[3:]
    for part in (weights.fc1, weights.fc2, weights.bias):
        part.main_grad, part.grad_added_to_main_grad = torch.ones(part.shape), False
    run(groups, ENGINES[engine], tokens, routing, weights, grad, 3)
    for part, wanted in zip((weights.fc1, weights.fc2, weights.bias), expected, strict=True):
        assert part.grad_added_to_main_grad
        assert relative_error(part.main_grad - 1, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "counts",
    ((3, 2, 4, 1), (0, 3, 2, 1), (3, 0, 0, 2), (2, 1, 3, 0), (0, 5, 0, 1), (0, 0, 4, 0), (0, 0, 0, 0)),
    ids=str,
)
@pytest.mark.parametrize("into_main", (False, True))
def test_experts_without_rows_take_no_part_in_the_grouped_product(monkeypatch, counts, into_main):
    """A product that ruins the matrices of groups without rows, as CUDA's has done: nobody may ask it for one."""
    real = F.grouped_mm

    def careless(a, b, offs):
        product, sizes = real(a, b, offs=offs), offs.diff(prepend=offs.new_zeros(1))
        product[sizes == 0] = torch.nan
        return product

    monkeypatch.setattr(F, "grouped_mm", careless)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(sum(counts), width, generator=generator) for width in (8, 12))
    parameter = torch.nn.Parameter(torch.ones(4, 8, 12))
    if into_main:
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones(4, 8, 12), False
    gradient = WeightGradient(parameter, 2)
    plan = SimpleNamespace(counts=counts, offsets=torch.tensor(counts).cumsum(0).to(torch.int32))
    for _ in range(2):
        gradient.add_grouped_product(a, b, plan)
        gradient.end_chunk()
    once = torch.stack([x.t() @ y for x, y in zip(a.split(counts), b.split(counts), strict=True)])
    torch.testing.assert_close(gradient.buffer, 2 * once + into_main)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_sum_of_groups_some_of_them_empty(dtype):
    rows = torch.arange(12.0, dtype=dtype).view(4, 3)
    bags, starts = torch.tensor([2, 0, 3], dtype=torch.int32), torch.tensor([0, 0, 2, 3], dtype=torch.int32)
    expected = torch.stack((rows[0] * 0, rows[2] + rows[0], rows[3], rows[0] * 0))
    assert torch.equal(sum_bags(rows, bags, starts), expected)
    none = sum_bags(rows, bags[:0], starts[:2] * 0)
    assert torch.equal(none, torch.zeros(2, 3, dtype=dtype))

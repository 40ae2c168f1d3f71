"""Blocks of the attention over ranks: each kernel against plain double precision, sums over blocks, wide types."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_telechat.backend import cpu_types
from megatron_telechat.backend.block_attention import Grads, Running, Saved, block_attention
from megatron_telechat.backend.block_attention.calls import calls
from megatron_telechat.backend.block_attention.cpu import CpuBlocks
from megatron_telechat.backend.block_attention.plain import PlainBlocks
from tests.model.test_parts import random, relative

ROWS, HEADS, GROUPS, WIDTH = 40, 4, 2, 16
OWN = ((0, 12, 0, 12), (12, 40, 0, 40))
OTHERS = ((3, 12, 0, 10), (12, 25, 0, 30), (25, 40, 10, 40))
"""Queries 0 to 2 see no key of the other rank."""


def seen_keys() -> tuple[Tensor, Tensor]:
    """bool [queries, own keys], [queries, keys of another rank]."""
    own, others = torch.zeros(2, ROWS, ROWS, dtype=torch.bool)
    for q0, q1, k0, k1 in OWN:
        own[q0:q1, k0:k1] = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - (q1 - q0)).bool()
    for q0, q1, k0, k1 in OTHERS:
        others[q0:q1, k0:k1] = True
    return own, others


def parts(dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, keys and values of another rank, gradient of the output."""
    heads = (HEADS, GROUPS, GROUPS, GROUPS, GROUPS, HEADS)
    return [random(ROWS, count, WIDTH, seed=seed).to(dtype) for seed, count in enumerate(heads)]


def exact() -> list[Tensor]:
    """Output and gradients in double precision, in one product over all keys."""
    query, key, value, far_key, far_value, grad = (part.double() for part in parts(torch.float32))
    leaves = [part.requires_grad_() for part in (query, key, value, far_key, far_value)]
    keys, values = torch.cat((key, far_key)), torch.cat((value, far_value))
    keys, values = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(WIDTH)
    weights = scores.masked_fill(~torch.cat(seen_keys(), 1), -math.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_blocks(kernel, dtype: torch.dtype) -> list[Tensor]:
    query, key, value, far_key, far_value, grad = parts(dtype)
    ready = [kernel.prepared(part) for part in (query, key, value, far_key, far_value)]
    total = Running(query)
    kernel.forward(*ready[:3], OWN, True, total)
    kernel.forward(ready[0], *ready[3:], OTHERS, False, total)
    saved = Saved(kernel, grad, query, total.out.to(dtype), total.lse)
    near = Grads(*(torch.zeros_like(part, dtype=torch.float32) for part in (query, key, value)))
    far = near.with_keys(*(torch.zeros_like(part, dtype=torch.float32) for part in (far_key, far_value)))
    kernel.backward(saved, *ready[1:3], OWN, True, near)
    kernel.backward(saved, *ready[3:], OTHERS, False, far)
    return [total.out, near.query, near.key, near.value, far.key, far.value]


@pytest.mark.parametrize("kernel", [CpuBlocks(), PlainBlocks()], ids=["cpu", "plain"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_blocks_add_up_to_the_attention(kernel, dtype, limit):
    for name, found, wanted in zip("o q k v k' v'".split(), by_blocks(kernel, dtype), exact(), strict=True):
        assert relative(found, wanted) < limit, name


def test_the_sum_does_not_overflow():
    total = Running(torch.zeros(2, 1, 4))
    total.begin(slice(0, 2), torch.ones(2, 1, 4), torch.tensor([[500.0, -500.0]]))
    total.add(slice(0, 2), torch.full((2, 1, 4), 3.0), torch.tensor([[500.0, 500.0]]))
    assert torch.allclose(total.out[:, 0, 0], torch.tensor([2.0, 3.0]), rtol=1e-4)
    assert torch.allclose(total.lse, torch.tensor([[500.0 + math.log(2), 500.0]]))


def test_rows_by_number_are_rows_by_slice():
    query = torch.zeros(6, 2, 4)
    by_slice, by_number = Running(query), Running(query)
    for step in range(2):
        out, lse = random(3, 2, 4, seed=step).float(), random(2, 3, seed=step + 5).float()
        for total, rows in ((by_slice, slice(2, 5)), (by_number, torch.tensor([2, 3, 4]))):
            (total.add if step else total.begin)(rows, out, lse)
    assert torch.equal(by_slice.out[2:5], by_number.out[2:5]) and torch.equal(by_slice.lse, by_number.lse)


def test_blocks_that_share_keys_are_no_call():
    device = torch.device("cpu")
    found = calls(OTHERS, device)
    assert len(found) == 2
    for call in found:
        assert call.query_bounds.tolist() == [0, *call.query_ends] and call.key_bounds.tolist() == [0, *call.key_ends]
    (one,) = calls(((0, 4, 0, 4), (6, 9, 4, 9)), device)
    assert one.keys == slice(0, 9) and one.queries.tolist() == [0, 1, 2, 3, 6, 7, 8] and one.longest == (4, 5)


def test_types_that_a_kernel_does_not_take_are_plain_products():
    assert isinstance(block_attention(torch.zeros(1, 1, 8)), CpuBlocks)
    assert isinstance(block_attention(torch.zeros(1, 1, 8, dtype=torch.int32)), PlainBlocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_attention_keeps_what_the_plain_one_keeps_and_is_no_less_exact(monkeypatch, dtype):
    monkeypatch.setattr(cpu_types, "_multiplies_bf16", lambda: False)
    heads = [random(1, count, 48, WIDTH, seed=seed).to(dtype) for seed, count in enumerate((4, 2, 2, 4))]

    def run(attend, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in heads[:3]]
        held = 0

        def keep(tensor):
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attend(*leaves)
        return held, [out.detach(), *torch.autograd.grad(out, leaves, heads[3].to(dtype))]

    def plain(*parts):
        return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

    _, wanted = run(plain, torch.float64)
    (held, found), (held_plain, found_plain) = run(cpu_types.attend, dtype), run(plain, dtype)
    assert held == held_plain and all(part.dtype == dtype for part in found)
    for one, other, right in zip(found, found_plain, wanted, strict=True):
        assert relative(one, right) <= 1.05 * relative(other, right)

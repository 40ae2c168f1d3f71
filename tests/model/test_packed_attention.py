"""Attention within documents in one call, and the order of heads in memory: what a GPU is given and gives back."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_telechat.backend import varlen
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.model.attention import (
    Segments,
    SelfAttention,
    TorchCoreAttention,
    within_segments_at_once,
)
from megatron_telechat.model.rotary import RotaryEmbedding, SplitAndRotate
from tests.model.test_parts import gradients, random, relative

SEGMENTS = Segments(((3, 1, 6), (10,), (4, 6)))
CONFIG = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)


def plain_attend(query, key, value, bounds, longest):
    """What torch's varlen_attn is documented to do, by one masked product over the tokens of all rows."""
    total = query.shape[0]
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == total
    assert longest == bounds.diff().max()
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    owner = torch.bucketize(torch.arange(total), bounds[1:], right=True)
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(total, total).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), value)


def heads(batch: int, dtype=torch.float64):
    return [random(batch, count, 10, 8, seed=count).to(dtype) for count in (8, 2, 2)]


@pytest.mark.parametrize("segments", [SEGMENTS, Segments(((2, 7, 1),))], ids=["three rows", "one row"])
def test_one_call_gives_what_one_call_a_document_gives(segments):
    core = TorchCoreAttention(CONFIG, 1, None)
    parts = heads(len(segments.rows))
    loop = gradients(lambda *qkv: core(*qkv, segments), *parts)

    def at_once(*qkv):
        return within_segments_at_once(plain_attend, qkv, segments).permute(2, 0, 1, 3).flatten(2)

    assert max(map(relative, gradients(at_once, *parts), loop)) < 1e-12


def test_bounds_are_made_once_for_each_device():
    segments = Segments(SEGMENTS.rows)
    bounds = segments.bounds(torch.device("cpu"))
    assert bounds.tolist() == [0, 3, 4, 10, 20, 24, 30] and segments.longest == 10
    assert segments.bounds(torch.device("cpu")) is bounds
    assert segments == SEGMENTS and hash(segments) == hash(SEGMENTS)


@pytest.fixture
def gpu(monkeypatch):
    """The answers of a GPU for tensors of the CPU, and a varlen_attn that works on them; which calls it got."""
    calls = []

    def attend(*operands):
        calls.append(operands)
        return plain_attend(*operands)

    for module in ("backend.varlen", "model.attention"):
        monkeypatch.setattr(f"megatron_telechat.{module}.traits_of", lambda device: DEVICE_KINDS["cuda"])
    monkeypatch.setattr(varlen, "attend", attend)
    monkeypatch.setattr(varlen, "usable", lambda device: True)
    segments = Segments(SEGMENTS.rows)
    segments._bounds[torch.device("cpu")] = torch.tensor([0, 3, 4, 10, 20, 24, 30], dtype=torch.int32)  # else pinned
    return SimpleNamespace(calls=calls, segments=segments)


def test_documents_are_one_call_where_the_device_has_one(gpu):
    core = TorchCoreAttention(CONFIG, 1, None)
    parts = heads(3, torch.bfloat16)
    found = core(*parts, gpu.segments)
    assert len(gpu.calls) == 1 and found.dtype == torch.bfloat16
    exact = core(*(part.double() for part in parts), gpu.segments)  # no 16-bit type: document by document
    assert len(gpu.calls) == 1 and relative(found, exact) < 1e-2


@pytest.mark.parametrize(
    "dtype, width, whole, dropout",
    [
        (torch.float32, 8, False, 0.0),
        (torch.bfloat16, 12, False, 0.0),  # scaled_dot_product_attention pads it
        (torch.bfloat16, 264, False, 0.0),
        (torch.bfloat16, 8, True, 0.0),  # one document a row: the dense kernel
        (torch.bfloat16, 8, False, 0.5),
    ],
)
def test_what_the_kernel_does_not_take_stays_with_the_loop(gpu, dtype, width, whole, dropout):
    core = TorchCoreAttention(SimpleNamespace(attention_dropout=dropout, sequence_parallel=True), 1, None)
    segments = Segments(((10,),) * 3) if whole else gpu.segments
    query, key, value = (random(3, 2, 10, width, seed=seed).to(dtype) for seed in range(3))
    assert core(query, key, value, segments).shape == (10, 3, 2 * width) and not gpu.calls


def test_the_cpu_has_no_such_call():
    assert not varlen.takes(torch.zeros(1, 8, 10, 8, dtype=torch.bfloat16))


@pytest.mark.skipif(not varlen.has_arguments(), reason="this torch's varlen_attn knows no query groups")
def test_torch_takes_the_call_and_says_the_same_shapes():
    """By torch's own registration for tensors without values: names and order of arguments, shapes, autograd."""
    query, key, value = (
        torch.empty(30, count, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for count in (8, 2, 2)
    )
    bounds = torch.empty(7, dtype=torch.int32, device="meta")
    out = varlen.attend(query, key, value, bounds, 10)
    assert out.shape == query.shape and out.dtype == query.dtype
    grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


def test_a_call_that_fails_its_check_is_left_out_with_a_warning(monkeypatch):
    """On the CPU torch has no kernel for it, as on a GPU that FlashAttention does not know."""
    varlen.usable.cache_clear()
    monkeypatch.setattr(varlen, "has_arguments", lambda: True)
    with pytest.warns(UserWarning, match="varlen_attn is not used .* a call of its own"):
        assert not varlen.usable(torch.device("cpu"))
    varlen.usable.cache_clear()


@pytest.mark.parametrize("wrong", [None, "keys of others", "over the borders"])
def test_the_check_finds_what_is_wrong(monkeypatch, wrong):
    def attend(query, key, value, bounds, longest):
        if wrong == "over the borders":
            bounds, longest = bounds[[0, -1]], query.shape[0]
        if wrong == "keys of others":
            key = key.flip(0)
        return plain_attend(query, key, value, bounds, longest)

    monkeypatch.setattr(varlen, "attend", attend)
    if wrong is None:
        varlen.check(torch.device("cpu"))
    else:
        with pytest.raises(ArithmeticError, match="off by"):
            varlen.check(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_heads_lie_in_memory_as_the_device_likes(monkeypatch, kind):
    """The same numbers in the same shape; on a GPU the heads of a token side by side."""
    monkeypatch.setattr("megatron_telechat.model.attention.traits_of", lambda device: DEVICE_KINDS[kind])
    model = SimpleNamespace(
        head_dim=8, rotary_base=1e4, rotary_training_seqlen=None, rotary_base_seqlen=None, rotary_table_dtype="fp32"
    )
    tables = RotaryEmbedding(model)(10, torch.device("cpu"))
    layer = SimpleNamespace(core_attention=TorchCoreAttention(CONFIG, 1, None))
    mixed = random(10, 2, 2, 6, 8).float()
    expected = gradients(lambda x: torch.cat(SplitAndRotate.apply(x, *tables, True), 1), mixed)
    found = gradients(lambda x: torch.cat(SelfAttention._heads(layer, x, tables), 1), mixed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for part in SelfAttention._heads(layer, mixed, tables):
        assert (part if kind == "cpu" else part.permute(2, 0, 1, 3)).is_contiguous()


@pytest.mark.parametrize("side_by_side", [True, False])
def test_flash_attention_gives_its_output_in_the_order_of_the_query(side_by_side):
    """By torch's registration for tensors without values: then what the projection reads is a view of it."""
    shape = (10, 2, 8, 16) if side_by_side else (2, 8, 10, 16)
    query = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    query = query.permute(1, 2, 0, 3) if side_by_side else query
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, query, query, 0.0, True)[0]
    assert out.shape == (2, 8, 10, 16) and out.permute(2, 0, 1, 3).is_contiguous() == side_by_side

"""The kernels of torch_npu as the package uses them, with a stand-in of plain torch behind its functions.

What passes here says that the arguments are right as far as they are documented. It says nothing about the kernels of
an Ascend device, where each is checked before its first use.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_telechat.backend import kernels as package
from megatron_telechat.backend.grouped import grouped_product
from megatron_telechat.backend.kernels import FAMILIES, kernels
from megatron_telechat.model.attention import Segments, TorchCoreAttention, heads_first
from megatron_telechat.model.mlp import swiglu
from megatron_telechat.model.norm import rms_norm
from megatron_telechat.model.rotary import SplitAndRotate
from tests.backend import torch_npu_stand_in as stand_in
from tests.backend import worker_ascend as worker
from tests.backend.ascend_here import ascend_here
from tests.harness import run_cases
from tests.model.test_parts import gradients, random, relative

_, NAMES = FAMILIES["torch_npu"]
CPU = torch.device("cpu")


@pytest.fixture
def ascend():
    with ascend_here(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that is left out says so
        yield


@pytest.mark.parametrize("name", NAMES)
def test_each_kernel_passes_its_check(ascend, name):
    module = kernels(name, torch.zeros(1, dtype=torch.bfloat16))
    assert module is not None and module.__name__ == f"{package.__name__}.ascend.{name}"
    assert module.torch_npu is not None and stand_in.calls


def test_the_check_may_come_first_in_a_forward_without_gradients(ascend):
    with torch.no_grad(), torch.device("meta"):
        assert package.usable("attention", CPU)
    package.usable.cache_clear()
    with torch.inference_mode():
        assert package.usable("norm", CPU)


def test_types_that_a_kernel_does_not_take(ascend):
    assert kernels("attention", torch.zeros(1)) is None, "its fp32 is not held to fp32"
    assert kernels("norm", torch.zeros(1)) is not None
    assert all(kernels(name, torch.zeros(1, dtype=torch.float64)) is None for name in NAMES)
    assert kernels("adding", torch.zeros(1)) is None, "a kernel of the other family"


def exchanged_halves(self, dim=-1):
    gate, up = self.chunk(2, dim)
    return stand_in.npu_swiglu(torch.cat((up, gate), dim), dim)


def acausal(query, key, value, **options):
    return stand_in.npu_fusion_attention(query, key.flip(0), value.flip(0), **options)


def without_gamma(dy, self, gamma, rstd):
    return stand_in.npu_rms_norm_backward(dy, self, torch.ones_like(gamma), rstd)


def other_way_round(input, r1, r2, rotary_mode="half", rotate=None):
    return stand_in.npu_rotary_mul(input, r1, -r2, rotary_mode, rotate)


def shifted_groups(x, weight, *, group_list, **options):
    ends = group_list.clone()
    if len(ends) > 1:
        ends[0] += 1
    return stand_in.npu_grouped_matmul(x, weight, group_list=ends, **options)


@pytest.mark.parametrize(
    "name, function, wrong",
    [
        ("swiglu", "npu_swiglu", exchanged_halves),
        ("attention", "npu_fusion_attention", acausal),
        ("norm", "npu_rms_norm_backward", without_gamma),
        ("rotary", "npu_rotary_mul", other_way_round),
        ("grouped", "npu_grouped_matmul", shifted_groups),
    ],
)
def test_a_kernel_that_computes_wrong_is_left_out(name, function, wrong):
    with ascend_here(**{function: wrong}):
        with pytest.warns(UserWarning, match=f"the torch_npu kernel '{name}' is not used"):
            assert kernels(name, torch.zeros(1, dtype=torch.bfloat16)) is None
        assert kernels(name, torch.zeros(1, dtype=torch.bfloat16)) is None


def test_without_the_grouped_kernel_the_products_come_one_by_one(monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", None)  # would copy to the host
    a, b = random(9, 8).float(), random(3, 8, 5, seed=1).float()
    counts, ends = (4, 0, 5), torch.tensor([4, 4, 9], dtype=torch.int32)
    with ascend_here(npu_grouped_matmul=shifted_groups), pytest.warns(UserWarning, match="'grouped' is not used"):
        found = grouped_product(a, b, ends, counts)
    assert relative(found, torch.cat((a[:4] @ b[0], a[4:] @ b[2]))) < 1e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm(ascend, dtype, bound, strided):
    x, weight = random(7, 2, 3, 48).to(dtype), (1 + 0.2 * random(48, seed=3)).to(dtype)

    def ours(a, b):
        return rms_norm(a[:, :, :2] if strided else a, b, 1e-5)

    def plain(a, b):
        a = a[:, :, :2] if strided else a
        return a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5) * b

    found = gradients(ours, x, weight)
    assert max(map(relative, found, gradients(plain, x.double(), weight.double()))) < bound
    assert {part.dtype for part in found} == {dtype} and stand_in.calls["npu_rms_norm_backward"] > 3


def test_rms_norm_rounds_before_the_weight(ascend):
    x, weight = random(64, 96).bfloat16(), (1 + random(96, seed=2)).bfloat16()
    rounded = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert (rms_norm(x, weight, 1e-5) == rounded * weight).float().mean() > 0.999


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_swiglu(ascend, dtype, bound):
    x = random(5, 2, 48).to(dtype)
    found = gradients(swiglu, x)

    def plain(both):
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    assert max(map(relative, found, gradients(plain, x.double()))) < bound
    assert stand_in.calls["npu_swiglu_backward"] > 6 and x.equal(random(5, 2, 48).to(dtype))


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("batch, own_positions", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rotary(dtype, bound, batch, own_positions, order):
    mixed = random(9, batch, 2, 5, 16).to(dtype)
    angles = random(9, batch if own_positions else 1, 1, 1, 8, seed=4).float()
    cos, sin = angles.cos(), angles.sin()

    def function(x):
        return torch.cat([part.flatten() for part in SplitAndRotate.apply(x, cos, sin, order)])

    expected = gradients(function, mixed.float())
    with ascend_here():
        assert max(map(relative, gradients(function, mixed), expected)) < bound
        assert stand_in.calls["npu_rotary_mul"] > 20


def attention(**changes) -> TorchCoreAttention:
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False, **changes)
    return TorchCoreAttention(config, layer_number=1, pg_collection=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "rows", [None, ((12,), (12,)), ((5, 7), (1, 10, 1)), ((12,), (3, 9))], ids=["none", "whole", "cut", "one of two"]
)
def test_attention(groups, rows):
    core = attention()
    query, key, value = (random(12, 2, n, 16, seed=seed) for seed, n in enumerate((4, groups, groups)))
    segments = None if rows is None else Segments(rows)

    def reference(*heads):
        return core(*(part.permute(1, 2, 0, 3) for part in heads), segments)

    rounded = [part.bfloat16() for part in (query, key, value)]
    expected = gradients(reference, *(part.float() for part in rounded))
    with ascend_here():
        assert not heads_first(core, rounded[0]) and heads_first(core, query.float())
        found = gradients(lambda *heads: core(*heads, segments), *rounded)
        assert max(map(relative, found, expected)) < 1.2e-2
        layout = "SBH" if rows is None or all(len(row) == 1 for row in rows) else "TND"
        before = stand_in.calls[f"npu_fusion_attention {layout}"]
        core(*rounded, segments)
        assert stand_in.calls[f"npu_fusion_attention {layout}"] == before + 1


def test_more_stretches_than_one_call_takes(ascend):
    core = attention()
    heads = [random(1030, 1, 2, 8, seed=seed).bfloat16() for seed in range(3)]
    rows = ((1,) * 1024 + (6,),)
    found = core(*heads, Segments(rows))
    assert stand_in.calls["npu_fusion_attention TND"] >= 2
    # Alone in its stretch, a token sees itself.
    assert relative(found[:1024].view(1024, 1, 2, 8), heads[2][:1024]) < 1e-6
    scores = torch.einsum("shd,thd->hst", *(part[1024:, 0].double() for part in heads[:2])) / math.sqrt(8)
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1)
    expected = torch.einsum("hst,thd->shd", weights, heads[2][1024:, 0].double())
    assert relative(found[1024:, 0].view(6, 2, 8), expected) < 1e-2


def test_dropout_of_the_attention_is_the_kernels():
    core = attention().train()
    core.dropout = 0.5
    core.fork_rng = False
    heads = [random(64, 1, 2, 8, seed=seed).bfloat16() for seed in range(3)]
    with ascend_here():
        torch.manual_seed(1)
        dropped = core(*heads)
        core.eval()
        assert not torch.equal(dropped, core(*heads))


@pytest.fixture(scope="module")
def report():
    return run_cases(Path(worker.__file__), nproc=worker.WORLD, timeout=300)


@pytest.mark.gloo
@pytest.mark.parametrize("name", worker.LAYOUTS)
def test_the_whole_model(report, name):
    """Losses and gradients with all kernels and with none; the types round at other places."""
    narrow, mixture = name.endswith("bf16"), name.startswith("moe")
    for rank in report.check(name):
        assert rank["loss"] < (2e-3 if narrow else 1e-6), rank
        assert rank["gradient"] < (3e-2 if narrow else 1e-5), rank
        used = {"npu_rms_norm", "npu_rms_norm_backward", "npu_rotary_mul", "npu_swiglu", "npu_swiglu_backward"}
        used |= {"npu_fusion_attention"} if narrow else set()
        used |= {"npu_grouped_matmul"} if mixture else set()
        assert used <= set(rank["calls"]), rank

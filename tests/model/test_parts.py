"""Norm, SwiGLU, rotary embedding and core attention against plain fp64 references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.model.attention import Segments, TorchCoreAttention, normalise_heads
from megatron_telechat.model.mlp import swiglu
from megatron_telechat.model.norm import CpuRMSNorm, FusedRMSNorm, RMSNorm, rms_norm
from megatron_telechat.model.rotary import RotaryEmbedding, SplitAndRotate, attention_scaling, ntk_alpha

EPS = 1e-5


def gradients(function, *inputs: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """Output and input gradients of a function under a fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("function", [CpuRMSNorm, FusedRMSNorm])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rms_norm_and_its_gradients(function, dtype, bound):
    x, weight = random(7, 2, 48).to(dtype), (1 + 0.2 * random(48, seed=3)).to(dtype)
    ours = gradients(lambda a, b: function.apply(a, b, EPS), x, weight)
    reference = gradients(reference_norm, x.double(), weight.double())
    assert max(map(relative, ours, reference)) < bound
    assert {t.dtype for t in ours} == {dtype}


@pytest.mark.parametrize("function", [CpuRMSNorm, FusedRMSNorm])
def test_rms_norm_rounds_before_the_weight(function):
    x, weight = random(64, 96).bfloat16(), (1 + random(96, seed=2)).bfloat16()
    x32 = x.float()
    normalised = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    ours = function.apply(x, weight, EPS)
    # the two ways to sum the squares may round a row's scale differently in fp32, so: nearly all bits
    assert (ours == normalised * weight).float().mean() > 0.999
    late = (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).bfloat16()
    assert (ours == late).float().mean() < 0.95


def test_queries_and_keys_are_normalised_head_by_head():
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False)
    norms = [RMSNorm(config, 8, EPS) for _ in range(2)]
    weights = [random(8, seed=1), random(8, seed=2)]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data.copy_(weight)
    mixed = random(5, 2, 3, 4, 8)

    def plain(x: torch.Tensor) -> torch.Tensor:
        heads = [reference_norm(x[..., head, :], weights[head == 2]) for head in range(3)]
        return torch.stack([*heads, x[..., 3, :]], dim=3)

    ours, theirs = gradients(lambda x: normalise_heads(x, *norms), mixed), gradients(plain, mixed)
    assert all(relative(one, other) < 1e-6 for one, other in zip(ours, theirs, strict=True))


def test_rms_norm_takes_the_function_of_the_device():
    x = random(3, 8).float().requires_grad_()
    assert type(rms_norm(x, torch.ones(8), EPS).grad_fn).__name__ == "CpuRMSNormBackward"


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_swiglu_and_its_gradient(dtype, bound):
    gate_up = random(5, 2, 64).to(dtype)

    def plain(x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    ours, reference = gradients(swiglu, gate_up), gradients(plain, gate_up.double())
    assert max(map(relative, ours, reference)) < bound


def model(**changes) -> ModelConfig:
    fields = dict(hidden_size=256, num_attention_heads=2, rotary_training_seqlen=8192, rotary_base_seqlen=8192)
    return ModelConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    "length, training, base, alpha, theta, m",
    [
        (512, 8192, 8192, 1, 10000.0, 1.0),
        (8192, 8192, 8192, 1, 10000.0, 1.0),
        (8193, 8192, 8192, 3, 30527.7, 1.000012),
        (16384, 8192, 8192, 3, 30527.7, 1.069315),
        (32768, 8192, 8192, 7, 72195.9, 1.138629),
        (65536, 8192, 8192, 15, 156588.3, 1.207944),
        (131072, 8192, 8192, 31, 327366.4, 1.277259),
        (262144, 8192, 8192, 63, 672824.1, 1.346574),
        (100, 8192, 4096, 3, 30527.7, 1.0),
        (16384, 8192, 4096, 7, 72195.9, 1.069315),
        (65536, 32768, 32768, 3, 30527.7, 1.069315),
        (262144, 32768, 32768, 15, 156588.3, 1 + 0.1 * math.log(8)),
    ],
)
def test_scaling_with_the_length(length, training, base, alpha, theta, m):
    rotary = RotaryEmbedding(model(rotary_training_seqlen=training, rotary_base_seqlen=base))
    assert ntk_alpha(length, training, base) == alpha
    assert rotary.scaled_theta(length) == pytest.approx(theta, rel=2e-6)
    assert attention_scaling(length, training) == pytest.approx(m, abs=1e-6)


def test_tables_hold_scaling_and_frequencies():
    rotary = RotaryEmbedding(model(rotary_training_seqlen=32, rotary_base_seqlen=32))
    cos, sin = rotary(64, torch.device("cpu"))
    theta = 10000.0 * 3 ** (128 / 126)
    angles = torch.outer(torch.arange(64.0).double(), theta ** (-torch.arange(0, 128, 2).double() / 128))
    m = 1 + 0.1 * math.log(2)
    assert torch.allclose(cos.double().view(64, 64), m * angles.cos(), atol=1e-5)
    assert torch.allclose(sin.double().view(64, 64), m * angles.sin(), atol=1e-5)
    assert rotary(64, torch.device("cpu"))[0] is cos


def test_fp16_tables_are_rounded_after_the_scaling():
    rotary = RotaryEmbedding(model(rotary_training_seqlen=32, rotary_base_seqlen=32, rotary_table_dtype="fp16"))
    cos, _ = rotary(64, torch.device("cpu"))
    assert cos.dtype == torch.float32 and torch.equal(cos, cos.half().float())


def test_without_training_seqlen_nothing_scales():
    rotary = RotaryEmbedding(model(rotary_training_seqlen=None, rotary_base_seqlen=None, rotary_base=1e6))
    assert rotary.scaled_theta(10**6) == 1e6
    cos, _ = rotary(100, torch.device("cpu"))
    assert cos.max() == 1.0


def test_positions_of_their_own():
    rotary = RotaryEmbedding(model())
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    cos, sin = rotary(5, torch.device("cpu"), positions)
    plain = rotary(5, torch.device("cpu"))
    assert cos.shape == (5, 2, 1, 1, 64)
    assert torch.equal(cos[:, 1], plain[0][:, 0])
    assert torch.equal(sin[3:, 0], plain[1][:2, 0])


def reference_rotation(mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int):
    """HF's formula on [s, b, groups, rep + 2, d]: x * cos + rotate_half(x) * sin, tables repeated over the halves."""
    rep = mixed.shape[3] - 2
    cos, sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    query, key, value = rotate(mixed[..., :rep, :]), rotate(mixed[..., rep : rep + 1, :]), mixed[..., rep + 1 :, :]
    return [t.flatten(2, 3).permute(1, 2, 0, 3) for t in (query, key, value)]


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("groups, rep, batch", [(3, 1, 1), (2, 4, 3)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_split_and_rotate(groups, rep, batch, heads_first, dtype, bound):
    mixed = random(9, batch, groups, rep + 2, 16).to(dtype)
    tables = RotaryEmbedding(
        ModelConfig(hidden_size=16, num_attention_heads=1, rotary_training_seqlen=4, rotary_base_seqlen=4)
    )(9, torch.device("cpu"))

    def ours(x):
        out = SplitAndRotate.apply(x, *tables, heads_first)
        assert all(t.is_contiguous() for t in out)
        if not heads_first:
            out = [t.permute(1, 2, 0, 3) for t in out]
        return torch.cat([t.flatten() for t in out])

    def plain(x):
        return torch.cat([t.flatten() for t in reference_rotation(x, *(t.double() for t in tables), groups)])

    assert max(map(relative, gradients(ours, mixed), gradients(plain, mixed.double()))) < bound


@pytest.mark.parametrize("groups", [2, 4])
def test_core_attention(groups):
    from megatron_telechat.model.attention import TorchCoreAttention

    core = TorchCoreAttention(
        SimpleNamespace(attention_dropout=0.0, sequence_parallel=False), layer_number=1, pg_collection=None
    )
    query, key, value = random(2, 4, 11, 16), random(2, groups, 11, 16, seed=1), random(2, groups, 11, 16, seed=2)

    def plain(q, k, v):
        k, v = (t.repeat_interleave(4 // groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~torch.ones(11, 11).tril().bool(), -math.inf)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(11, 2, 64)

    ours = gradients(core, query.float(), key.float(), value.float())
    assert max(map(relative, ours, gradients(plain, query, key, value))) < 1e-5


def test_core_attention_within_segments_is_a_block_diagonal_causal_mask():
    """Against one masked product in fp64, gradients included; query groups, several rows with other borders each."""
    lengths = torch.tensor([3, 1, 6, 10, 4, 6])
    segments = Segments.of(lengths, batch=3)
    assert segments.rows == ((3, 1, 6), (10,), (4, 6))
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    core = TorchCoreAttention(config, 1, None)
    query, key, value = random(3, 8, 10, 4), random(3, 2, 10, 4, seed=1), random(3, 2, 10, 4, seed=2)
    owner = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in segments.rows])
    allowed = (owner[:, :, None] == owner[:, None, :]) & torch.ones(10, 10).tril().bool()

    def reference(q, k, v):
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) / 2.0).masked_fill(~allowed[:, None], float("-inf"))
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)

    ours = gradients(lambda q, k, v: core(q, k, v, segments), query, key, value)
    theirs = gradients(reference, query, key, value)
    assert max(map(relative, ours, theirs)) < 1e-12
    plain = gradients(core, query, key, value)
    assert relative(plain[0], theirs[0]) > 0.1
    whole = gradients(lambda q, k, v: core(q, k, v, Segments(((10,),) * 3)), query, key, value)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))

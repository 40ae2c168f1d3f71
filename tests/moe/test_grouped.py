"""The grouped SwiGLU against a loop over the experts written with autograd."""

from __future__ import annotations

import pytest
import torch

from megatron_telechat.moe.grouped import grouped_swiglu
from tests.moe.reference import relative_error

HIDDEN, WIDTH = 16, 24
COUNTS = {"uneven": [5, 0, 9, 2], "one expert": [0, 0, 0, 16], "no row": [0, 0, 0, 0]}
ENGINES = [
    pytest.param(torch.float64, True, 1e-14, id="loop-fp64"),
    pytest.param(torch.float32, True, 5e-7, id="loop-fp32"),
    pytest.param(torch.bfloat16, True, 1e-2, id="loop-bf16"),
    pytest.param(torch.float32, False, 5e-7, id="grouped_mm-fp32"),
    pytest.param(torch.bfloat16, False, 1e-2, id="grouped_mm-bf16"),
]


def expected_output(rows, probabilities, fc1, fc2, bias, counts):
    parts, start = [], 0
    for expert, count in enumerate(counts):
        x = rows[start : start + count]
        out = (torch.nn.functional.silu(x @ fc1[expert, 0].t()) * (x @ fc1[expert, 1].t())) @ fc2[expert].t()
        if bias is not None:
            out = out + bias[expert]
        parts.append(out * probabilities[start : start + count, None])
        start += count
    return torch.cat(parts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype, loop, tolerance", ENGINES)
def test_against_plain_autograd(counts, with_bias, dtype, loop, tolerance):
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape, kind=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / 3).to(kind).requires_grad_()

    experts, total = len(counts), sum(counts)
    probabilities = leaf(total, kind=torch.promote_types(dtype, torch.float32))
    leaves = [leaf(total, HIDDEN), probabilities, leaf(experts, 2, WIDTH, HIDDEN), leaf(experts, HIDDEN, WIDTH)]
    leaves.append(leaf(experts, HIDDEN) if with_bias else None)
    given = [value for value in leaves if value is not None]
    doubles = [None if value is None else value.detach().double().requires_grad_() for value in leaves]

    output = grouped_swiglu(*leaves, torch.tensor(counts), loop=loop)
    expected = expected_output(*doubles, counts)
    assert output.dtype == dtype and relative_error(output, expected) < tolerance
    # A sum hands back a gradient with stride 0.
    found = torch.autograd.grad(output.sum(), given)
    wanted = torch.autograd.grad(expected.sum(), [value for value in doubles if value is not None])
    for gradient, reference, value in zip(found, wanted, given, strict=True):
        assert gradient.shape == value.shape and gradient.dtype == value.dtype
        assert relative_error(gradient, reference) < tolerance


def test_a_bias_added_elsewhere_still_gets_its_gradient():
    """Ranks that hold slices of the width sum their outputs: one adds the bias, all keep the same copy of it."""
    counts = torch.tensor([3, 5])
    rows, probabilities = torch.randn(8, HIDDEN), torch.rand(8)
    fc1, fc2 = torch.randn(2, 2, WIDTH, HIDDEN), torch.randn(2, HIDDEN, WIDTH)
    bias = torch.randn(2, HIDDEN, requires_grad=True)
    with_bias = grouped_swiglu(rows, probabilities, fc1, fc2, bias, counts)
    (expected,) = torch.autograd.grad(with_bias.square().sum(), bias)
    without = grouped_swiglu(rows, probabilities, fc1, fc2, bias, counts, adds_bias=False)
    torch.testing.assert_close(without, grouped_swiglu(rows, probabilities, fc1, fc2, None, counts))
    (found,) = torch.autograd.grad(without, bias, grad_outputs=2 * with_bias.detach())
    torch.testing.assert_close(found, expected)

"""The test that TransformerEngine's grouped product has to pass before it is used; the product itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_telechat.moe.te_products import _check


def product(buffer: torch.Tensor, a: torch.Tensor, b: torch.Tensor, counts, fresh: bool) -> None:
    for part, x, y in zip(buffer, a.split(counts), b.split(counts), strict=True):
        part.copy_(x.float().t() @ y.float() + (0 if fresh else part))


@pytest.mark.parametrize("default", ("cpu", "meta"))
def test_a_right_product_passes_whatever_the_default_device(default):
    """Modules are built with the device of the rank as default; numbers of a CPU generator cannot be drawn there."""
    with torch.device(default):
        _check(product, torch.device("cpu"), torch.bfloat16)


def test_a_product_that_forgets_to_replace_does_not_pass():
    def adds(buffer, a, b, counts, fresh) -> None:
        product(buffer, a, b, counts, False)

    with pytest.raises(ArithmeticError, match="off by"):
        _check(adds, torch.device("cpu"), torch.bfloat16)

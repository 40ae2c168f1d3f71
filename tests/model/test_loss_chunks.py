"""The loss in chunks against torch's cross entropy in fp64: losses, gradients, and what is held at once.

Over tensor-parallel ranks: test_model.py. In whole runs: tests/training/test_parity.py.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_telechat.model.loss_chunks import Layout, chunked_loss

LENGTH, BATCH, HIDDEN, VOCABULARY = 33, 2, 16, 96
ROWS = LENGTH * BATCH
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def material(dtype: torch.dtype = torch.float32, scale: float = 1.0):
    """hidden [s, b, h], weight [v, h], labels [b, s], and gradients of the losses, of which a chunk's worth is 0."""
    generator = torch.Generator().manual_seed(11)
    hidden = (torch.randn(LENGTH, BATCH, HIDDEN, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.5).to(dtype))
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    direction = torch.rand(BATCH, LENGTH, generator=generator)
    direction[:, 5:20] = 0.0
    return hidden, weight, labels, direction


def reference(hidden, weight, labels, direction):
    """The same in fp64, all rows at once."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t()).transpose(0, 1).reshape(-1, VOCABULARY)
    loss = F.cross_entropy(logits, labels.reshape(-1), reduction="none").view(labels.shape)
    loss.backward(direction.double())
    return loss.detach(), hidden.grad, weight.grad


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", (1, 7, 24, ROWS, 1000))
def test_losses_and_gradients_are_those_of_all_rows_at_once(dtype, rows):
    made = material(dtype)
    hidden, weight, labels, direction = made
    loss = chunked_loss(hidden, weight, labels, Layout(None, False, rows))
    loss.backward(direction)
    expected, of_hidden, of_weight = reference(*made)
    assert loss.dtype == torch.float32 and loss.shape == labels.shape
    assert relative(loss.detach(), expected) <= TOLERANCE[dtype]
    assert relative(hidden.grad, of_hidden) <= TOLERANCE[dtype]
    assert relative(weight.grad, of_weight) <= TOLERANCE[dtype]
    assert hidden.grad[5:20].abs().max() == 0, "rows that do not count have no gradient"


def test_chunks_are_as_equal_as_can_be():
    assert [chunk.stop - chunk.start for chunk in Layout(None, False, 24).chunks(ROWS)] == [22, 22, 22]
    sizes = [chunk.stop - chunk.start for chunk in Layout(None, False, 9).chunks(ROWS)]
    assert sum(sizes) == ROWS and max(sizes) <= 9 and max(sizes) - min(sizes) <= 1
    assert Layout(None, False, 1000).chunks(ROWS) == [slice(0, ROWS)]


def test_logits_of_any_size_stay_finite_where_no_row_counts():
    hidden, weight, labels, direction = material(scale=1e4)
    loss = chunked_loss(hidden, weight, labels, Layout(None, False, 16))
    loss.backward(torch.zeros_like(direction))
    assert loss.isfinite().all() and float(loss.detach().max()) > 1e4
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_weights_gradient_is_added_to_main_grad(dtype):
    made = material(dtype)
    hidden, weight, labels, direction = made
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    for _ in range(2):  # two micro-batches
        chunked_loss(hidden, weight, labels, Layout(None, False, 24)).backward(direction)
    assert weight.grad_added_to_main_grad, "DistributedDataParallel must not add again"
    assert relative(weight.main_grad - 1, 2 * reference(*made)[2]) <= 2 * TOLERANCE[dtype]


def test_a_kernel_that_adds_takes_the_place_of_product_and_addition():
    made = material(torch.bfloat16)
    hidden, weight, labels, direction = made
    seen = []

    def kernel(rows, grad, buffer):
        seen.append(rows.shape[0])
        buffer += grad.float().t() @ rows.float()

    layout = Layout(None, False, 24, kernel)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
    chunked_loss(hidden, weight, labels, layout).backward(direction)
    assert seen == [22, 22, 22]
    assert relative(weight.main_grad, reference(*made)[2]) <= TOLERANCE[torch.bfloat16]


def test_a_frozen_side_has_no_gradient():
    hidden, weight, labels, direction = material()
    weight.requires_grad_(False)
    chunked_loss(hidden, weight, labels, Layout(None, False, 24)).backward(direction)
    assert weight.grad is None and hidden.grad is not None
    hidden, weight, labels, direction = material()
    chunked_loss(hidden.detach(), weight, labels, Layout(None, False, 24)).backward(direction)
    assert weight.grad is not None


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@contextmanager
def kept_bytes():
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_more_than_a_chunk_of_logits_is_there(dtype):
    hidden, weight, labels, direction = material(dtype)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape), False
    with _Largest() as largest, kept_bytes() as kept:
        chunked_loss(hidden, weight, labels, Layout(None, False, 22)).backward(direction)
    assert largest.elements == 22 * VOCABULARY
    row = HIDDEN * hidden.element_size() + 8 + 3 * 4  # its input, its label, and three numbers
    assert sum(kept.values()) == ROWS * row + weight.untyped_storage().nbytes()

"""Core attention, forward and backward: the kernel that our module gets, and what torch's others take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from overlap.one_device import Device
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelerator.section import Options, Results

SHAPES = {"24 heads of 128": (24, 24, 128), "64 heads, 8 groups, of 128": (64, 8, 128)}
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def run(options: Options) -> Results:
    """Milliseconds and TFLOP/s of one sequence in bf16, and whether four backwards give the same bits."""
    device = Device(options.device)
    length, rounds = (128, 1) if options.quick else (8192, 10)
    ways: dict[str, Callable[[], AbstractContextManager]] = {"as chosen": nullcontext}
    if device.cuda:
        ways |= {name.lower(): lambda name=name: sdpa_kernel(getattr(SDPBackend, name)) for name in KERNELS}
        ways["deterministic"] = _deterministic
    for shape, (heads, groups, width) in SHAPES.items():
        case = _Case(device, heads, groups, length, width)
        for way, context in ways.items():
            yield f"{shape}, {way}", case.measure(context, rounds)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class _Case:
    def __init__(self, device: Device, heads: int, groups: int, length: int, width: int):
        def normal(count: int) -> Tensor:
            return torch.randn(1, count, length, width, device=device.device, dtype=torch.bfloat16)

        self.device = device
        self.grad = normal(heads)
        self.leaves = [normal(count).requires_grad_() for count in (heads, groups, groups)]
        self.tflop = length * length * heads * width / 1e12  # of one product, the unmasked half

    def forward(self) -> Tensor:
        query, key, value = self.leaves
        grouped = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.grad)

    def measure(self, context: Callable[[], AbstractContextManager], rounds: int) -> dict[str, Any]:
        """Two products forward, five more backward."""
        try:
            with context():
                with torch.no_grad():
                    forward = self.device.time_ms(self.forward, rounds)
                both = self.device.time_ms(self.step, rounds)
                first, *others = [self.step() for _ in range(4)]
        except RuntimeError as error:
            return {"not available": str(error).splitlines()[0][:200]}
        return {
            "forward, ms": forward,
            "forward and backward, ms": both,
            "forward, TFLOP/s": 2e3 * self.tflop / forward,
            "forward and backward, TFLOP/s": 7e3 * self.tflop / both,
            "same bits each time": all(
                torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)
            ),
        }

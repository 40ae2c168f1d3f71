"""Core attention, forward and backward, by the kernels torch has: which one our module gets, and what the others take."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Callable, ContextManager

from accelerator.section import Options, Results

SHAPES = {"24 heads of 128": (24, 24, 128), "64 heads, 8 groups, of 128": (64, 8, 128)}
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def run(options: Options) -> Results:
    """TFLOP/s, the unmasked half counted: forward 2 products, backward 5."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from overlap.one_device import Device

    device = Device(options.device)
    length, rounds = (128, 1) if options.quick else (8192, 10)
    for name, (heads, groups, width) in SHAPES.items():
        shape = (1, heads, length, width)
        dtype = torch.bfloat16
        query, grad = (torch.randn(shape, device=device.device, dtype=dtype) for _ in range(2))
        key, value = (torch.randn(1, groups, length, width, device=device.device, dtype=dtype) for _ in range(2))
        products = length * length * heads * width / 1e9  # 2 FLOPs, half of the square; /1e9 makes TFLOP/s of ms

        def both(context: Callable[[], ContextManager]) -> dict[str, Any]:
            leaves = [one.detach().requires_grad_() for one in (query, key, value)]

            def forward() -> torch.Tensor:
                with context():
                    return torch.nn.functional.scaled_dot_product_attention(
                        *leaves, is_causal=True, enable_gqa=heads != groups
                    )

            def step() -> None:
                torch.autograd.grad(forward(), leaves, grad)

            try:
                with torch.no_grad():
                    ahead = device.time_ms(forward, rounds)
                whole = device.time_ms(step, rounds)
                again = [torch.autograd.grad(forward(), leaves, grad) for _ in range(4)]
            except RuntimeError as error:
                return {"not available": str(error).splitlines()[0][:200]}
            back = whole - ahead
            same = all(torch.equal(a, b) for other in again[1:] for a, b in zip(again[0], other))
            return {"same bits each time": same, "forward, ms": ahead, "forward and backward, ms": whole, "TFLOP/s": 7 * products / whole,
                    
                    "forward TFLOP/s": 2 * products / ahead, "backward TFLOP/s": 5 * products / back}  # fmt: skip

        yield f"{name}, as chosen", both(nullcontext)
        if options.device != "cuda":
            continue
        for kernel in KERNELS:
            yield f"{name}, {kernel.lower()}", both(lambda kernel=kernel: sdpa_kernel(getattr(SDPBackend, kernel)))
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield f"{name}, deterministic", both(nullcontext)
        finally:
            torch.use_deterministic_algorithms(False)

#!/usr/bin/env python3
"""Attention on the CPU by the type of its operands: which types `backend.cpu_types` computes in fp32, and why.

    OMP_NUM_THREADS=1 python tools/bench/attention_types.py [--tokens 1024] [--heads 8] [--width 64]

Milliseconds of torch's FlashAttention for the CPU, the median of several calls, which take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from megatron_telechat.backend.cpu_types import widened  # noqa: E402

TYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDS = 7
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(1)
    shape = (1, options.heads, options.tokens, options.width)
    wide = [torch.randn(shape, generator=generator) for _ in range(4)]
    times: dict[torch.dtype, list[tuple[float, float]]] = {dtype: [] for dtype in TYPES}
    for _ in range(ROUNDS + 1):
        for dtype in TYPES:
            query, key, value, grad = (part.to(dtype) for part in wide)
            forward = seconds(lambda: FORWARD(query, key, value, 0.0, True))  # noqa: B023 (called at once)
            out, lse = FORWARD(query, key, value, 0.0, True)
            backward = seconds(lambda: BACKWARD(grad, query, key, value, out, lse, 0.0, True))  # noqa: B023
            times[dtype].append((forward, backward))
    print(f"{options.tokens} tokens, {options.heads} heads of {options.width}, {torch.get_num_threads()} thread(s)")
    for dtype, found in times.items():
        forward, backward = (median(column) * 1e3 for column in zip(*found[1:], strict=True))
        print(f"  {str(dtype)[6:]:9} forward {forward:7.1f} ms  backward {backward:7.1f} ms  runs in {widened(dtype)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

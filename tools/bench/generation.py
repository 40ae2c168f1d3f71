#!/usr/bin/env python3
"""Tokens a second of a generation, with the key-value cache and without it.

    python tools/bench/generation.py [--preset telechat2-tiny] [--prompts 64,256,1024] [--new 32] [--device cpu]

One sequence, random weights, greedy choice. With the cache the time of the prompt is given apart ("first token"); both
rates are over the tokens after the first. Beyond the training length of the model all tokens are read anew for each
token, with the cache too, as attention scaling asks for.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402


class RandomWeights:
    """Any box of any tensor, N(0, 0.02)."""

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of a tensor, [shape], fp32; the same values for the same key and place."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {tuple(offset)}".encode()))
        return torch.randn(tuple(shape), generator=generator) * 0.02


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="telechat2-tiny")
    parser.add_argument("--layers", type=int, help="of the model (default: the preset's)")
    parser.add_argument("--prompts", default="64,256,1024", help="lengths of the prompt (default 64,256,1024)")
    parser.add_argument("--new", type=int, default=32, help="tokens after the first (default 32)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    from dataclasses import replace

    from megatron_telechat.config import load_run_config
    from megatron_telechat.huggingface.generation import Sampling, new_tokens
    from megatron_telechat.huggingface.model import HfModel, running_model
    from megatron_telechat.model.key_value_cache import KeyValueCache

    args = parse(argv)
    model = load_run_config(["--preset", args.preset, "--dry-run"], {}).run.model
    model = replace(model, num_layers=args.layers or model.num_layers)

    def measure(running: HfModel, length: int, cached: bool) -> tuple[float, float]:
        """Seconds until the first token, and tokens a second after it."""
        prompt = torch.randint(0, model.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        cache = KeyValueCache() if cached else None
        begin = time.perf_counter()
        stream = new_tokens(running, prompt, args.new + 1, frozenset(), Sampling(), cache)
        next(stream)
        first = time.perf_counter()
        count = sum(1 for _ in stream)
        return first - begin, count / (time.perf_counter() - first)

    place = f"{args.precision} on {args.device}, {torch.get_num_threads()} threads"
    print(f"{args.preset}, {model.num_layers} layers, {place}")
    print(f"{'prompt':>8}{'first token s':>15}{'tokens/s':>12}{'without cache':>15}{'ratio':>8}")
    with running_model(RandomWeights(), model, device=args.device, precision=args.precision) as running:
        measure(running, 8, True)  # the first call of every kernel
        for length in map(int, args.prompts.split(",")):
            first, rate = measure(running, length, True)
            _, plain = measure(running, length, False)
            print(f"{length:>8}{first:>15.3f}{rate:>12.1f}{plain:>15.1f}{rate / plain:>8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/usr/bin/env python3
"""What averages of the weights cost beside the optimizer's step.

    python tools/bench/averages.py [--megabytes 250] [--rounds 7] [--json FILE]

One process, a bf16 model with fp32 master weights on the CPU. The arms take turns within each round, after a round to
warm up; printed are medians in milliseconds:

* *optimizer step*: AdamW on gradients that are there, and the rounded weights written;
* *ema*: one update of the moving average; *window*: of the mean over a window;
* *in and out*: the average in the place of the weights and the weights back, as an evaluation needs it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checkpoint import run_config  # noqa: E402


def arms(megabytes: float) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of parameters, and what is timed."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import AverageConfig
    from megatron_telechat.training.averages import Averages
    from megatron_telechat.training.build import build_trained

    run = run_config(megabytes, 1)
    backend = get_backend("cpu")
    backend.install()
    built = build_trained(run, parallel.initialize(run, backend), backend)
    parameters: list[Any] = [shard.parameter for shard in built.shards]
    for parameter in parameters:
        parameter.main_grad.normal_()
    built.optimizer.prepare_grads()

    settings = (AverageConfig(ema_decay=0.999), AverageConfig(average_window_steps=10**9))
    ema, window = (Averages(built.optimizer, built.shards, each) for each in settings)
    ema.begin(0, {})
    ema_steps, window_steps = count(1), count(1)

    def in_and_out() -> None:
        with ema.in_place_of_weights("ema", built.virtual_stages):
            pass

    return sum(parameter.numel() for parameter in parameters), {
        "optimizer step": built.optimizer.step_with_ready_grads,
        "ema": lambda: ema.follow(next(ema_steps), taken=True),
        "window": lambda: window.follow(next(window_steps), taken=True),
        "in and out": in_and_out,
    }


def main() -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=250, help="of a checkpoint without averages")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the times to this file")
    args = parser.parse_args()
    parameters, timed = arms(args.megabytes)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(args.rounds + 1):
        for name, do in timed.items():
            begin = time.perf_counter()
            do()
            if number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(found) for name, found in times.items()}
    step = medians["optimizer step"]
    print(f"{parameters / 1e6:.1f}M parameters, medians of {args.rounds} rounds, ms")
    for name, median in medians.items():
        print(f"  {name:<15} {median:9.2f}  {median / step:5.2f} of the optimizer step")
    if args.json:
        args.json.write_text(json.dumps({"parameters": parameters, "ms": medians}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

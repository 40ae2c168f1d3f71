#!/usr/bin/env python3
"""The optimizer's state on the host, or in 16 bits, beside a run that keeps it in fp32 on the device.

    python tools/bench/offload.py [--device cuda] [--layers 2] [--hidden 256] [--steps 8] [--fraction 1.0]
        [--data-path PREFIX] [--vocab 32000] [--arms ARM ...] [--json FILE]

One process on one device, bf16, mock data unless a dataset is named. The arms are whole runs from the same seed, one
after another:

* *none*: the state in fp32 on the device;
* *offload*: on the host, copied to the device and back in each step; *offload, overlap*: the copies beside the update;
* *bf16 first moment*, *bf16 second moment*, *bf16 moments*: one of them or both in 16 bits, on the device;
* *bf16 moments, offload*: both, on the host, with overlap.

Printed are medians, without the first two steps: of a step, and of the optimizer's part of it, with the device waited
for before and after; bytes of the device between steps and at the peak (on the CPU: of the process); bytes that the
ledger counts on the host, and these over the optimizer's time; the mean loss of the last tenth of the steps; and
whether weights, masters and moments have the bits of the run without offload. Exit code 1 where they have not.

    python tools/bench/offload.py --device cuda --layers 24 --hidden 2048 --sequence 2048 --steps 12

trains 1.4e9 parameters: 24 GiB between steps in the first arm, 8 in the second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BF16 = "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
ARMS = {
    "none": "",
    "offload": "--optimizer-cpu-offload",
    "offload, overlap": "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d",
    "bf16 first moment": "--exp-avg-dtype bf16",
    "bf16 second moment": "--exp-avg-sq-dtype bf16",
    "bf16 moments": BF16,
    "bf16 moments, offload": f"--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d {BF16}",
}
SAME_AS = {"offload": "none", "offload, overlap": "none", "bf16 moments, offload": "bf16 moments"}
"""Arm → the one whose bits it must have."""
WARM_UP = 2


@dataclass(frozen=True)
class Measured:
    """Of one arm: seconds (medians), bytes, and a digest of every bit of weights and state."""

    step_s: float
    optimizer_s: float
    device_bytes: int
    peak_bytes: int
    host_bytes: int
    loss: float
    digest: str


def main() -> int:
    """Run the arms, print their table. Returns the exit code."""
    arguments = parse()
    from megatron_telechat.backend import get_backend

    backend = get_backend(arguments.device)
    found: dict[str, Measured] = {}
    for name in arguments.arms:
        found[name] = run_arm(arguments, ARMS[name])
        gc.collect()
        print(f"{name}: done", file=sys.stderr, flush=True)
    print(f"{backend.device_name()}, {arguments.layers} layers of {arguments.hidden}, {arguments.steps} steps")
    head = f"{'arm':24s} {'step ms':>8s} {'optimizer ms':>12s} {'device GiB':>10s} {'peak GiB':>9s} {'host GiB':>9s}"
    print(f"{head} {'link GB/s':>9s} {'loss':>9s}  the same bits")
    equal = True
    for name, one in found.items():
        reference = SAME_AS.get(name)
        same = found[reference].digest == one.digest if reference in found else None
        equal = equal and same is not False
        link = f"{one.host_bytes / one.optimizer_s / 1e9:9.1f}" if one.host_bytes else " " * 9
        sizes = " ".join(f"{size / 2**30:9.2f}" for size in (one.device_bytes, one.peak_bytes, one.host_bytes))
        text = "-" if same is None else "yes" if same else "NO"
        print(
            f"{name:24s} {1e3 * one.step_s:8.1f} {1e3 * one.optimizer_s:12.2f}  {sizes} {link} {one.loss:9.5f}  {text}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
    return 0 if equal else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the state that goes to the host")
    parser.add_argument("--data-path", help="prefix of a dataset; unset: mock data")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--json", help="a file for the figures")
    return parser.parse_args()


def run_arm(arguments: argparse.Namespace, flags: str) -> Measured:
    """Train so many steps from the seed."""
    from megatron_telechat import parallel
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.loop import Trainer

    with tempfile.TemporaryDirectory(prefix="offload-bench-") as folder:
        share = ["--optimizer-offload-fraction", str(arguments.fraction)] if "offload" in flags else []
        run = load_run_config([*shape(arguments), *flags.split(), *share, "--run-dir", folder], {}).run
        with contextlib.redirect_stdout(sys.stderr):  # the banner
            trainer = Trainer(run)
        try:
            return measure(trainer, arguments.steps)
        finally:
            trainer.release()
            parallel.destroy(keep_world=True)


def shape(arguments: argparse.Namespace) -> list[str]:
    """Flags of the model and of the run."""
    hidden = arguments.hidden
    text = (
        f"--preset telechat2-tiny --num-layers {arguments.layers} --hidden-size {hidden} "
        f"--ffn-hidden-size {3 * hidden} --num-attention-heads {hidden // 128} "
        f"--num-query-groups {hidden // 128} --kv-channels 128 "
        f"--vocab-size {arguments.vocab} --seq-length {arguments.sequence} --micro-batch-size 1 --global-batch-size 1 "
        f"--train-iters {arguments.steps} --bf16 --deterministic --device {arguments.device} --no-progress "
        "--lr-warmup-iters 0"
    )
    data = ["--data-path", arguments.data_path, "--split", "1"] if arguments.data_path else ["--mock-data"]
    return [*text.split(), *data]


def measure(trainer: Any, steps: int) -> Measured:
    """Take the steps and look at what there is afterwards."""
    backend, spent = trainer.backend, []
    optimizer = trainer.optimizer
    optimizer.step_with_ready_grads = timed(optimizer.step_with_ready_grads, backend, spent)
    iterators, whole, losses = trainer.training_iterators(), [], []
    for number in range(steps):
        if number == WARM_UP:
            backend.reset_peak_memory()
        begin = time.perf_counter()
        result, _ = trainer.take_step(iterators)
        backend.synchronize()
        whole.append(time.perf_counter() - begin)
        losses.append(result.loss)
    memory = backend.memory()
    return Measured(
        step_s=statistics.median(whole[WARM_UP:]),
        optimizer_s=statistics.median(spent[WARM_UP:]),
        device_bytes=memory.allocated_bytes,
        peak_bytes=memory.peak_bytes,
        host_bytes=backend.host_memory.nbytes,
        loss=statistics.fmean(losses[-max(1, steps // 10) :]),
        digest=digest(trainer),
    )


def timed(function: Callable[[], bool], backend: Any, spent: list[float]) -> Callable[[], bool]:
    """The same function, whose seconds are noted, with all work of the device before and in it."""

    def call() -> bool:
        backend.synchronize()
        begin = time.perf_counter()
        done = function()
        backend.synchronize()
        spent.append(time.perf_counter() - begin)
        return done

    return call


def digest(trainer: Any) -> str:
    """Of every bit of the weights, the master weights and the moments."""
    import torch

    from megatron_telechat.checkpoint.optimizer_state import optimizer_slices

    found = hashlib.sha256()
    tensors = [(shard.piece.key, shard.parameter) for shard in trainer.shards]
    for item in optimizer_slices(trainer.optimizer, trainer.shards):
        tensors += [(f"{name} {item.shard.piece.key}", values) for name, values in item.tensors.items()]
    for name, values in sorted(tensors, key=lambda pair: pair[0]):
        found.update(name.encode())
        found.update(values.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

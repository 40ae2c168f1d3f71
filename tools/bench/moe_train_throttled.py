#!/usr/bin/env python3
"""Training of the tiny mixture of experts over throttled links: tokens/s with `auto`, with one chunk, with
megatron-core's layer.

    python tools/bench/moe_train_throttled.py --links [--mbit 100,400,none] [--stand-in 5]     root, iproute2
    torchrun --nproc-per-node 4 tools/bench/moe_train_throttled.py [--json FILE]               the link there is
    python tools/bench/moe_train_throttled.py --links -- --seq-length 512 --hidden-size 256    flags of training

Four ranks, TP2 x PP2 with the tensor domain folded into EP2 as in the quickstart (``--layout ep4``: data parallel,
experts over all ranks). Three models with the same weights live in every rank and take their steps in turn, on the same
samples: optimizer steps as in training, with DDP and the distributed optimizer where the flags say so. In the third,
megatron-core's MoELayer (alltoall dispatcher, SequentialMLP) stands in the place of every block. Losses must agree at
every step, under one
routing: that of the arm whose turn is first. The experts have no bias here: megatron-core has none on the down
projection alone; and the balancing loss is off: with tensor parallelism and a loss per token, megatron-core's is of
another size. All traffic goes over the
links: that of the tensor and pipeline groups too.

``--stand-in RATE``: the experts' products of all three sleep for flops / RATE (GFLOP/s); see moe_overlap.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from throttled_links import Links, start_ranks  # noqa: E402

RANKS = 4
ARMS = ("auto", "k=1", "megatron-core")
FLAGS = "--preset telechat2-tiny-moe --mock-data --device cpu --no-progress --lr-warmup-iters 0".split()
LAYOUTS = {
    "folded": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2".split(),
    "ep4": "--expert-model-parallel-size 4".split(),
}
QUICK = (
    "--seq-length 64 --hidden-size 64 --kv-channels 8 --vocab-size 512 --moe-ffn-hidden-size 64 --global-batch-size 8"
).split()
# The arms differ in the order of sums; steps of training let that grow. Their experts are those of one arm.
LOSS_TOLERANCE = 1e-5
LATE_LOSS_TOLERANCE = 1e-4
"""In later rows, which go on training."""


class Trainee:
    """One model in training.

    Args:
        arm: of :data:`ARMS`.
        run: its configuration.
        stand_in: GFLOP/s of the stand-in device, or None for real products.
    """

    def __init__(self, arm: str, run: Any, state: Any, backend: Any, datasets: Any, stand_in: float | None):
        from overlap.layers import use_stand_in

        from megatron_telechat.data import batches
        from megatron_telechat.model import build_model, parameter_shards
        from megatron_telechat.moe import moe_blocks
        from megatron_telechat.training.optimizer import build_optimizer, wrap_data_parallel
        from megatron_telechat.training.step import TrainStep, data_iterators

        self.arm, self.state, self.backend = arm, state, backend
        self.run = replace(run, parallel=replace(run.parallel, moe_input_chunks="auto" if arm == "auto" else 1))
        models = build_model(self.run, state, backend)
        shards = parameter_shards(models, self.run, state)
        if arm == "megatron-core":
            for model in models:
                put_core_layers(model, state, stand_in)
            shards = []  # only for the names in a message about non-finite gradients
        self.virtual_stages = wrap_data_parallel(models, self.run, state)
        if stand_in and arm != "megatron-core":
            for block in moe_blocks(self.virtual_stages):
                use_stand_in(block, stand_in)
        self.optimizer = build_optimizer(self.virtual_stages, self.run, state)
        self.step = TrainStep(self.virtual_stages, self.optimizer, shards, self.run, state, backend)
        self.blocks = moe_blocks(self.virtual_stages)
        self.iterators = data_iterators(
            lambda: batches(datasets.train, self.run, state, 0), len(self.virtual_stages), self.run, state
        )

    def choose(self) -> str | None:
        """Set the number of chunks for the link as it is now; what was chosen, for a person."""
        from megatron_telechat.training.chunks import set_chunks

        setting = set_chunks(self.virtual_stages, self.run, self.state, self.backend)
        return None if setting is None else setting.message

    def take_step(self, number: int, routing: Any) -> tuple[float, float, float]:
        """Seconds, seconds of exposed exchange on this rank, and the loss."""
        from megatron_telechat.training.learning_rate import learning_rate
        from megatron_telechat.training.optimizer import set_learning_rate

        rate = learning_rate(self.run.optimizer, self.run.training.train_iters, number)
        set_learning_rate(self.optimizer, self.run, rate)
        with routing.step(self.virtual_stages, number):
            begin = time.perf_counter()
            loss = self.step(self.iterators, number).loss
            seconds = time.perf_counter() - begin
        assert loss is not None, "a step of this bench learns from every token"
        return seconds, sum(block.clock.take_exposed_s() for block in self.blocks), loss


def put_core_layers(model: Any, state: Any, stand_in: float | None) -> None:
    """megatron-core's MoELayer in the place of every block, with its weights."""
    import torch
    from overlap.layers import core_moe_layer, use_core_stand_in

    from megatron_telechat.moe import MoEBlock

    for decoder in model.decoder.layers:
        block = decoder.mlp
        if not isinstance(block, MoEBlock):
            continue
        layer = core_moe_layer(block.config, state.process_groups, decoder.layer_number)
        with torch.no_grad():
            ours: Any = block.router
            layer.router.weight.copy_(ours.weight)
            fc1, fc2 = block.experts.linear_fc1.weight, block.experts.linear_fc2.weight
            for expert, first, second in zip(layer.experts.local_experts, fc1, fc2, strict=True):
                expert.linear_fc1.weight.copy_(first.flatten(0, 1))
                expert.linear_fc2.weight.copy_(second)
        if stand_in:
            use_core_stand_in(layer, stand_in)
        decoder.mlp = layer


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows; the same on every rank."""
    import torch.distributed as dist
    from overlap.report import mode_label

    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.data import build_datasets
    from megatron_telechat.parallel import initialize

    steps_a_row = options.warmup + options.steps
    flags = [*FLAGS, *LAYOUTS[options.layout], *(QUICK if options.quick else []), *options.flags]
    flags += ["--train-iters", str(steps_a_row * len(options.rates)), "--lr-decay-style", "constant"]
    run = load_run_config(flags, os.environ).run
    run = replace(run, model=replace(run.model, mlp_output_bias=False, moe_aux_loss_coeff=0.0))
    backend = get_backend("cpu")
    backend.install()
    state = initialize(run, backend)
    datasets = build_datasets(run, state)
    trainees = [Trainee(arm, run, state, backend, datasets, options.stand_in) for arm in ARMS]
    links = Links.of_this_rank()
    report: dict[str, Any] = {
        "mode": mode_label(options.stand_in),
        "layout": options.layout,
        "flags": flags,
        "rows": [],
    }
    if state.rank == 0:
        print(f"{report['mode']}; layout {options.layout}; median of {options.steps} steps", flush=True)
    for number, mbit in enumerate(options.rates if links else (None,)):
        dist.barrier()
        if links and state.rank == 0:
            links.set_rate(mbit)
        dist.barrier()
        row = take_row(
            trainees, options, number * steps_a_row, run.training.global_batch_size * run.training.seq_length
        )
        report["rows"].append({"mbit": mbit, "links": links is not None, **row})
        if state.rank == 0:
            print_row(report["rows"][-1], report["mode"])
    return report


def take_row(trainees: Sequence[Trainee], options: argparse.Namespace, first: int, tokens: int) -> dict[str, Any]:
    """Steps in turn over one link."""
    import torch
    import torch.distributed as dist
    from overlap.one_routing import OneRouting

    messages = [message for trainee in trainees if (message := trainee.choose())]
    samples: dict[str, list[list[float]]] = {trainee.arm: [] for trainee in trainees}
    routing = OneRouting()
    for step in range(first, first + options.warmup + options.steps):
        turn = step % len(trainees)
        for trainee in [*trainees[turn:], *trainees[:turn]]:
            dist.barrier()
            result = torch.tensor(trainee.take_step(step, routing), dtype=torch.float64)
            dist.all_reduce(result, op=dist.ReduceOp.MAX)
            samples[trainee.arm].append(result.tolist())
    losses = {arm: [sample[2] for sample in taken] for arm, taken in samples.items()}
    spread = max((max(values) - min(values)) / abs(min(values)) for values in zip(*losses.values(), strict=True))
    if not spread <= (LATE_LOSS_TOLERANCE if first else LOSS_TOLERANCE):
        raise SystemExit(f"the losses of the arms do not agree ({spread:.1e}): {losses}")
    timed = {arm: taken[options.warmup :] for arm, taken in samples.items()}
    arms = {}
    for arm, taken in timed.items():
        seconds = median(sample[0] for sample in taken)
        arms[arm] = {
            "tokens_per_s": tokens / seconds,
            "step_ms": seconds * 1e3,
            "exposed_ms": None if arm == "megatron-core" else median(sample[1] for sample in taken) * 1e3,
            "auto_over_this": median(mine[0] / auto[0] for mine, auto in zip(taken, timed["auto"], strict=True)),
            "steps_s": [sample[0] for sample in taken],
        }
    return {"auto": messages, "loss_spread": spread, "losses": losses, "arms": arms}


def print_row(row: dict[str, Any], mode: str) -> None:
    link = (f"{row['mbit']:.0f} Mbit/s" if row["mbit"] else "no limit") if row["links"] else "this link"
    print(f"\n{link}; {mode}; largest relative difference of losses {row['loss_spread']:.1e}")
    for message in row["auto"]:
        print(f"  {message}")
    print(f"  {'':16}{'tokens/s':>10}{'step ms':>9}{'exposed':>9}{'auto / this':>13}")
    for arm, line in row["arms"].items():
        exposed = "" if line["exposed_ms"] is None else f"{line['exposed_ms']:.0f}"
        print(
            f"  {arm:16}{line['tokens_per_s']:>10.0f}{line['step_ms']:>9.0f}{exposed:>9}"
            f"{line['auto_over_this']:>12.2f}x",
            flush=True,
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", action="store_true", help="run over throttled links; root, iproute2")
    parser.add_argument("--mbit", default="100,200,400,none", help="rates of the rows, with --links")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="folded")
    parser.add_argument("--stand-in", type=float, metavar="GFLOPS", help="the experts' products sleep flops / rate")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smaller model and two steps: does it run")
    parser.add_argument("--no-pin", action="store_true", help="do not bind rank r to core r modulo their number")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds until the ranks are killed")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("flags", nargs="*", help="after --: flags of training, such as --seq-length 512")
    options = parser.parse_args(argv)
    try:
        options.rates = tuple(None if rate == "none" else float(rate) for rate in options.mbit.split(","))
    except ValueError:
        parser.error("--mbit takes numbers of Mbit/s, or none, with commas")
    if options.quick:
        vars(options).update(steps=2, warmup=1, rates=options.rates[:1])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    if "RANK" in os.environ:
        from megatron_telechat.parallel import destroy

        try:
            report = measure(options)
        finally:
            destroy()
        if os.environ["RANK"] == "0" and options.json:
            options.json.write_text(json.dumps(report, indent=1))
        return 0
    command = [sys.executable, "-u", "-W", "ignore", __file__, *argv]
    return start_ranks(command, RANKS, options.links, not options.no_pin, options.timeout)


if __name__ == "__main__":
    sys.exit(main())

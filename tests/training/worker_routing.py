"""Two ranks: recordings of the experts' choices, made in one layout and replayed in others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import MOE, make_trainer  # noqa: E402

cases = Cases()
FOLDER = Path(os.environ.get("ROUTING_DIR", "."))
BASE = [*MOE, "--train-iters", "3"]
TP2 = "--tensor-model-parallel-size 2 --recompute-granularity full"
LAYOUTS = {
    "dp2": "--micro-batch-size 1",
    "tp2_recompute": TP2,
    "pp2_interleaved": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "ep2_chunks": "--expert-model-parallel-size 2 --no-fold-tensor-into-experts --micro-batch-size 4 "
    "--moe-input-chunks 3",
}


def with_trainer(flags: str, name: str, use: Callable[[Any], Any]) -> Any:
    from megatron_telechat import parallel

    trainer = make_trainer([*BASE, *flags.split()], FOLDER / name)
    try:
        return use(trainer)
    finally:
        trainer.release()
        parallel.destroy(keep_world=True)


def refusal(flags: str, name: str) -> list[str]:
    from megatron_telechat import parallel
    from megatron_telechat.errors import UserError

    try:
        make_trainer([*BASE, *flags.split()], FOLDER / name).release()
    except UserError as error:
        return [type(error).__name__, error.render()]
    finally:
        parallel.destroy(keep_world=True)
    raise AssertionError("it was not refused")


def losses(trainer) -> list[float]:
    iterators = trainer.training_iterators()
    return [trainer.take_step(iterators)[0].loss for _ in range(trainer.run.training.train_iters - trainer.step)]


@cases.case
def recorded() -> Any:
    """Stopped after two steps, evaluated in between, and gone on with."""
    flags = f"{TP2} --moe-routing-record {FOLDER}/recording --eval-interval 1 --eval-iters 1 --exit-interval 2"
    with_trainer(flags, "recorded", lambda trainer: trainer.fit())
    return with_trainer(flags, "recorded", lambda trainer: [trainer.step, *losses(trainer)])


@cases.case
def replayed() -> Any:
    """From the start in another layout; and what its routers would have chosen. (Not with other micro-batches: the
    balancing loss is one of a micro-batch.)"""
    flags = f"{LAYOUTS['pp2_interleaved']} --moe-routing-replay {FOLDER}/recording --moe-routing-record {FOLDER}/again"
    return with_trainer(flags, "replayed", losses)


def forged(layer: int, sample: int, position: int, topk: int, experts: int) -> list[int]:
    """Choices that no router would make, and that tell where they belong."""
    return [(sample * 5 + position * 3 + layer * 7 + 2 * slot) % experts for slot in range(topk)]


def takes_the_choices_it_is_given(name: str) -> int:
    """Every call of every router, first and repeated ones, against the formula at the token's own place."""
    from megatron_telechat.moe import Router

    seen, real = [], Router.forward

    def forward(router, *arguments, **options):
        routing = real(router, *arguments, **options)
        if router.training:
            seen.append((router.layer_number - 1, routing.experts.tolist()))
        return routing

    def one_step(trainer) -> int:
        state, run = trainer.state, trainer.run
        Router.forward = forward
        try:
            trainer.take_step(trainer.training_iterators())
        finally:
            Router.forward = real
        size, length = run.training.micro_batch_size, run.training.seq_length // state.tp_size
        wanted = {}
        for layer in {layer for layer, _ in seen}:
            wanted[layer] = [
                [
                    forged(
                        layer,
                        (number * state.dp_size + state.dp_rank) * size + sample,
                        state.tp_rank * length + position,
                        4,
                        16,
                    )
                    for position in range(length)
                    for sample in range(size)
                ]
                for number in range(run.num_microbatches)
            ]
        passes = 2 if run.training.recompute_granularity == "full" else 1
        for layer, calls in wanted.items():
            found = [experts for at, experts in seen if at == layer]
            assert sorted(found) == sorted(calls * passes), f"layer {layer}: other choices than those given"
        return len(seen)

    return with_trainer(f"{LAYOUTS[name]} --moe-routing-replay {FOLDER}/forged", f"forged_{name}", one_step)


for _name in LAYOUTS:
    cases.add(f"given_{_name}", lambda name=_name: takes_the_choices_it_is_given(name))


@cases.case
def other_data() -> list[str]:
    return refusal(f"--moe-routing-replay {FOLDER}/recording --seed 5", "other_data")


@cases.case
def recording_of_other_data() -> list[str]:
    return refusal(f"--moe-routing-record {FOLDER}/recording --seed 5", "other_recording")


@cases.case
def step_before_the_recording() -> list[str]:
    with_trainer(f"--moe-routing-record {FOLDER}/late --moe-routing-steps 2-3", "late", losses)
    return refusal(f"--moe-routing-replay {FOLDER}/late", "too_early")


if __name__ == "__main__":
    cases.main()

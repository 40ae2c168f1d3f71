"""One MoE step on two expert-parallel ranks with a NaN put into a loss or a gradient."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import MOE, make_trainer  # noqa: E402

cases = Cases()


def step_with(poison) -> dict:
    """Take a step whose forward_backward is followed by ``poison(trainer, sums)``."""
    import torch

    from megatron_telechat.errors import NumericsError

    layout = ["--expert-model-parallel-size", "2", "--no-fold-tensor-into-experts"]
    trainer = make_trainer([*MOE, *layout], Path(os.environ["RUN_DIR"]))
    before = [shard.parameter.detach().clone() for shard in trainer.shards]
    inner = trainer.train_step.forward_backward

    def poisoned(iterators):
        sums = inner(iterators)
        poison(trainer, sums)
        return sums

    trainer.train_step.forward_backward = poisoned
    found = {"raised": False, "message": "", "exit_code": 0}
    try:
        trainer.take_step(trainer.training_iterators())
    except NumericsError as error:
        found = {"raised": True, "message": error.render(), "exit_code": error.exit_code}
    finally:
        trainer.release()
    found["unchanged"] = all(torch.equal(old, shard.parameter) for old, shard in zip(before, trainer.shards))
    return found


def put_nan(trainer, rank: int, key: str) -> None:
    for shard in trainer.shards:
        if trainer.state.rank == rank and shard.pieces[0].key == key:
            shard.parameter.main_grad.view(-1)[0] = float("nan")


@cases.case
def clean():
    return step_with(lambda trainer, sums: None)


@cases.case
def loss():
    def poison(trainer, sums):
        if trainer.state.rank == 1:
            sums[0] = float("nan")

    return step_with(poison)


@cases.case
def gradient_of_one_rank():
    return step_with(lambda trainer, sums: put_nan(trainer, 1, "output_layer.weight"))


@cases.case
def gradient_of_one_expert():
    return step_with(lambda trainer, sums: put_nan(trainer, 1, "decoder.layers.2.mlp.experts.linear_fc2.weight"))


if __name__ == "__main__":
    cases.main()

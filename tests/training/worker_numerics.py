"""MoE steps on two ranks with numbers put in that are not finite; and an overlapped gather that nobody awaits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import MOE, make_trainer  # noqa: E402

cases = Cases()


EP2 = ["--expert-model-parallel-size", "2", "--no-fold-tensor-into-experts"]
FP16 = [*(flag for flag in MOE if flag != "--fp32"), "--fp16", "--loss-scale-window", "2"]
SECOND_LAYER = "decoder.layers.2.mlp.experts.linear_fc2.weight"


def step_with(poison, base=MOE, *flags: str) -> dict:
    """Take a step whose forward_backward is followed by ``poison(trainer, sums)``."""
    import torch

    from megatron_telechat.errors import NumericsError

    trainer = make_trainer([*base, *EP2, *flags], Path(os.environ["RUN_DIR"]))
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
    found["unchanged"] = all(
        torch.equal(old, shard.parameter) for old, shard in zip(before, trainer.shards, strict=True)
    )
    return found


def put_nan(trainer, rank: int, key: str) -> None:
    """Every number of it: with the distributed optimizer, or without, each share of the gradient is hit."""
    for shard in trainer.shards:
        if trainer.state.rank == rank and shard.piece.key == key:
            shard.parameter.main_grad.fill_(float("nan"))


@cases.case
def clean():
    from megatron_telechat.backend.cpu import CpuBackend

    asked = []
    CpuBackend.use_deterministic_algorithms = lambda backend: asked.append(backend.name)
    try:
        found = step_with(lambda trainer, sums: None)
    finally:
        del CpuBackend.use_deterministic_algorithms
    return {**found, "asked": asked}


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
    return step_with(lambda trainer, sums: put_nan(trainer, 1, SECOND_LAYER))


@cases.case
def fp16_loss():
    def poison(trainer, sums):
        if trainer.state.rank == 1:
            sums[0] = float("nan")

    return step_with(poison, FP16)


@cases.case
def fp16_overflow_at_the_smallest_scale():
    scales = ("--initial-loss-scale", "4", "--min-loss-scale", "4")
    return step_with(lambda trainer, sums: put_nan(trainer, 1, SECOND_LAYER), FP16, *scales)


def scaler_states(trainer) -> list[dict]:
    """What each optimizer of the chain divides its gradients by, with the trackers that move it."""
    return [
        {name: float(value) for name, value in part.grad_scaler.state_dict().items()}
        for part in trainer.optimizer.chained_optimizers
    ]


@cases.case
def fp16_overflow_of_one_expert():
    """Two steps overflow in one expert of one rank, then three do not; what every step left of scale, rate and
    weights."""
    import torch

    flags = ["--initial-loss-scale", "64", "--lr-warmup-iters", "10", "--lr-warmup-init", "1e-4"]
    trainer = make_trainer([*FP16, *EP2, *flags], Path(os.environ["RUN_DIR"]))
    inner = trainer.train_step.forward_backward
    steps = []

    def poisoned(iterators):
        sums = inner(iterators)
        if trainer.step < 2:
            put_nan(trainer, 1, SECOND_LAYER)
        return sums

    trainer.train_step.forward_backward = poisoned
    try:
        iterators = trainer.training_iterators()
        for _ in range(5):
            before = [shard.parameter.detach().clone() for shard in trainer.shards]
            result, lr = trainer.take_step(iterators)
            same = [torch.equal(old, shard.parameter) for old, shard in zip(before, trainer.shards, strict=True)]
            steps.append(
                {
                    "skipped": result.skipped,
                    "lr": lr,
                    "all_unchanged": all(same),
                    "scalers": scaler_states(trainer),
                    "scale_of_the_step": result.loss_scale,
                    "grad_norm": result.grad_norm,
                }
            )
        return {"steps": steps, "taken": trainer.steps_taken.taken, "consumed": trainer.consumed_samples}
    finally:
        trainer.release()


@cases.case
def weights_that_are_not_finite_are_not_saved():
    import torch

    from megatron_telechat.errors import NumericsError

    trainer = make_trainer([*MOE, *EP2], Path(os.environ["RUN_DIR"]) / "weights")
    try:
        if trainer.state.rank == 1:
            with torch.no_grad():
                next(s for s in trainer.shards if s.piece.key == SECOND_LAYER).parameter.view(-1)[3] = float("inf")
        try:
            trainer._save()
        except NumericsError as error:
            return {"message": str(error), "saved": [path.name for path in trainer.paths.save_dir.glob("iter_*")]}
        return {"message": "", "saved": True}
    finally:
        trainer.release()


@cases.case
def gather_that_nobody_awaits():
    """A block that reads its weights past the module that owns them is an error before the first step is taken."""
    from megatron_telechat.errors import ConfigError
    from megatron_telechat.moe.engine import ExpertWeights
    from megatron_telechat.moe.experts import GroupedExperts

    def past_the_module(self):
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        return ExpertWeights(fc1.weight, fc2.weight, fc2.bias, self.adds_bias, self._accumulate)

    right = GroupedExperts.weights
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    trainer = make_trainer([*MOE, *flags], Path(os.environ["RUN_DIR"]))
    GroupedExperts.weights = property(past_the_module)
    try:
        trainer.take_step(trainer.training_iterators())
    except ConfigError as error:
        return {"message": str(error), "step": trainer.step}
    finally:
        GroupedExperts.weights = right
        trainer.release()
    return {"message": "", "step": trainer.step}


if __name__ == "__main__":
    cases.main()

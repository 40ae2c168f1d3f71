"""MoE steps on two ranks with numbers put in that are not finite; and an overlapped gather that nobody awaits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, make_trainer  # noqa: E402

cases = Cases()


EP2 = ["--expert-model-parallel-size", "2", "--no-fold-tensor-into-experts"]
FP16 = [*(flag for flag in MOE if flag != "--fp32"), "--fp16", "--loss-scale-window", "2"]
SECOND_LAYER = "decoder.layers.2.mlp.experts.linear_fc2.weight"


def step_with(poison, base=MOE, *flags: str) -> dict:
    """Take a step whose forward_backward is followed by ``poison(trainer, sums)``."""
    trainer = make_trainer([*base, *EP2, *flags], Path(os.environ["RUN_DIR"]))
    inner = trainer.train_step.forward_backward

    def poisoned(iterators):
        sums = inner(iterators)
        poison(trainer, sums)
        return sums

    trainer.train_step.forward_backward = poisoned
    return outcome(trainer)


def outcome(trainer) -> dict:
    """Of one step: the error, and whether the weights are what they were. The trainer is released."""
    import torch

    from megatron_telechat.errors import NumericsError

    before = [shard.parameter.detach().clone() for shard in trainer.shards]
    found = {"raised": False, "message": "", "exit_code": 0}
    try:
        trainer.take_step(trainer.training_iterators())
    except NumericsError as error:
        found = {"raised": True, "message": error.render(), "exit_code": error.exit_code}
    finally:
        trainer.release()
    unchanged = all(torch.equal(old, shard.parameter) for old, shard in zip(before, trainer.shards, strict=True))
    return {**found, "unchanged": unchanged}


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


def step_with_hooks(attach, *flags: str, base=(*MOE, *EP2)) -> dict:
    """Take a step after ``attach(trainer, modules by name)``; the number of tries, too."""
    import torch

    trainer = make_trainer([*base, *flags], Path(os.environ["RUN_DIR"]) / "hooks")
    attach(trainer, dict(trainer.virtual_stages[-1].module.named_modules()))
    tries, inner = [], trainer.train_step.forward_backward

    def counted(iterators):
        tries.append(float(torch.rand(1)))
        return inner(iterators)

    trainer.train_step.forward_backward = counted
    found = outcome(trainer)
    # The rank that writes: others may be here first.
    metrics = trainer.paths.run_dir / "metrics.jsonl"
    event = json.loads(metrics.read_text().splitlines()[-1]) if trainer.state.rank == 0 else None
    return {**found, "tries": tries, "event": event, "step": trainer.step}


def nan_in_the_output(rank: int, name: str, calls: tuple[int, ...]):
    """In these calls of a module, counted from 0 over all tries, on one rank."""

    def attach(trainer, modules):
        count = iter(range(1000))

        def hook(module, inputs, output):
            if next(count) in calls:
                first, *rest = output if isinstance(output, tuple) else (output,)
                first = first.masked_fill(first == first.max(), float("nan"))
                return (first, *rest) if isinstance(output, tuple) else first

        if trainer.state.rank == rank:
            modules[name].register_forward_hook(hook)

    return attach


@cases.case
def output_of_one_module():
    """Two micro-batches a rank; the second one is hit, in each try."""
    return step_with_hooks(nan_in_the_output(1, "decoder.layers.2.self_attention.linear_qkv", (1, 3)))


@cases.case
def output_of_one_module_once():
    return step_with_hooks(nan_in_the_output(1, "decoder.layers.2.self_attention.linear_qkv", (1,)))


@cases.case
def interleaved_pipeline():
    """The second virtual stage of the first pipeline rank holds layer 2; its second micro-batch of four is hit."""
    hit = nan_in_the_output(0, "decoder.layers.0.self_attention.linear_qkv", (1, 5))
    flags = ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2")
    return step_with_hooks(hit, *flags, base=DENSE)


@cases.case
def gradient_of_one_module():
    def attach(trainer, modules):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(lambda gradient: gradient * float("inf"))

        if trainer.state.rank == 1:
            modules["decoder.layers.1.self_attention.linear_proj"].register_forward_hook(hook)

    return step_with_hooks(attach, "--use-distributed-optimizer", "--overlap-grad-reduce")


@cases.case
def steps_passed_over():
    """Steps 3, 4 and 7 of 8 are passed over; then the same from the checkpoint of step 3, in the middle of a window."""
    import torch

    from megatron_telechat.parallel.state import destroy

    flags = [
        *MOE,
        *EP2,
        "--train-iters",
        "8",
        "--lr-warmup-iters",
        "4",
        "--lr-warmup-init",
        "1e-5",
        "--iterations-to-skip",
        "3-4,7",
    ]
    folder = Path(os.environ["RUN_DIR"])
    runs = {"whole": ["--save-interval", "3"], "resumed": ["--load", f"{folder}/whole/checkpoints", "--load-step", "3"]}
    found: dict = {}
    for name, more in runs.items():
        trainer = make_trainer([*flags, *more], folder / name)
        changed, inner = [], trainer.take_step

        def step(iterators, trainer=trainer, changed=changed, inner=inner):
            before = [shard.parameter.detach().clone() for shard in trainer.shards]
            result = inner(iterators)
            changed.append(any(not torch.equal(a, b.parameter) for a, b in zip(before, trainer.shards, strict=True)))
            return result

        trainer.take_step = step
        code = trainer.fit()
        trainer.release()
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        keys = ("step", "loss", "grad_norm", "lr", "consumed_samples")
        found[name] = {
            "code": code,
            "changed": changed,
            "records": [{key: line[key] for key in keys} for line in lines if "loss" in line],
            "events": [line for line in lines if line.get("event") == "skipped_step"],
            "taken": trainer.steps_taken.extra["steps"],
            "window": trainer.spikes.extra["spike_window"],
        }
        destroy(keep_world=True)
    return found


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

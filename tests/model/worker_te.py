"""The real model on megatron-core's wrappers of Transformer Engine, over a stand-in of one release; prints JSON.

python tests/model/worker_te.py RELEASE
torchrun --nproc-per-node 2 tests/model/worker_te.py RELEASE      its attention over ranks
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.model import te_stand_in

SEQ, MICRO_BATCHES = 32, 2
DENSE = dict(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4, vocab_size=128,
    init_method_std=0.1,
)  # fmt: skip
MOE = dict(DENSE, num_experts=4, moe_ffn_hidden_size=48, moe_layer_freq=2, moe_shared_expert_intermediate_size=32)


class Ranks:
    """This process as the one rank, and its model on torch's classes or on Transformer Engine's."""

    def __init__(self, size: int = 1) -> None:
        from megatron_telechat import parallel
        from megatron_telechat.backend import get_backend
        from megatron_telechat.config import ParallelConfig, RunConfig
        from megatron_telechat.device_kinds import DEVICE_KINDS

        self.cpu = get_backend("cpu")
        self.parallel = ParallelConfig(world_size=size, context_parallel_size=size)
        self.state = parallel.initialize(RunConfig(parallel=self.parallel), self.cpu)
        # The answers of a device that Transformer Engine has kernels for, over the memory of this one.
        self.te = SimpleNamespace(device=self.cpu.device, traits=DEVICE_KINDS["cuda"])

    def run_of(self, model: dict[str, Any], **training: Any) -> Any:
        from megatron_telechat.config import ModelConfig, RunConfig, TrainingConfig

        fields = dict(precision="fp32", seq_length=SEQ, micro_batch_size=1, global_batch_size=MICRO_BATCHES)
        training = TrainingConfig(**{**fields, **training})
        return RunConfig(model=ModelConfig(**model), training=training, parallel=self.parallel)

    def build(self, run: Any, backend: Any) -> Any:
        from megatron_telechat.model import build_model
        from megatron_telechat.training.optimizer import wrap_data_parallel

        return wrap_data_parallel(build_model(run, self.state, backend), run, self.state)

    def step(self, run: Any, virtual_stages: Any) -> float:
        """Forward and backward of a batch on megatron-core's schedule; the sum of the losses."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_telechat.parallel.context.layout import zigzag

        generator = torch.Generator().manual_seed(7)
        tokens, labels = (
            torch.randint(run.model.vocab_size, (MICRO_BATCHES, 1, SEQ), generator=generator) for _ in range(2)
        )
        mine = torch.from_numpy(zigzag(SEQ, self.state.cp_size).positions(self.state.cp_rank))
        tokens, labels = tokens[..., mine], labels[..., mine]
        losses: list[float] = []

        def forward_step(iterator: Any, model: Any) -> Any:
            batch = next(iterator)
            out = model(tokens[batch], None, labels=labels[batch])

            def loss(per_token: Any) -> Any:
                losses.append(per_token.sum().item())
                return per_token.sum(), torch.tensor(per_token.numel(), dtype=torch.int), {}

            return out, loss

        virtual_stages[0].zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(range(MICRO_BATCHES)),
            model=virtual_stages[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=SEQ,
            micro_batch_size=1,
            forward_only=False,
        )
        return sum(losses)

    def gradients(self, virtual_stages: Any) -> dict[str, Any]:
        return {name: parameter.main_grad.clone() for name, parameter in virtual_stages[0].module.named_parameters()}


def as_torch_computes(ranks: Ranks, model: dict[str, Any]) -> dict[str, float]:
    """Loss and gradients of the wrappers' model against those of the model on torch's classes, relative."""
    run = ranks.run_of(model)
    found = []
    for backend in (ranks.cpu, ranks.te):
        if backend is ranks.te and ranks.state.cp_size > 1:
            run = replace(run, parallel=replace(run.parallel, cp_implementation="transformer_engine"))
        virtual_stages = ranks.build(run, backend)
        found.append((ranks.step(run, virtual_stages), ranks.gradients(virtual_stages)))
    (loss, expected), (te_loss, gradients) = found
    assert set(expected) == set(gradients)
    errors = [((gradients[name] - grad).norm() / (grad.norm() + 1e-12)).item() for name, grad in expected.items()]
    return {"loss": abs(te_loss / loss - 1), "gradient": max(errors)}


def optimizer(ranks: Ranks) -> list[str]:
    """Classes of the optimizers that megatron-core builds where Transformer Engine is installed."""
    from megatron_telechat.training.optimizer import build_optimizer

    run = ranks.run_of(DENSE, precision="bf16")
    made = build_optimizer(ranks.build(run, ranks.te), run, ranks.state)
    return [type(part.optimizer).__name__ for part in made.chained_optimizers]


def fp8(ranks: Ranks, log: te_stand_in.Log, recipe: str) -> dict[str, Any]:
    """A step in FP8 without recompute and with each kind that is allowed; then one after the weights have moved."""
    import torch

    found: dict[str, Any] = {"different": [], "outside": []}
    settings = dict(precision="bf16", fp8_format="hybrid", fp8_recipe=recipe, fp8_margin=1, fp8_amax_history_len=4)
    expected = None
    for layout in ("none,none", "full,full", "core_attn+moe,core_attn+mlp", "full,none"):
        run = ranks.run_of(MOE, recompute_layout=layout, **settings)
        virtual_stages = ranks.build(run, ranks.te)
        log.products.clear()
        loss = ranks.step(run, virtual_stages)
        if not all(fp8 for _, fp8 in log.products):
            found["outside"].append(layout)
        gradients = ranks.gradients(virtual_stages)
        if expected is None:
            expected = (loss, gradients)
            found["products"] = len(log.products)
            found["steps"] = moved(ranks, run, virtual_stages)
        elif loss != expected[0] or any(not torch.equal(expected[1][name], grad) for name, grad in gradients.items()):
            found["different"].append(layout)
        found["left"] = te_stand_in.Quantisation.enabled
    found["recipe"] = [name for name, made in log.calls.items() if name in te_stand_in.RECIPES and made]
    found["bf16"] = abs(ranks.step(*plain(ranks)) / expected[0] - 1)
    return found


def plain(ranks: Ranks) -> tuple[Any, Any]:
    run = ranks.run_of(MOE, precision="bf16")
    return run, ranks.build(run, ranks.te)


def moved(ranks: Ranks, run: Any, virtual_stages: Any) -> list[bool]:
    """Whether a step sees the weights as they are: the same loss for the same ones, another for others. FP8 keeps the
    weights of a step's first micro-batch, which the schedules have to say."""
    import torch

    losses = []
    for factor in (1.0, 2.0, 0.5):
        with torch.no_grad():
            for name, parameter in virtual_stages[0].module.named_parameters():
                if "linear_" in name and name.endswith("weight"):
                    parameter.mul_(factor)
        losses.append(ranks.step(run, virtual_stages))
    return [losses[0] != losses[1], losses[0] == losses[2]]


def over_ranks(log: te_stand_in.Log, size: int) -> None:
    """Its attention over the ranks of this launch beside ours."""
    ranks = Ranks(size)
    from megatron.core.extensions import transformer_engine as extension

    extension.TEDotProductAttention.cp_stream = object()  # megatron-core would make one of CUDA
    found = {name: as_torch_computes(ranks, model) for name, model in (("dense", DENSE), ("moe", MOE))}
    if ranks.state.rank == 0:
        print(json.dumps({**found, "calls": {name: sorted(set(calls)) for name, calls in log.calls.items()}}))


def main() -> None:
    log = te_stand_in.install(sys.argv[1])
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        over_ranks(log, size)
        return
    ranks = Ranks()
    from megatron.core.extensions import transformer_engine as extension

    assert extension.HAVE_TE
    answer: dict[str, Any] = {
        "dense": as_torch_computes(ranks, DENSE),
        "moe": as_torch_computes(ranks, MOE),
        "optimizer": optimizer(ranks),
    }
    answer["quiet"] = not any(fp8 for _, fp8 in log.products)
    answer["fp8"] = {recipe: fp8(ranks, log, recipe) for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")}
    answer["calls"] = {name: sorted(set(calls)) for name, calls in log.calls.items()}
    answer["ignored"] = sorted(log.ignored)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

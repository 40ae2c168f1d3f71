"""Runs that do not train all tensors, on many layouts, and the same in plain torch with ``requires_grad`` off."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, make_trainer, weight_boxes  # noqa: E402

STEPS = 10
FOLDER = Path(os.environ.get("FREEZE_DIR", "/nonexistent"))
BELOW = "--freeze embedding.* decoder.layers.0-1.*"
"""All that the first of two pipeline stages holds."""
EXPERTS = "--freeze embedding.* decoder.layers.*.mlp.experts.* --freeze-except decoder.layers.3.mlp.experts.*"
"""Layers 0 to 2 train their routers, and not their experts."""
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2 --no-fold-tensor-into-experts"
DIST = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
FULL = "--recompute-granularity full"
HALF = [*(word for word in DENSE if word != "--fp32"), *"--fp16 --initial-loss-scale 1024".split()]

RUNS = {
    1: {
        "dense_one": (DENSE, BELOW),
        "dense_recompute_full": (DENSE, f"{BELOW} {FULL}"),
        "top_one": (DENSE, "--freeze-except output_layer.* decoder.final_layernorm.*"),
        "half_one": (HALF, BELOW),
        "moe_one": (MOE, EXPERTS),
        "moe_recompute_full_chunks": (MOE, f"{EXPERTS} {FULL} --moe-input-chunks 2"),
    },
    2: {
        "dense_pp2": (DENSE, f"{BELOW} {PP2} {FULL}"),
        "dense_pp2_interleaved": (DENSE, f"{BELOW} {PP2} --num-virtual-stages-per-pipeline-rank 2"),
        "dense_tp2": (DENSE, f"{BELOW} {TP2} --loss-chunk-rows 24"),
        "dense_dp2_distributed": (DENSE, f"{BELOW} {DIST}"),
        "dense_pp2_distributed": (DENSE, f"{BELOW} {PP2} --use-distributed-optimizer"),
        "top_pp2": (DENSE, f"--freeze-except output_layer.* decoder.final_layernorm.* {PP2}"),
        "half_pp2_distributed": (HALF, f"{BELOW} {PP2} --use-distributed-optimizer"),
        "moe_ep2": (MOE, f"{EXPERTS} {EP2}"),
        "moe_pp2_distributed": (MOE, f"{EXPERTS} {PP2} --use-distributed-optimizer"),
    },
}

cases = Cases()


def flags_of(base: list[str], text: str) -> list[str]:
    return [*base, "--train-iters", str(STEPS), *text.split()]


def steps_of(trainer) -> dict:
    iterators = trainer.training_iterators()
    results = [trainer.take_step(iterators)[0] for _ in range(trainer.run.training.train_iters - trainer.step)]
    return {"loss": [r.loss for r in results], "norm": [r.grad_norm for r in results]}


def run_case(name: str, base: list[str], text: str) -> dict:
    """A run; whether its frozen tensors stayed, bit for bit, the others moved, and what a frozen one takes."""
    from safetensors.torch import save_file

    from megatron_telechat.checkpoint.optimizer_state import optimizer_slices
    from megatron_telechat.tensors.frozen import frozen_keys

    trainer = make_trainer(flags_of(base, text), FOLDER / name)
    try:
        frozen = frozen_keys(trainer.run)
        before = weight_boxes(trainer)
        found = steps_of(trainer)
        after = weight_boxes(trainer)
        save_file(after, FOLDER / f"{name}.rank{trainer.state.rank}.safetensors")
        held = {item.shard.piece.key for item in optimizer_slices(trainer.optimizer, trainer.shards)}
        stages = [parameter for stage in trainer.virtual_stages for parameter in stage.parameters()]
        buffers = [b for stage in trainer.virtual_stages for b in (*stage.buffers, *stage.expert_parallel_buffers)]
        return {
            **found,
            "moved": sorted(key for key in before if key.split("@")[0] in frozen and not _same(before, after, key)),
            "stayed": sorted(key for key in before if key.split("@")[0] not in frozen and _same(before, after, key)),
            "held": sorted(held & frozen),
            "gradients": sum(hasattr(p, "main_grad") or p.grad is not None for p in stages if not p.requires_grad),
            "buffered": sum(buffer.numel_unpadded for buffer in buffers),
            "trained": sum(p.numel() for p in stages if p.requires_grad),
        }
    finally:
        trainer.release()


def _same(before, after, key: str) -> bool:
    import torch

    return torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))


for _name, (_base, _text) in RUNS[int(os.environ.get("WORLD_SIZE", "1"))].items():
    cases.add(_name, lambda name=_name, base=_base, text=_text: run_case(name, base, text))

if os.environ.get("WORLD_SIZE", "1") == "1":

    @cases.case
    def plain_torch() -> dict:
        """The dense run: the bare modules, torch's AdamW and clipping, one backward of the whole batch."""
        import torch
        from safetensors.torch import save_file

        from megatron_telechat.model import build_model, parameter_shards

        trainer = make_trainer(flags_of(DENSE, ""), FOLDER / "plain")
        try:
            run, rows = trainer.run, trainer.datasets.train
            [model] = build_model(run, trainer.state, trainer.backend)
            shards = parameter_shards([model], run, trainer.state)
            for shard in shards:
                key = shard.piece.key
                below = key.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.1."))
                shard.parameter.requires_grad_(not below)
            groups = [
                {"params": [s.parameter for s in shards if s.parameter.requires_grad and s.piece.spec.decays == decays],
                 "weight_decay": 0.1 * decays}
                for decays in (True, False)
            ]  # fmt: skip
            optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
            found: dict[str, list[float]] = {"loss": [], "norm": []}
            for step in range(STEPS):
                batch = rows.batch(range(8 * step, 8 * step + 8))
                loss = model(batch["tokens"], batch["position_ids"], labels=batch["labels"]).float().mean()
                optimizer.zero_grad()
                loss.backward()
                trained = [p for group in groups for p in group["params"]]
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                found["loss"].append(float(loss))
                found["norm"].append(float(norm))
            weights = {f"{s.piece.key}@{','.join('0' * len(s.piece.box.shape))}": s for s in shards}
            boxes = {name: s.parameter.detach().view(s.piece.box.shape).clone() for name, s in weights.items()}
            save_file(boxes, FOLDER / "plain_torch.rank0.safetensors")
            return found
        finally:
            trainer.release()

else:
    from megatron_telechat import parallel

    def _resumed(folder: str, text: str) -> dict:
        trainer = make_trainer(flags_of(DENSE, text), FOLDER / folder)
        try:
            return {"from": trainer.step, **steps_of(trainer)}
        finally:
            trainer.release()
            parallel.destroy(keep_world=True)

    @cases.case
    def resumed_in_other_layouts() -> dict:
        """Saved by one layout, gone on in others; with more frozen; and with what has no optimizer state trained."""
        import torch.distributed as dist

        from megatron_telechat.checkpoint.format import CheckpointReader
        from megatron_telechat.errors import CheckpointError

        first = make_trainer([*flags_of(DENSE, f"{BELOW} {PP2}"), "--exit-interval", "5"], FOLDER / "stopped")
        try:
            first.fit()
        finally:
            first.release()
            parallel.destroy(keep_world=True)
        reader = CheckpointReader(FOLDER / "stopped" / "checkpoints" / "iter_0000005")
        stored = [key for key in reader.entries if key.startswith("optimizer/")]
        reader.close()
        found = {
            "stored": sorted(key for key in stored if "embedding" in key or ".layers.0." in key or ".layers.1." in key),
            "tp2": _resumed("stopped", f"{BELOW} {TP2} --use-distributed-optimizer"),
            "more": _resumed("stopped", f"{BELOW} decoder.layers.2.* {PP2}")["loss"][-1],
        }
        dist.barrier()
        try:
            found["off"] = _resumed("stopped", PP2)["from"]
        except CheckpointError as error:
            found["off"] = error.render()
        return found


if __name__ == "__main__":
    cases.main()

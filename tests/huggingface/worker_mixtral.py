"""Logits of a Mixtral over pipeline stages, tensor-parallel ranks and experts on several ranks: imported weights,
loaded as a training loads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import make_trainer  # noqa: E402

WORK = Path(os.environ.get("MIXTRAL_DIR", "/nonexistent"))
LENGTH = 48
PP2, PP4 = (f"--pipeline-model-parallel-size {size}" for size in (2, 4))
TP2, EP2 = "--tensor-model-parallel-size 2", "--expert-model-parallel-size 2"
LAYOUTS = {
    "pp4": PP4,
    "pp2_ep2": f"{PP2} {EP2}",
    "pp2_interleaved_ep2_chunks": f"{PP2} --num-virtual-stages-per-pipeline-rank 2 {EP2} --moe-input-chunks 2",
    "tp2_pp2_folded": f"{TP2} {PP2}",
    "tp2_pp2_sharded_experts": f"{TP2} {PP2} --no-fold-tensor-into-experts",
}

cases = Cases()


def logits(text: str) -> float:
    """The largest difference from transformers' logits; 0 off the last stage."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    from megatron_telechat.moe.pooled import carried_rows

    golden = load_file(WORK / "golden.safetensors")
    ids = golden[f"input_ids_{LENGTH}"]
    flags = (
        f"--config {WORK}/model.yaml --seq-length {LENGTH} --micro-batch-size {ids.shape[0]} --global-batch-size 16 "
        f"--train-iters 1 --mock-data --device cpu --fp32 --no-progress --finetune --load {WORK}/checkpoints {text}"
    )
    trainer = make_trainer(flags.split(), WORK / "run")
    try:
        stages = [stage.module for stage in trainer.virtual_stages]
        group = parallel_state.get_pipeline_model_parallel_group()
        place, parts = dist.get_rank(group), dist.get_world_size(group)
        places = torch.arange(LENGTH).expand_as(ids)
        out = torch.empty(0)
        with torch.no_grad():
            for number in range(parts * len(stages)):
                owner, before = number % parts, (number - 1) % parts
                if number and place == before and owner != before:
                    dist.send(out.contiguous(), dist.get_global_rank(group, owner))
                if place != owner:
                    continue
                stage = stages[number // parts].eval()
                if number:
                    rows = LENGTH // trainer.run.parallel.sequence_parallel_size + carried_rows(trainer.run)
                    entering = torch.empty(rows, ids.shape[0], trainer.run.model.hidden_size)
                    if owner != before:
                        dist.recv(entering, dist.get_global_rank(group, before))
                    stage.set_input_tensor(entering if owner != before else out)
                out = stage(ids, places, gather_logits=True)
        if not trainer.state.is_last_stage(len(stages) - 1):
            return 0.0
        assert out.shape == golden[f"logits_{LENGTH}"].shape
        return float((out - golden[f"logits_{LENGTH}"]).abs().max())
    finally:
        trainer.release()


for _name, _text in LAYOUTS.items():
    cases.add(_name, lambda text=_text: logits(text))

if __name__ == "__main__":
    cases.main()

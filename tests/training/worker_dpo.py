"""DPO runs of one model on many layouts; stopped and gone on; with a cache that is whole, damaged or gone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import gradient_boxes, make_trainer  # noqa: E402

STEPS, SEQ, PEAK = 12, 96, 3e-4
FOLDER = Path(os.environ.get("DPO_DIR", "/nonexistent"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
BASE = (
    f"--seq-length {SEQ} --micro-batch-size 1 --global-batch-size 8 --train-iters {STEPS} --lr {PEAK} "
    "--lr-decay-style constant --lr-warmup-iters 0 --weight-decay 0 --adam-beta2 0.95 --device cpu --no-progress "
    "--dpo --dpo-beta 0.5 --finetune --split 1 --log-interval 1"
).split()
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ALONE = "--no-sft-packing"
DIST = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
AUX = "--moe-aux-loss-coeff 0.02 --moe-z-loss-coeff 0.001"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
FREEZE = "--train-iters 3 --freeze embedding.* decoder.layers.0-1.*"

RUNS = {
    1: {
        "dense_packed": "",
        "dense_alone": f"{ALONE} --micro-batch-size 2",
        "dense_ipo": f"{ALONE} --dpo-loss-type ipo --train-iters 2",
        "dense_rpo": f"{ALONE} --dpo-label-smoothing 0.2 --dpo-sft-loss-weight 0.3 --train-iters 2",
        "dense_chunks": "--loss-chunk-rows 32 --recompute-granularity full --micro-batch-size 4",
        "dense_frozen": FREEZE,
        "dense_fp16": "--fp16 --initial-loss-scale 64 --train-iters 3",
        "moe_packed": "--moe-aux-loss-coeff 0 --moe-z-loss-coeff 0 --train-iters 4",
        "moe_aux": AUX,
    },
    2: {
        "dense_tp2": TP2,
        "dense_pp2_interleaved": VPP2,
        "moe_ep2": f"{EP2} {AUX}",
    },
    4: {
        "dense_tp2_pp2": f"{TP2} {PP2}",
        "dense_pp2_dp2_distributed": f"{VPP2} {DIST}",
        "dense_tp2_chunks_offload": f"{TP2} --loss-chunk-rows 24 --use-distributed-optimizer --optimizer-cpu-offload",
        "dense_pp2_frozen": f"{FREEZE} {PP2}",
        "dense_fp16_pp2": f"--fp16 --initial-loss-scale 64 --train-iters 3 {PP2}",
        "moe_ep2_pp2": f"{EP2} {PP2} {AUX}",
        "moe_tp2_ep2": f"{TP2} {AUX} --recompute-granularity selective --recompute-modules moe",
    },
}

ONE_MORE = {"prompt": "more", "chosen": "abc", "rejected": "defg"}

cases = Cases()


def flags_of(model: str, text: str = "") -> list[str]:
    folder = FOLDER / model
    data = ["--data-path", str(FOLDER / "pairs.jsonl"), "--tokenizer-model", str(FOLDER / "tokenizer.json")]
    precision = [] if "--fp16" in text else ["--fp32"]
    weights = ["--load", str(folder / "weights")]
    return ["--config", str(folder / "model.yaml"), *BASE, *precision, *data, *weights, *text.split()]


def start(run: str, flags: list[str]) -> int:
    """One start of the command, as `train` starts it; the exit code."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.sequence import StageSequence
    from megatron_telechat.training.signals import StopRequests

    loaded = load_run_config([*flags, "--run-dir", str(FOLDER / run)], os.environ)
    requests = StopRequests(FOLDER / run, watch_files=os.environ["RANK"] == "0")
    try:
        return StageSequence(loaded.stages, requests, get_backend(loaded.run.training.device)).fit()
    finally:
        parallel.destroy(keep_world=True)


def records(run: str) -> list[dict]:
    lines = (FOLDER / run / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "reward_margin", "reward_accuracy", "rewards_chosen", "rewards_rejected")
    keys = (*keys, "valid_loss", "valid_reward_accuracy", "valid_reward_margin")
    found = [{key: line[key] for key in keys if key in line} for line in map(json.loads, lines)]
    return [record for record in found if len(record) > 1]


def run_case(name: str, text: str) -> dict:
    import torch.distributed as dist

    code = start(name, flags_of(name.split("_")[0], text))
    if WORLD > 1:
        dist.barrier()
    return {"code": code, "records": records(name)}


for _name, _text in RUNS[WORLD].items():
    cases.add(_name, lambda name=_name, text=_text: run_case(name, text))

if WORLD == 2:

    @cases.case
    def dense_stages() -> dict:
        """The layout changes after five steps: the second stage finds what the first one computed."""
        import torch.distributed as dist

        flags = flags_of("dense")
        config = FOLDER / "dense" / "stages.yaml"
        model = (FOLDER / "dense" / "model.yaml").read_text()
        later = "  - from_samples: 40\n    tensor_model_parallel_size: 2\n"
        config.write_text(f"{model}\nstages:\n  - from_samples: 0\n    tensor_model_parallel_size: 1\n{later}")
        flags[flags.index("--config") + 1] = str(config)
        code = start("dense_stages", flags)
        dist.barrier()
        tables = list((FOLDER / "dense_stages" / "cache").glob("dpo-*"))
        return {"code": code, "records": records("dense_stages"), "tables": len(tables)}


if WORLD == 1:
    from megatron_telechat import parallel

    @cases.case
    def first_gradients() -> None:
        from safetensors.torch import save_file

        trainer = make_trainer(flags_of("dense"), FOLDER / "gradients")
        try:
            trainer.train_step.forward_backward(trainer.training_iterators())
            save_file(gradient_boxes(trainer), FOLDER / "gradients.safetensors")
        finally:
            trainer.release()

    @cases.case
    def router_gradients() -> list[dict[str, float]]:
        """What the loss of the routers alone adds to the gradients of their weights: under the cross entropy of tokens,
        and under the loss of pairs."""
        from megatron_telechat.training.objective import TOKENS

        found = []
        for tokens in (True, False):
            taken = []
            for coefficient in (1.0, 0.0):
                flags = f"--moe-aux-loss-coeff {coefficient} --moe-z-loss-coeff 0 --micro-batch-size 2"
                trainer = make_trainer(flags_of("moe", flags), FOLDER / "routers")
                try:
                    if tokens:
                        trainer.train_step.objective = TOKENS
                    trainer.train_step.forward_backward(trainer.training_iterators())
                    boxes = gradient_boxes(trainer)
                    taken.append({name: box.double() for name, box in boxes.items() if "router" in name})
                finally:
                    trainer.release()
                    parallel.destroy(keep_world=True)
            found.append({name: (box - taken[1][name]).flatten()[:20].tolist() for name, box in taken[0].items()})
        return found

    @cases.case
    def evaluated() -> dict:
        """Evaluated on pairs of another file, which begins with those that are trained."""
        flags = flags_of("dense", f"{ALONE} --train-iters 2 --eval-interval 1 --eval-iters 6")
        flags[flags.index("--data-path")] = "--train-data-path"
        (FOLDER / "valid.jsonl").write_text((FOLDER / "pairs.jsonl").read_text() + json.dumps(ONE_MORE) + "\n")
        code = start("evaluated", [*flags, "--valid-data-path", str(FOLDER / "valid.jsonl")])
        return {"code": code, "records": records("evaluated")}

    @cases.case
    def no_pair_to_validate_on() -> dict:
        """Evaluations that are asked for, on a file whose pairs are all too long."""
        flags = flags_of("dense", "--train-iters 1 --eval-interval 1")
        flags[flags.index("--data-path")] = "--train-data-path"
        (FOLDER / "long.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a" * SEQ, "rejected": "b"}) + "\n")
        code = start("novalid", [*flags, "--valid-data-path", str(FOLDER / "long.jsonl")])
        return {"code": code, "records": records("novalid")}

    @cases.case
    def stopped_and_gone_on() -> dict:
        """A run that ends after five steps and goes on, whose cache is then whole, damaged, or gone; and what is
        refused."""
        import shutil

        from megatron_telechat.errors import UserError

        def stop(name: str) -> Path:
            assert start(name, [*flags_of("dense"), "--exit-interval", "5"]) == 0
            [table] = (FOLDER / name / "cache").glob("dpo-*/log_probs.npy")
            return table

        def refused(name: str, *flags: str) -> str:
            try:
                start(name, [*flags_of("dense"), *flags])
            except UserError as error:
                return f"{error.exit_code} {error.render()}"
            return "went on"

        found = {}
        for name in ("resumed", "damaged", "gone"):
            table = stop(name)
            before, written = table.read_bytes(), table.stat().st_mtime_ns
            if name == "damaged":
                table.write_bytes(before[:-8] + bytes(8))
            if name == "gone":
                shutil.rmtree(table.parent)
            code = start(name, flags_of("dense"))
            found[name] = {
                "code": code,
                "records": records(name),
                "same": table.read_bytes() == before,
                "untouched": table.stat().st_mtime_ns == written,
            }
        # Weights of the run itself, which are trained, in the place of those it began with.
        trained = str(FOLDER / "resumed" / "checkpoints")
        found["other"] = refused("resumed", "--dpo-reference", trained, "--train-iters", "14")
        found["another_model"] = refused("another", "--dpo-reference", str(FOLDER / "moe" / "weights"))
        table = stop("lost")
        weights = FOLDER / "dense" / "weights"
        os.rename(weights, FOLDER / "dense" / "away")
        weights.mkdir()
        try:
            shutil.copytree(FOLDER / "lost", FOLDER / "lost_too")
            cache = ["--data-cache-path", str(FOLDER / "lost" / "cache")]
            found["without_weights"] = start("lost_too", [*flags_of("dense"), *cache])
            shutil.rmtree(table.parent)
            found["lost"] = refused("lost")
        finally:
            weights.rmdir()
            os.rename(FOLDER / "dense" / "away", weights)
        return found

    @cases.case
    def another_reference() -> dict:
        """Trained weights go on, held against those that they began with."""
        trained = FOLDER / "dense_packed" / "checkpoints"
        base = flags_of("dense")
        base[base.index("--load") + 1] = str(trained)
        code = start("further", [*base, "--dpo-reference", str(FOLDER / "dense" / "weights"), "--train-iters", "1"])
        return {"code": code, "records": records("further")}


if __name__ == "__main__":
    cases.main()

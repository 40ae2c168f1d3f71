"""Fine-tuning runs of one model on many layouts, with and without borders: losses, tokens that counted, a resume, a
begin."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, make_trainer  # noqa: E402

STEPS = 6
BASE = [
    *(word for word in DENSE if word != "--mock-data"),
    *"--vocab-size 320 --seq-length 64 --global-batch-size 8 --sft --split 1 --num-workers 1".split(),
    *("--train-iters", str(STEPS)),
]
RESETS = "--reset-position-ids --reset-attention-mask"
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
CP2 = "--context-parallel-size 2"

RUNS = {
    1: {
        "plain": "",
        "plain_mbs8": "--micro-batch-size 8",
        "plain_answer": "--sft-loss-mask answer",
        "reset": RESETS,
        "reset_recompute_full": f"{RESETS} --recompute-granularity full",
        "reset_recompute_selective": f"{RESETS} --recompute-granularity selective --recompute-modules core_attn",
        "reset_alone": f"{RESETS} --no-sft-packing",
    },
    2: {
        "plain_dp2": "",
        "reset_dp2_mbs1": f"{RESETS} --micro-batch-size 1",
        "reset_tp2": f"{RESETS} {TP2}",
        "reset_pp2_interleaved": f"{RESETS} {PP2} --num-virtual-stages-per-pipeline-rank 2",
        "attention_alone_pp2": f"--reset-attention-mask {PP2}",
        "plain_cp2": CP2,
        "reset_cp2": f"{RESETS} {CP2}",
        "reset_cp2_dealt_recompute_full": f"{RESETS} {CP2} --cp-layout dealt --recompute-granularity full",
        "reset_cp2_documents_keep": f"{RESETS} {CP2} --cp-layout documents --cp-keep-received --micro-batch-size 4",
        "alone_cp2_contiguous": f"{RESETS} {CP2} --cp-layout contiguous --no-sft-packing",
    },
}

cases = Cases()


def flags_of(text: str) -> list[str]:
    folder = Path(os.environ["FINETUNE_DIR"])
    data = ["--data-path", str(folder / "d.jsonl"), "--tokenizer-model", str(folder / "tokenizer.json")]
    return [*BASE, *data, *text.split()]


def results_of(trainer) -> dict:
    iterators = trainer.training_iterators()
    results = [trainer.take_step(iterators)[0] for _ in range(trainer.run.training.train_iters - trainer.step)]
    return {
        "loss": [r.loss for r in results],
        "tokens": [r.tokens for r in results],
        "norm": [r.grad_norm for r in results],
    }


def run_case(name: str, text: str) -> dict:
    trainer = make_trainer(flags_of(text), Path(os.environ["FINETUNE_DIR"]) / name)
    try:
        return results_of(trainer)
    finally:
        trainer.release()


def command(run: str, *flags: str, base: list[str] | None = None) -> int:
    """One start of the command, as `train` starts it; the exit code."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.sequence import StageSequence
    from megatron_telechat.training.signals import StopRequests

    folder = Path(os.environ["FINETUNE_DIR"]) / run
    base = flags_of(RESETS) if base is None else base
    loaded = load_run_config([*base, "--train-iters", "0", *flags, "--run-dir", str(folder)], os.environ)
    requests = StopRequests(folder, watch_files=os.environ["RANK"] == "0")
    try:
        return StageSequence(loaded.stages, requests, get_backend(loaded.run.training.device)).fit()
    finally:
        parallel.destroy(keep_world=True)


def lines_of(run: str) -> list[dict]:
    path = Path(os.environ["FINETUNE_DIR"]) / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_in(run: str) -> dict[str, list]:
    """What must repeat, by step."""
    keys = ("loss", "grad_norm", "lr", "consumed_samples")
    return {str(line["step"]): [line[key] for key in keys] for line in lines_of(run) if "loss" in line}


COSINE = ("--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.2")


@cases.case
def epochs() -> dict:
    """An epoch; stopped on its way and gone on; then one half more; and what was written of its length."""
    import torch.distributed as dist

    folder = Path(os.environ["FINETUNE_DIR"])
    world = os.environ.get("WORLD_SIZE", "1")
    whole, stopped = f"epoch{world}", f"epoch{world}_stopped"
    codes = [command(whole, *COSINE, "--train-epochs", "1")]
    codes += [command(stopped, *COSINE, "--train-epochs", "1", "--exit-interval", "3")]
    codes += [command(stopped, *COSINE, "--train-epochs", "1")]
    if world != "1":
        dist.barrier()
    found = {"codes": codes, "whole": steps_in(whole), "stopped": steps_in(stopped)}
    codes.append(command(stopped, *COSINE, "--train-epochs", "1.5", "--global-batch-size", "4"))
    if world != "1":
        dist.barrier()
    found["longer"] = steps_in(stopped)
    found["config"] = (folder / whole / "config.yaml").read_text()
    return found


for _name, _text in RUNS[int(os.environ.get("WORLD_SIZE", "1"))].items():
    cases.add(_name, lambda name=_name, text=_text: run_case(name, text))

if os.environ.get("WORLD_SIZE", "1") == "1":
    from megatron_telechat import parallel

    @cases.case
    def a_row_alone() -> dict:
        """The losses of the dialogs of a row, each computed in a row of its own, against the packed row."""
        import torch

        from megatron_telechat.model.attention import Segments

        trainer = make_trainer(flags_of(RESETS), Path(os.environ["FINETUNE_DIR"]) / "row")
        try:
            model = trainer.virtual_stages[0]
            model.eval()
            rows = (trainer.datasets.train.batch([sample]) for sample in range(20))
            batch = next(row for row in rows if row["segment_lengths"].numel() > 3)
            lengths = batch["segment_lengths"]
            with torch.no_grad():
                packed = model(
                    batch["tokens"],
                    batch["position_ids"],
                    labels=batch["labels"],
                    segments=Segments.of(lengths, 1),
                )[0]
                at, alone = 0, []
                for length in lengths.tolist():
                    row = {name: torch.zeros_like(batch[name]) for name in ("tokens", "labels")}
                    for name in row:
                        row[name][0, :length] = batch[name][0, at : at + length]
                    places = torch.arange(row["tokens"].shape[1])[None]
                    alone.append(model(row["tokens"], places, labels=row["labels"])[0, :length])
                    at += length
                leaky = model(batch["tokens"], batch["position_ids"], labels=batch["labels"])[0]
            return {
                "segments": lengths.tolist(),
                "error": float((packed - torch.cat(alone)).abs().max()),
                "leak": float((leaky - torch.cat(alone)).abs().max()),
            }
        finally:
            trainer.release()

    @cases.case
    def stopped_and_resumed() -> dict:
        folder = Path(os.environ["FINETUNE_DIR"])
        flags = flags_of(RESETS)
        first = make_trainer([*flags, "--exit-interval", "3"], folder / "stopped")
        try:
            first.fit()
        finally:
            first.release()
        parallel.destroy(keep_world=True)
        second = make_trainer([*flags, "--micro-batch-size", "4"], folder / "stopped")
        try:
            found = results_of(second)
            return {**found, "from": second.resumed.step}
        finally:
            second.release()

    @cases.case
    def begun_from_other_weights() -> dict:
        """--finetune --load: weights of the run above, step 0, and the run's own folder from then on."""
        folder = Path(os.environ["FINETUNE_DIR"])
        flags = [
            *flags_of(RESETS),
            "--finetune",
            "--load",
            str(folder / "stopped" / "checkpoints"),
            "--seed",
            "5",
            "--exit-interval",
            "2",
        ]
        first = make_trainer(flags, folder / "begun")
        try:
            started = first.step, bool(first.resumed)
            first.fit()
        finally:
            first.release()
        parallel.destroy(keep_world=True)
        second = make_trainer(flags, folder / "begun")
        try:
            return {"started": started, "then": second.step, "load": second.run.checkpoint.load}
        finally:
            second.release()

    @cases.case
    def no_dialog_to_validate_on() -> dict:
        """Evaluations that are asked for, on a file whose dialogs are all too long."""
        folder = Path(os.environ["FINETUNE_DIR"])
        base = flags_of(RESETS)
        base[base.index("--data-path")] = "--train-data-path"
        valid = ("--valid-data-path", str(folder / "long.jsonl"), "--eval-interval", "2")
        code = command("novalid", *valid, "--train-iters", "4", base=base)
        lines = lines_of("novalid")
        return {
            "code": code,
            "losses": sum("loss" in line for line in lines),
            "keys": sorted({*sum(map(list, lines), [])}),
        }

    @cases.case
    def other_mask_on_resume() -> str:
        from megatron_telechat.errors import DataError

        folder = Path(os.environ["FINETUNE_DIR"])
        try:
            make_trainer([*flags_of(RESETS), "--sft-loss-mask", "answer"], folder / "stopped").release()
        except DataError as error:
            return error.render()
        return "went on"


if __name__ == "__main__":
    cases.main()

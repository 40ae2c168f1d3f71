"""Commands given again and again: roll-backs, beginnings in another run, complete runs. Two ranks, each command a
trainer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, make_trainer  # noqa: E402

FOLDER = Path(os.environ.get("BRANCHES_DIR", "/nonexistent"))
BASE = [*DENSE, "--train-iters", "8", "--save-interval", "2"]

cases = Cases()


def command(run: str, *flags: str) -> dict:
    """What one start of a command does: where it began, its exit code, the step it ended at."""
    from megatron_telechat import parallel

    trainer = make_trainer([*BASE, *flags], FOLDER / run)
    try:
        begun = trainer.step
        code = trainer.fit()
    finally:
        trainer.release()
        parallel.destroy(keep_world=True)
    return {
        "from": begun,
        "to": trainer.step,
        "code": code,
        "message": trainer.resumed.message if trainer.resumed else "",
    }


def losses(run: str) -> dict[str, float]:
    """Loss by step as the file tells it last."""
    records = map(json.loads, (FOLDER / run / "metrics.jsonl").read_text().splitlines())
    return {str(record["step"]): record["loss"] for record in records if "loss" in record}


def folders(run: str) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (FOLDER / run / "checkpoints").iterdir() if path.is_dir())


def records(run: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / run / "metrics.jsonl").read_text().splitlines()]


@cases.case
def roll_back() -> dict:
    """A trunk of 8 steps, back to step 4 with another learning rate, cut off after step 6, the same command to the
    end."""
    command("trunk")
    back = ["--load-step", "4", "--keep-last", "1", "--lr", "2e-3"]
    first = command("trunk", *back, "--exit-interval", "6")
    there, latest = folders("trunk"), (FOLDER / "trunk" / "checkpoints" / "latest").read_text().strip()
    without = command("trunk", "--lr", "2e-3", "--exit-interval", "7")
    again = command("trunk", *back)
    return {
        "first": first,
        "there": there,
        "latest": latest,
        "without": without,
        "again": again,
        "then": folders("trunk"),
    }


@cases.case
def begins_in_another_run() -> dict:
    """A requeued job: the same command until it is done; the curve is that of one uninterrupted run."""
    command("whole")
    command("a", "--exit-interval", "4")
    starts = []
    for _ in range(6):
        starts.append(command("b", "--load", str(FOLDER / "a" / "checkpoints"), "--exit-interval", "2"))
        if starts[-1]["to"] == 8:
            break
    return {"starts": starts, "whole": losses("whole"), "b": losses("b"), "a": folders("a")}


@cases.case
def complete_run() -> dict:
    """Final evaluations, once; then the same command, and the same without its records."""
    flags = ["--eval-interval", "4", "--eval-iters", "2"]
    first = command("complete", *flags)
    _barrier()  # rank 0 has written the last record
    told = [record for record in records("complete") if "valid_loss" in record or "test_loss" in record]
    before = {path.name: path.stat().st_mtime_ns for path in (FOLDER / "complete" / "checkpoints").iterdir()}
    again = command("complete", *flags)
    _barrier()
    lines = len(records("complete"))
    after = {path.name: path.stat().st_mtime_ns for path in (FOLDER / "complete" / "checkpoints").iterdir()}
    _barrier()
    if os.environ["RANK"] == "0":
        (FOLDER / "complete" / "metrics.jsonl").unlink()
    _barrier()
    made_up = command("complete", *flags)
    _barrier()
    told_again = [record for record in records("complete") if "valid_loss" in record or "test_loss" in record]
    return {
        "first": first,
        "told": told,
        "untouched": before == after,
        "again": again,
        "lines": lines,
        "made_up": made_up,
        "told_again": told_again,
    }


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


@cases.case
def other_meaning() -> dict:
    """The tensors fit, what they mean does not: a resume, and weights for a new run."""
    from megatron_telechat import parallel
    from megatron_telechat.errors import CheckpointError

    command("meant", "--exit-interval", "2")
    saved = str(FOLDER / "meant" / "checkpoints")
    heads = ["--num-attention-heads", "4", "--num-query-groups", "4", "--kv-channels", "16"]
    said = {}
    for name, run, flags in (
        ("resume", "meant", heads),
        ("pretrained", "meant_new", [*heads, "--pretrained-checkpoint", saved]),
        ("rotary", "meant", ["--rotary-base", "50000"]),
    ):
        try:
            make_trainer([*BASE, *flags], FOLDER / run).release()
            said[name] = "loaded"
        except CheckpointError as error:
            said[name] = str(error)
        finally:
            parallel.destroy(keep_world=True)
    said["allowed"] = command("meant", "--rotary-base", "50000", "--allow-model-change", "--exit-interval", "4")
    said["then"] = command("meant", "--rotary-base", "50000")
    return said


if __name__ == "__main__":
    cases.main()

"""A run in three stages on two ranks, whose length, batch, rotary base, layout and learning rate change: stopped and
resumed around each switch. Each command is one sequence of trainers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE  # noqa: E402

FOLDER = Path(os.environ.get("STAGES_DIR", "/nonexistent"))
BASE = [
    *(flag for flag in DENSE if flag != "--mock-data"),
    *("--vocab-size", "512", "--hidden-dropout", "0.1", "--lr-decay-style", "cosine", "--train-iters", "10"),
    *("--split", "1", "--data-path", "3", str(FOLDER / "a"), "1", str(FOLDER / "b")),
    *("--data-cache-path", str(FOLDER / "cache"), "--config", str(FOLDER / "stages.yaml")),
    *("--ema-decay", "0.8", "--average-window-steps", "3"),
]

cases = Cases()


def command(run: str, *flags: str) -> int:
    """One start of the command, as `train` starts it; the exit code."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.sequence import StageSequence
    from megatron_telechat.training.signals import StopRequests

    loaded = load_run_config([*BASE, *flags, "--run-dir", str(FOLDER / run)], os.environ)
    requests = StopRequests(FOLDER / run, watch_files=os.environ["RANK"] == "0")
    try:
        return StageSequence(loaded.stages, requests, get_backend(loaded.run.training.device)).fit()
    finally:
        parallel.destroy(keep_world=True)


def lines(run: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / run / "metrics.jsonl").read_text().splitlines()]


def records(run: str) -> dict[str, list]:
    """What must repeat, by step, as the file tells it last."""
    keys = ("loss", "grad_norm", "lr", "consumed_samples", "consumed_tokens")
    return {str(line["step"]): [line[key] for key in keys] for line in lines(run) if "loss" in line}


def meet() -> None:
    import torch.distributed as dist

    dist.barrier()


@cases.case
def whole() -> dict:
    """The run without a stop."""
    code = command("whole")
    folders = sorted(path.name for path in (FOLDER / "whole" / "checkpoints").iterdir() if path.is_dir())
    events = [line for line in lines("whole") if "event" in line]
    return {"code": code, "records": records("whole"), "folders": folders, "events": events}


@cases.case
def stopped() -> dict:
    """Stopped before the first switch, at it, behind it, and at the second; each time the same command again."""
    codes = [command("stopped", "--exit-interval", str(step)) for step in (3, 4, 5)]
    if os.environ["RANK"] == "0":
        shutil.copytree(FOLDER / "stopped" / "checkpoints" / "iter_0000005", FOLDER / "stopped-5")
    meet()
    codes += [command("stopped", "--exit-interval", "8"), command("stopped")]
    meet()
    return {"codes": codes, "records": records("stopped")}


@cases.case
def killed() -> dict:
    """Killed after a switch, before anything was saved in the new stage: only the checkpoint of the switch is there."""
    found = {}
    for step in (4, 8):
        run = f"killed-{step}"
        if os.environ["RANK"] == "0":
            name = f"checkpoints/iter_{step:07d}"
            shutil.copytree(FOLDER / "whole" / name, FOLDER / run / name)
        meet()
        command(run)
        meet()
        found[str(step)] = records(run)
    return found


@cases.case
def undeclared() -> dict:
    """The checkpoint of the second stage under a command whose stages are others."""
    from megatron_telechat.errors import UserError

    found = {}
    for name, text in {
        "theta": (FOLDER / "stages.yaml").read_text().replace("1e5", "2e5"),
        "length": (FOLDER / "stages.yaml").read_text().replace("seq_length: 64", "seq_length: 48"),
        "none": "stages:\n",
    }.items():
        run = f"undeclared-{name}"
        if os.environ["RANK"] == "0":
            shutil.copytree(FOLDER / "stopped-5", FOLDER / run / "checkpoints" / "iter_0000005")
            (FOLDER / f"{name}.yaml").write_text(text)
        meet()
        try:
            command(run, "--config", str(FOLDER / f"{name}.yaml"))
            found[name] = "taken"
        except UserError as error:
            found[name] = error.render()
    return found


@cases.case
def damaged() -> dict:
    """The newest checkpoint, of the second stage, is damaged: the run goes on from the one before, in its stage."""
    if os.environ["RANK"] == "0":
        shutil.copytree(
            FOLDER / "whole" / "checkpoints" / "iter_0000004", FOLDER / "d" / "checkpoints" / "iter_0000004"
        )
        shutil.copytree(
            FOLDER / "whole" / "checkpoints" / "iter_0000008", FOLDER / "d" / "checkpoints" / "iter_0000008"
        )
        weights = next((FOLDER / "d" / "checkpoints" / "iter_0000008").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:100])
    meet()
    command("d", "--exit-interval", "6")
    meet()
    return records("d")


if __name__ == "__main__":
    cases.main()

"""Asynchronous saves of two ranks: what they write, saves on each other's heels, faults, requests."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.checkpoint import CheckpointReader  # noqa: E402
from tests.harness import Cases  # noqa: E402
from tests.training import writer_faults  # noqa: E402
from tests.training.runs import DENSE, MOE, make_trainer  # noqa: E402
from tests.training.slow_copies import SlowCopies

FOLDER = Path(os.environ.get("ASYNC_DIR", "/nonexistent"))
DENSE_BF16 = [flag for flag in DENSE if flag != "--fp32"] + (
    "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1".split()
)
MOE_FP16 = [flag for flag in MOE if flag != "--fp32"] + (
    "--fp16 --expert-model-parallel-size 2 --no-fold-tensor-into-experts --initial-loss-scale 4096 "
    "--loss-scale-window 2 --hysteresis 1"
).split()
ASYNC = ["--checkpoint-mode", "async"]
ALIKE = ("step", "consumed_samples", "topology", "optimizer", "rng", "data_fingerprint", "extra", "tensors")
"""Parts of a manifest that do not depend on the way it was saved."""

cases = Cases()


def trainer_of(run: str, *flags: str, steps: int = 6) -> Any:
    return make_trainer([*flags, "--train-iters", str(steps)], FOLDER / run)


def in_writer(trainer, function, *args) -> None:
    """Call a function in this rank's writer process."""
    assert trainer.saving._beside is not None
    writer = trainer.saving._beside._writer
    writer.submit(function, *args)
    writer.result()


def ended(trainer) -> tuple[int | None, str]:
    """Exit code of the run, and its error."""
    from megatron_telechat.errors import UserError

    try:
        return trainer.fit(), ""
    except UserError as error:
        return error.exit_code, str(error)
    finally:
        trainer.release()


def destroy() -> None:
    from megatron_telechat import parallel

    parallel.destroy(keep_world=True)


def manifests(run: str) -> dict[str, dict]:
    found = {}
    for path in sorted((FOLDER / run / "checkpoints").glob("iter_*/manifest.json")):
        found[path.parent.name] = json.loads(path.read_text())
    return found


def content(folder: Path) -> dict[str, tuple]:
    """What the files of a checkpoint hold, but for the id of the save."""
    found = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        del header["__metadata__"]["save"]
        found[path.name] = (header, raw[8 + size :])
    return found


def losses(run: str) -> dict[str, list]:
    records = map(json.loads, (FOLDER / run / "metrics.jsonl").read_text().splitlines())
    return {str(one["step"]): [one["loss"], one["grad_norm"]] for one in records if "loss" in one}


def _barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def _both_ways(name: str, flags: list[str]) -> dict:
    """The same run with both modes, every step saved; then a resume of the asynchronous one from its middle."""
    for mode in ("sync", "async"):
        trainer = trainer_of(f"{name}_{mode}", *flags, "--save-interval", "1", "--checkpoint-mode", mode)
        if mode == "async":
            in_writer(trainer, writer_faults.slow_disk, 0.02)
            trainer.saving._beside._backend = SlowCopies(trainer.backend, 0.1)
        code, error = ended(trainer)
        destroy()
        assert code == 0, error
    _barrier()
    sync, beside = manifests(f"{name}_sync"), manifests(f"{name}_async")
    different = [
        f"{folder} {part}" for folder in sync for part in ALIKE if sync[folder][part] != beside[folder].get(part)
    ]
    for folder in sync:
        two = [content(FOLDER / f"{name}_{mode}" / "checkpoints" / folder) for mode in ("sync", "async")]
        different += [f"{folder} {file}" for file in two[0] | two[1] if two[0].get(file) != two[1].get(file)]
        CheckpointReader(FOLDER / f"{name}_async" / "checkpoints" / folder, verify=True)
    middle = str(FOLDER / f"{name}_async" / "checkpoints")
    code, error = ended(trainer_of(f"{name}_on", *flags, *ASYNC, "--load", middle, "--load-step", "3"))
    destroy()
    assert code == 0, error
    _barrier()
    whole, joined = losses(f"{name}_sync"), losses(f"{name}_on")
    parents = [(body["lineage"]["number"], body["lineage"]["parent"]) for body in beside.values()]
    return {
        "steps": [sorted(sync), sorted(beside)],
        "different": different,
        "numbers": [number for number, _ in parents],
        "chained": all(
            parent == {"step": before["step"], "digest": before["digest"]}
            for (_, parent), before in zip(parents[1:], beside.values(), strict=False)
        ),
        "joined": {step: (whole[step], joined[step]) for step in joined if whole[step] != joined[step]},
        "on": sorted(joined),
        "leftovers": [path.name for path in (FOLDER / f"{name}_async" / "checkpoints").glob("*.tmp-*")],
    }


@cases.case
def dense_bf16_distributed_overlap() -> dict:
    return _both_ways("dense", DENSE_BF16)


@cases.case
def moe_fp16_ep2() -> dict:
    return _both_ways("moe", MOE_FP16)


@cases.case
def disk_full_on_one_rank() -> dict:
    """The writer of rank 1 cannot finish its second file: both ranks end at one step, with the first save intact."""
    trainer = trainer_of("full", *DENSE_BF16, *ASYNC, "--save-interval", "20", steps=100)
    if trainer.state.rank == 1:
        in_writer(trainer, writer_faults.full_disk_after, 1, 4096)
    code, error = ended(trainer)
    destroy()
    _barrier()
    there = sorted(path.name for path in (FOLDER / "full" / "checkpoints").iterdir())
    return {"code": code, "error": error, "step": trainer.step, "there": there}


@cases.case
def writer_is_killed() -> dict:
    trainer = trainer_of("killed", *DENSE_BF16, *ASYNC, "--save-interval", "2", steps=100)
    if trainer.state.rank == 1:
        writer = trainer.saving._beside._writer
        writer.submit(writer_faults.end)
        while not writer.is_over():
            time.sleep(0.01)
    code, error = ended(trainer)
    destroy()
    return {"code": code, "error": error, "there": sorted(manifests("killed"))}


@cases.case
def numerics_error_beside_a_save() -> dict:
    """The save under way is of a sound step: it is committed before the run ends with 5."""
    trainer = trainer_of("numerics", *DENSE_BF16, *ASYNC, "--save-interval", "2")
    in_writer(trainer, writer_faults.slow_disk, 1.0, 1)
    forward = trainer.train_step.forward_backward

    def poisoned(iterators):
        sums = forward(iterators)
        if trainer.step == 2:
            sums[0] = float("nan")
        return sums

    trainer.train_step.forward_backward = poisoned
    code, error = ended(trainer)
    destroy()
    _barrier()
    return {"code": code, "error": error, "there": sorted(manifests("numerics"))}


@cases.case
def requests() -> dict:
    """A file save-now at step 1 is one save and stays until the commit; a stop-now beside that save is a second one."""
    trainer = trainer_of("asked", *DENSE_BF16, *ASYNC, steps=100000)
    in_writer(trainer, writer_faults.slow_disk, 0.05)
    run = FOLDER / "asked"
    if trainer.state.rank == 0:
        (run / "save-now").touch()
    seen = []
    take_step = trainer.take_step

    def watched(iterators):
        result = take_step(iterators)
        under_way = trainer.saving._beside.under_way
        seen.append((under_way, (run / "save-now").exists()))
        committed = [number for number, (busy, _) in enumerate(seen) if number and not busy]
        if trainer.state.rank == 0 and len(committed) == 5:
            (run / "stop-now").touch()
        return result

    trainer.take_step = watched
    code, error = ended(trainer)
    destroy()
    _barrier()
    there = sorted(manifests("asked"))
    return {
        "code": code,
        "error": error,
        "there": there,
        "last": trainer.step,
        "files": [path.name for path in run.iterdir() if path.name.endswith("-now")],
        "beside": sum(busy for busy, _ in seen),
        "gone_early": any(busy and not there for busy, there in seen),
    }


@cases.case
def stop_beside_a_save() -> dict:
    """A stop request while files are written: that save is committed, then the step reached, and the code is 75."""
    trainer = trainer_of("stopped", *DENSE_BF16, *ASYNC, "--save-interval", "2", steps=100000)
    in_writer(trainer, writer_faults.slow_disk, 1.0, 1)
    take_step = trainer.take_step

    def watched(iterators):
        result = take_step(iterators)
        if trainer.step == 3 and trainer.state.rank == 0:
            assert trainer.saving._beside.under_way
            (FOLDER / "stopped" / "stop-now").touch()
        return result

    trainer.take_step = watched
    code, error = ended(trainer)
    destroy()
    _barrier()
    return {"code": code, "error": error, "there": sorted(manifests("stopped")), "last": trainer.step}


if __name__ == "__main__":
    cases.main()

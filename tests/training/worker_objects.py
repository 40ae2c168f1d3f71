"""Two ranks that save into an object store: what they write, and where they go on."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.checkpoint import CheckpointReader  # noqa: E402
from megatron_telechat.checkpoint.lineage import saved_in  # noqa: E402
from megatron_telechat.locations import location  # noqa: E402
from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, make_trainer  # noqa: E402

FOLDER = Path(os.environ.get("OBJECTS_DIR", "/nonexistent"))
URL = os.environ.get("OBJECTS_URL", "memory://none")
FLAGS = [flag for flag in DENSE if flag != "--fp32"] + (
    "--bf16 --use-distributed-optimizer --hidden-dropout 0.1 --train-iters 6 --save-interval 2 --keep-last 2".split()
)
ALIKE = ("step", "consumed_samples", "topology", "optimizer", "rng", "data_fingerprint", "extra", "tensors")
"""Parts of a manifest that do not depend on where it lies."""

cases = Cases()


def trainer_of(run: str, *flags: str) -> Any:
    return make_trainer([*FLAGS, *flags], FOLDER / run)


def fit(run: str, *flags: str) -> None:
    from megatron_telechat import parallel

    trainer = trainer_of(run, *flags)
    code = trainer.fit()
    trainer.release()
    parallel.destroy(keep_world=True)
    assert code == 0


def losses(run: str) -> dict[str, list]:
    records = map(json.loads, (FOLDER / run / "metrics.jsonl").read_text().splitlines())
    return {str(one["step"]): [one["loss"], one["grad_norm"]] for one in records if "loss" in one}


def contents(root: str) -> dict[int, Any]:
    """By step: the manifest but for ids and lineage, and all tensors as bytes."""
    import torch

    found = {}
    for saved in saved_in(location(root)):
        reader = CheckpointReader(saved.path, verify=True)
        tensors = {
            key: (reader.dtype(key), reader.read(key).contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for key in reader.entries
        }
        manifest = json.loads(reader_bytes(saved.path))
        found[saved.step] = ({part: manifest[part] for part in ALIKE}, tensors, saved.lineage.number)
    return found


def reader_bytes(folder: Any) -> bytes:
    from megatron_telechat.checkpoint.names import MANIFEST
    from megatron_telechat.checkpoint.stores import store_of

    return store_of(folder).read(folder / MANIFEST)


def barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


@cases.case
def the_same_as_on_a_file_system() -> dict:
    fit("posix", "--checkpoint-mode", "sync")
    for mode in ("sync", "async"):
        fit(mode, "--checkpoint-mode", mode, "--save", f"{URL}/{mode}")
    barrier()
    posix = contents(str(FOLDER / "posix" / "checkpoints"))
    return {
        "steps": list(posix),
        "different": [mode for mode in ("sync", "async") if contents(f"{URL}/{mode}") != posix],
        "losses": [losses(mode) == losses("posix") for mode in ("sync", "async")],
    }


@cases.case
def go_on_from_the_middle() -> dict:
    """Into another prefix, in another layout for the weights that each rank reads, and on a file system."""
    fit("on", "--load", f"{URL}/async", "--load-step", "4", "--save", f"{URL}/on")
    fit("back", "--load", f"{URL}/sync", "--load-step", "4")
    fit("tensor", "--load", f"{URL}/sync", "--load-step", "4", "--tensor-model-parallel-size", "2")
    barrier()
    whole = losses("posix")
    return {
        "bitwise": [losses(run) == {step: whole[step] for step in ("5", "6")} for run in ("on", "back")],
        "tensor": sorted(losses("tensor")),
    }


def main_killed() -> None:
    """One run, of which a rank is killed behind a step: usage: worker_objects.py --killed RUN MODE STEP RANK."""
    run, mode, step, rank = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    trainer = trainer_of(run, "--checkpoint-mode", mode, "--save", f"{URL}/{run}")
    take_step = trainer.take_step

    def step_of_a_victim(iterators):
        result = take_step(iterators)
        if trainer.step == step and trainer.state.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    trainer.take_step = step_of_a_victim
    trainer.fit()
    trainer.release()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--killed"]:
        main_killed()
    else:
        cases.main()

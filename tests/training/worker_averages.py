"""Runs that keep averages of their weights, on 1, 2 and 4 ranks; what they leave is looked at by the test."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, MOE, make_trainer  # noqa: E402
from tests.training.slow_copies import SlowCopies  # noqa: E402

FOLDER = Path(os.environ.get("AVERAGES_DIR", "/nonexistent"))
STEPS = 8
DECAY, WINDOW, START = 0.7, 3, 1
AVERAGES = f"--ema-decay {DECAY} --average-window-steps {WINDOW} --average-start-step {START}".split()
EVALUATION = ["--eval-interval", "2", "--eval-iters", "1"]
BF16 = [flag for flag in DENSE if flag != "--fp32"] + (
    "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --hidden-dropout 0.1"
).split()
EP2 = "--expert-model-parallel-size 2 --no-fold-tensor-into-experts --use-distributed-optimizer".split()
TP2_PP2 = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
).split()
FP16 = [flag for flag in MOE if flag != "--fp32"] + (
    "--fp16 --initial-loss-scale 8192 --loss-scale-window 2 --hysteresis 1 --iterations-to-skip 6"
).split()
"""Some steps overflow, and one is passed over."""

cases = Cases()


def trained(name: str, *flags: str) -> dict[str, Any]:
    """Give a command; its exit code or error, and the message of its resume."""
    from megatron_telechat import parallel
    from megatron_telechat.errors import UserError

    trainer = make_trainer([*flags, "--train-iters", str(STEPS)], FOLDER / name)
    try:
        code = trainer.fit()
        error = ""
    except UserError as failed:
        code, error = failed.exit_code, str(failed)
    finally:
        trainer.release()
        parallel.destroy(keep_world=True)
    return {"code": code, "error": error, "resumed": trainer.resumed.message if trainer.resumed else ""}


def add_runs(name: str, *flags: str) -> None:
    """The run with every step saved; the same stopped within a window and resumed; the same without averages."""

    def runs() -> dict[str, Any]:
        averaged = [*flags, *AVERAGES, *EVALUATION]
        return {
            "whole": trained(f"{name}_whole", *averaged, "--save-interval", "1"),
            "stopped": trained(f"{name}_parts", *averaged, "--exit-interval", "5"),
            "parts": trained(f"{name}_parts", *averaged),
            "plain": trained(f"{name}_plain", *flags),
        }

    cases.add(name, runs)


add_runs("dense", *DENSE)
add_runs("moe_fp16", *FP16)
add_runs("dense_bf16_distributed_overlap", *BF16)
add_runs("moe_ep2_distributed", *MOE, *EP2)
add_runs("dense_tp2_pp2_interleaved", *DENSE, *TP2_PP2)


class LateCopies(SlowCopies):
    """A device whose copies of a save to the host begin when an average is in the place of the weights, or a second
    late."""

    def __init__(self, trainer: Any):
        super().__init__(trainer.backend, 1.0)
        self._in_place, self._enter = threading.Event(), trainer.averages.in_place_of_weights
        trainer.averages.in_place_of_weights = self.in_place_of_weights

    @contextmanager
    def in_place_of_weights(self, *where: Any):
        with self._enter(*where):
            self._in_place.set()
            time.sleep(0.2)
            yield
        self._in_place.clear()

    @contextmanager
    def copies_beside(self):
        self._in_place.wait(self._seconds)
        with self._backend.copies_beside():
            yield


@cases.case
def beside_the_training() -> dict[str, Any]:
    """Step 6 is passed over, so nothing but its evaluation waits for the copies of step 5."""
    from megatron_telechat import parallel

    found = {}
    for mode in ("sync", "async"):
        flags = [*BF16, *AVERAGES, *EVALUATION, "--save-interval", "5", "--iterations-to-skip", "6"]
        flags += ["--checkpoint-mode", mode, "--train-iters", str(STEPS)]
        trainer = make_trainer(flags, FOLDER / mode)
        if mode == "async":
            beside: Any = trainer.saving._beside
            beside._backend = LateCopies(trainer)
        found[mode] = trainer.fit()
        trainer.release()
        parallel.destroy(keep_world=True)
    return found


@cases.case
def switched_on_and_off() -> dict[str, Any]:
    """On at step 4; then with windows of other lengths; then without. Then weights only, in a run of its own."""
    base = [*DENSE, "--save-interval", "2"]
    ema, window = ["--ema-decay", "0.9"], ["--average-window-steps"]
    return {
        "off": trained("switched", *base, "--exit-interval", "4"),
        "on": trained("switched", *base, *ema, *window, "3", "--exit-interval", "5"),
        "other": trained("switched", *base, *ema, *window, "4", "--exit-interval", "6"),
        "off_again": trained("switched", *base),
        "finetune": trained(
            *("tuned", *base, *ema, "--finetune", "--load"),
            *(str(FOLDER / "dense_whole" / "checkpoints"), "--exit-interval", "2"),
        ),
    }


@cases.case
def weights_that_no_master_gives_back() -> dict[str, Any]:
    """A bf16 weight beside its master, as a load can leave it, is what it was after an evaluation."""
    import torch

    from megatron_telechat.training.param_gather import gathered_parameters

    trainer = make_trainer([*BF16, "--ema-decay", "0.5", "--eval-interval", "2"], FOLDER / "odd")
    with gathered_parameters(trainer.virtual_stages), torch.no_grad():
        trainer.take_step(trainer.training_iterators())
        for shard in trainer.shards:
            shard.parameter.view(-1)[0] += 0.5
        before = [shard.parameter.clone() for shard in trainer.shards]
        with trainer.averages.in_place_of_weights("ema", trainer.virtual_stages):
            inside = [shard.parameter.clone() for shard in trainer.shards]
        after = [shard.parameter for shard in trainer.shards]
    same = [one.equal(other) for one, other in zip(before, after, strict=True)]
    moved = [not one.equal(other) for one, other in zip(before, inside, strict=True)]
    trainer.release()
    return {"same": all(same), "moved": all(moved)}


if __name__ == "__main__":
    cases.main()

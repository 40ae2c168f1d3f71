"""How fast a checkpoint of some gigabytes is saved, beside the training too, and read again."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Sequence

from checkpointing.asynchronous import Bench, trainer_of

from accelerator.resume import check_files
from accelerator.section import Options, Results
from accelerator.training import pretrain_all

SHAPE = "--preset telechat2-3b --num-layers 2 --vocab-size 32768 --seq-length 512"
QUICK = "--preset telechat2-tiny --num-layers 2 --seq-length 64"
COMMON = (
    "--mock-data --bf16 --micro-batch-size 1 --global-batch-size 1 --train-iters 2 --lr-warmup-iters 0 --no-progress"
)


def run(options: Options) -> Results:
    """Seconds of a save and the step before it, and of a start that resumes; the files lie in the page cache then."""
    from megatron_telechat import parallel
    from megatron_telechat.config import load_run_config
    from megatron_telechat.training.loop import Trainer

    folder = options.work / "checkpoint"
    line = [*(QUICK if options.quick else SHAPE).split(), *COMMON.split(), "--device", options.device]
    yield from _beside(line, options)
    line += ["--checkpoint-mode", "sync", "--run-dir", str(folder)]
    run_config = load_run_config(line, os.environ).run
    trainer = Trainer(run_config)
    trainer.take_step(trainer.training_iterators())
    trainer.backend.synchronize()
    begin = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    yield "bytes", size
    yield "step and save", {"s": seconds, "GB/s": size / seconds / 1e9}
    trainer.release()
    del trainer
    parallel.destroy(keep_world=True)
    begin = time.perf_counter()
    again = Trainer(run_config)
    again.backend.synchronize()
    seconds = time.perf_counter() - begin
    yield "start with the load", {"s": seconds, "ok": again.step == 2}
    again.release()
    parallel.destroy()
    shutil.rmtree(folder)


def _beside(line: Sequence[str], options: Options) -> Results:
    """The time that training stands still for a save of each mode, the steps beside one, and whether both write the
    same bytes."""
    from megatron_telechat import parallel

    folder = options.work / "checkpoint-beside"
    flags = [*line, "--checkpoint-mode", "async", "--train-iters", "100000", "--run-dir", str(folder)]
    with trainer_of(flags) as trainer:
        bench = Bench(trainer)
        alone = statistics.median(bench.alone(10))
        bench.save_beside()  # the memory of the copies is taken and pinned
        waiting = bench.waiting_save()
        steps, blocked, seconds = bench.save_beside()
        bench.alone(1)
        shares = {"of a waiting save": blocked / waiting, "of a step": blocked / alone}
        yield "waiting save, s", waiting
        yield "save beside the steps, s", {"all": seconds, "training stood still": blocked, **shares}
        yield "steps, s", {"alone": alone, "beside a save": statistics.fmean(steps), "so many": len(steps)}
    parallel.destroy(keep_world=True)
    shutil.rmtree(folder)
    tiny = "--preset telechat2-tiny --mock-data --bf16 --micro-batch-size 1 --global-batch-size 2 --lr-warmup-iters 0"
    runs = {
        f"saves-{mode}": f"{tiny} --train-iters 6 --save-interval 2 --checkpoint-mode {mode}".split()
        for mode in ("sync", "async")
    }
    done = pretrain_all({name: (flags, options.device) for name, flags in runs.items()}, options)
    error = next((one.error for one in done.values() if one.error), None)
    if error:
        yield "the same bytes", {"ok": False, "error": error}
        return
    for step in (2, 4, 6):
        one, other = (done[f"saves-{mode}"].checkpoints / f"iter_{step:07d}" for mode in ("sync", "async"))
        yield f"the same bytes, step {step}", check_files(one, {"differ": other})

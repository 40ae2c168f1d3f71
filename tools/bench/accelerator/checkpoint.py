"""How fast a checkpoint of some gigabytes is saved, and read again."""

from __future__ import annotations

import os
import shutil
import time

from accelerator.section import Options, Results

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
    line = [
        *(QUICK if options.quick else SHAPE).split(),
        *COMMON.split(),
        "--device",
        options.device,
        "--run-dir",
        str(folder),
    ]
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

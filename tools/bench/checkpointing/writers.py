"""Ways to write an asynchronous save: through the page cache or past it, with and without a lower priority. No torch at
the top: the functions are called in the processes that write.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def through_the_page_cache() -> None:
    """As on a network file system."""
    from megatron_telechat.checkpoint.stores import posix

    posix.is_of_one_host = lambda path: False


def lower_priority() -> None:
    """As a run has it."""
    from megatron_telechat.checkpoint.writer_process import give_way

    give_way()


def idle_disk_priority() -> None:
    """Requests to the disk wait for those of others, where the disk's scheduler knows priorities."""
    import psutil

    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


WAYS: Mapping[str, tuple[Callable[[], None], ...]] = {
    "page cache": (through_the_page_cache,),
    "page cache, nice": (through_the_page_cache, lower_priority),
    "past it": (),
    "past it, nice": (lower_priority,),
    "past it, nice, idle disk": (lower_priority, idle_disk_priority),
}


def measure_ways(folder: Path, nbytes: float, repeats: int) -> dict[str, Any]:
    """Each way in turn, ``repeats`` times after a turn to warm up: medians of seconds, and the mean step beside the
    save over the median step alone."""
    import psutil

    from megatron_telechat.checkpoint.writer_process import WriterProcess
    from tools.bench.checkpointing.asynchronous import Bench, training

    alone: list[float] = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with training(folder, nbytes) as trainer:
        bench = Bench(trainer)
        buffer, writers = trainer.saving._beside._buffer, {}
        for name, functions in WAYS.items():
            writers[name] = WriterProcess(buffer.fd, preload=["megatron_telechat.checkpoint.committing"])
            for function in functions:
                writers[name].submit(function)
                writers[name].result()
        for turn in range(repeats + 1):
            steps = bench.alone(6)
            alone += steps if turn else []
            for name, writer in writers.items():
                before, bench._writer = psutil.Process(writer.pid).cpu_times(), writer
                beside, blocked, seconds = bench.save_beside()
                after = psutil.Process(writer.pid).cpu_times()
                cpu = {"user_s": after.user - before.user, "system_s": after.system - before.system}
                values = {"step_s": statistics.fmean(beside), "blocked_s": blocked, "save_s": seconds, **cpu}
                found[name] += [values] if turn else []
        for writer in writers.values():
            writer.close()
    step = statistics.median(alone)
    ways = {
        name: {key: round(statistics.median(one[key] for one in values), 3) for key in values[0]}
        for name, values in found.items()
    }
    for values in ways.values():
        values["slowdown"] = round(values.pop("step_s") / step - 1, 3)
    return {"step_s": round(step, 3), "repeats": repeats, "ways": ways, "load_average": os.getloadavg()[0]}

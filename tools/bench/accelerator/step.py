"""Training steps at the width of a published model, with as many layers as fit: speed, memory, where the time goes."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerator.section import Options, Results

COMMON = (
    "--mock-data --bf16 --micro-batch-size 1 --train-iters 1000 --no-progress "
    "--lr-warmup-iters 0 --lr-decay-style constant"
).split()
SPARE_BYTES = 7 << 30
"""Left to the context, to fragmentation and to what the memory model leaves out."""
WARM_UP, STEPS = 3, 8
CPU_SHAPE = (
    "--hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 4 --kv-channels 16 "
    "--vocab-size 256"
)


def run(options: Options, flags: Sequence[str], length: int = 4096, batch: int = 4) -> Results:
    """Yields the shape, then times, then memory, then what one step consists of.

    Args:
        flags: preset and layout.
        length: of a sample.
        batch: samples of a step.
    """
    from megatron_telechat.config import load_run_config

    line = [*flags, *COMMON, "--device", options.device, "--run-dir", str(options.work / "step")]
    if options.quick:
        line += [*CPU_SHAPE.split(), *(["--moe-ffn-hidden-size", "64"] if "39b" in " ".join(flags) else [])]
        length, batch = 64, 2
    line += ["--seq-length", str(length), "--global-batch-size", str(batch)]

    def load(layers: int) -> Any:
        return load_run_config([*line, "--num-layers", str(layers)], os.environ).run

    from megatron_telechat.backend import get_backend

    backend = get_backend(options.device)
    backend.install()
    most = 2 if options.quick else load_run_config(line, os.environ).run.model.num_layers
    run_config = _largest(load, most, backend.memory().total_bytes - SPARE_BYTES)
    yield from _measure(run_config, options)


def _largest(load: Callable[[int], Any], most: int, budget: float) -> Any:
    """The run with as many layers as the memory model lets in."""
    from megatron_telechat.costs.memory import stage_memory

    for layers in range(most, 0, -1):
        run = load(layers)
        if stage_memory(run)[0].total_bytes <= budget:
            return run
    raise SystemExit(f"one layer does not fit into {budget / 2**30:.1f} GiB")


def _measure(run: Any, options: Options) -> Results:
    from megatron_telechat import parallel
    from megatron_telechat.costs import count_parameters, training_flops_per_token
    from megatron_telechat.training.loop import Trainer
    from megatron_telechat.training.metrics import peak_tflops

    begin = time.perf_counter()
    trainer = Trainer(run)
    backend = trainer.backend
    backend.synchronize()
    tokens = run.training.global_batch_size * run.training.seq_length
    yield (
        "shape",
        {
            "layers": run.model.num_layers,
            "parameters": count_parameters(run.model).total,
            "sequence": run.training.seq_length,
            "samples a step": run.training.global_batch_size,
            "start, s": round(time.perf_counter() - begin, 1),
        },
    )
    iterators = trainer.training_iterators()
    times, losses = [], []
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            backend.reset_peak_memory()
        backend.synchronize()
        begin = time.perf_counter()
        result, _ = trainer.take_step(iterators)
        backend.synchronize()
        times.append(time.perf_counter() - begin)
        losses.append(result.loss)
    seconds = statistics.median(times[WARM_UP:])
    peak = peak_tflops(run, backend)
    rate = tokens / seconds * training_flops_per_token(run.model, run.training.seq_length) / 1e12
    yield (
        "speed",
        {
            "s a step": seconds,
            "predicted s a step": trainer.forecast.iteration_s,
            "all steps, s": times,
            "tokens/s": tokens / seconds,
            "model TFLOP/s": rate,
            "MFU": rate / peak if peak else None,
            "losses": losses,
        },
    )
    yield "memory", _memory(trainer, options)
    if options.device == "cuda":
        yield "host waits of a step", _host_waits(trainer, iterators)
    yield "kernels of a step", _profile(trainer, iterators, options)
    trainer.release()
    parallel.destroy()
    if options.device == "cuda":
        yield "virtual rank of the same run", _virtual(run)


def _memory(trainer: Any, options: Options) -> dict[str, float]:
    """Peak of the last steps, GiB, beside the memory model's."""
    gib = 2**30
    found = {"predicted": trainer.forecast.memory_gib, "peak": trainer.backend.memory().peak_bytes / gib}
    if options.device == "cuda":
        import torch

        found["peak / predicted"] = found["peak"] / found["predicted"]
        found["reserved"] = torch.cuda.max_memory_reserved() / gib
        found["between steps"] = torch.cuda.memory_allocated() / gib
    return found


def _virtual(run: Any) -> dict[str, Any]:
    """Memory and waits of the host as a virtual rank has them, to be held beside what was measured."""
    from megatron_telechat.virtual.launch import executable, execute

    (record,) = execute(executable(run), [0])
    return {
        "peak": record.peak_bytes / 2**30,
        "between steps": record.resident_bytes / 2**30,
        "host waits": {f"{place} {what}": count for what, place, count in record.syncs},
        "launches": sum(work.launches for work in record.work.values()),
    }


def _host_waits(trainer: Any, iterators: Any) -> dict[str, int]:
    """Where a step stops the host for the device, and how often."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.take_step(iterators)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = Counter(f"{_short(one.filename)}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))
    return dict(waits.most_common(30))


def _short(path: str) -> str:
    parts = path.split(os.sep)
    for root in ("megatron_telechat", "megatron", "torch"):
        if root in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    return parts[-1]


def _profile(trainer: Any, iterators: Any, options: Options) -> dict[str, Any]:
    """Kernels of one step by their time on the device, and how many there were."""
    from torch.profiler import ProfilerActivity, profile

    cuda = options.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        trainer.take_step(iterators)
        trainer.backend.synchronize()
    rows = [(event.key, *_cost(event, cuda), event.count) for event in profiler.key_averages()]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    return {
        "all, ms": sum(row[1] for row in rows),
        "launches": sum(row[2] for row in rows),
        "largest": [{"name": name[:150], "ms": ms, "times": count} for name, ms, count in rows[:35]],
    }


def _cost(event: Any, cuda: bool) -> Iterator[float]:
    yield (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3

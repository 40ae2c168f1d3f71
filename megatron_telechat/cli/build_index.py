"""``tools/build_index.py``: make the sample index of a run before it starts, so that no rank waits for it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from megatron_telechat.cli.tool import run_tool
from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.config.length import counts_epochs
from megatron_telechat.errors import EXIT_OK, ConfigError

USAGE = """usage: tools/build_index.py [the flags of the training command]

Encode the dialogs (--sft) and build the sample index and the blend of a run into its cache (--data-cache-path, else
cache/ in the run folder), as rank 0 would at the start. The order depends on the data, --split, --seed and
--seq-length; how much of it is built follows from --train-iters or --train-epochs, --global-batch-size, the evaluation
and the checkpoint the run resumes from.
"""
_SECONDS = 1.0


def described_run(argv: Sequence[str]) -> LoadedConfig:
    """The configuration of a training command, for a tool that starts no training.

    Raises:
        ConfigError: it has problems, or its data is a mock stream.
    """
    loaded = load_run_config([*argv, "--dry-run"], {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"})
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    if loaded.run.data.mock_data:
        raise ConfigError("mock_data has no files", loaded.origins["mock_data"], "name real data with --data-path")
    return loaded


def paced(print_line: Callable[[str], None], seconds: float = _SECONDS) -> Callable[[str], None]:
    """A listener that passes on at most one line in so many seconds."""
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            print_line(text)

    return say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code (0 done or already there, 2 flags, 3 data, 6 the cache cannot be written)."""
    return run_tool(_run, argv)


def _run(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return EXIT_OK
    loaded = described_run(argv)
    run = loaded.run
    if not run.training.train_iters and not counts_epochs(run):
        raise ConfigError(
            "train_iters is 0: the index is made for the samples of a whole run",
            "train_iters",
            "--train-iters N or --train-epochs E, as the training will have it",
        )
    from megatron_telechat.config.run_stages import Position
    from megatron_telechat.data import prepare_index, progress_ahead, read_sources, samples_needed
    from megatron_telechat.training.length import counted_for_tool
    from megatron_telechat.training.progress import saved_progress

    stages = counted_for_tool(loaded.stages, _paced_since(time.monotonic()))
    stage, progress = saved_progress(stages)
    consumed = progress.consumed_samples
    tokens = progress.order.tokens(consumed, stage.run.training.seq_length) if progress.order is not None else 0
    position = Position(progress.steps, consumed, tokens)
    for span, ahead in progress_ahead(stages, position, progress.order):
        run, started = span.stage.run, time.monotonic()
        if stages.several:
            print(span.stage.title)
        said = _paced_since(started)
        index = prepare_index(run, said, ahead)
        _, summary = read_sources(run, index, ahead)
        print("\n".join(summary))
        how = f"built in {time.monotonic() - started:.1f} s" if index.built else "there already"
        before = f", {ahead.consumed_samples:,} of them read by step {ahead.steps:,}" if ahead.steps else ""
        steps = run.training.train_iters if ahead.until is None else ahead.until
        print(f"{index.folder}: {how}, for {steps:,} steps: {samples_needed(run, ahead)[0]:,} samples{before}")
    return EXIT_OK


def _paced_since(started: float) -> Callable[[str], None]:
    return paced(lambda text: print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True))

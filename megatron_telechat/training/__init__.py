"""The training room. ``train(stages)`` is its door; ``training.loop.Trainer`` the run itself, or a stage of it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from megatron_telechat.checkpoint.owner import claim_store
from megatron_telechat.config.run_stages import RunStages
from megatron_telechat.locations import Url
from megatron_telechat.training.lease import held
from megatron_telechat.training.paths import RunPaths
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.watch import Watch


def train(stages: RunStages, steal_lock: bool = False) -> int:
    """Run a training from its start, or its resume, to its end.

    Args:
        steal_lock: take the folders of the run, also from a job that holds them.

    Returns:
        The exit code: 0 done, 75 stopped by a signal with a checkpoint saved.

    Raises:
        UserError: on every rank; see ``errors`` for the exit code of each class.
        StopAtStart: stopped by a signal before the first step.
    """
    run = stages.stages[0].run
    # Before the imports, which take seconds.
    first = os.environ.get("RANK", "0") == "0"
    requests = StopRequests(RunPaths.of(run).run_dir, watch_files=first, speaks=first)
    requests.end_after(run.training.exit_duration_in_mins)
    watch = Watch(run, os.environ)
    with ExitStack() as holding:
        with requests.starting():
            if first:
                # One rank for all, and at once: the launcher ends the others with it.
                requests.leases = holding.enter_context(held(_folders(stages), steal_lock, _say))
                requests.owned = tuple(claim_store(*place, steal_lock, _say) for place in _prefixes(stages))
            from megatron_telechat.backend import get_backend

            backend = get_backend(run.training.device)
            if any(stage.run.exchanges_overlap for stage in stages.stages):
                backend.open_queues()
            # The fixes for megatron.core hook its import: they come before the first module that needs it.
            backend.install()
            from megatron_telechat.parallel.state import destroy
            from megatron_telechat.training.sequence import StageSequence

            with watch.reporting():
                sequence = StageSequence(stages, requests, backend, watch)
        with watch.reporting():
            code = sequence.fit()
            destroy()
            watch.close()
            return code


def _folders(stages: RunStages) -> list[Path]:
    """Where the run writes on file systems."""
    paths = [RunPaths.of(stage.run) for stage in stages.stages]
    return [folder for path in paths for folder in (path.run_dir, path.save_dir) if isinstance(folder, Path)]


def _prefixes(stages: RunStages) -> dict[tuple[Url, Path], None]:
    """Where it writes in object stores, each with its run folder."""
    paths = [RunPaths.of(stage.run) for stage in stages.stages]
    return {(path.save_dir, path.run_dir): None for path in paths if isinstance(path.save_dir, Url)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


__all__ = ["train"]

"""The training room. ``train(run, origins)`` is its door; ``training.loop.Trainer`` the run itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.training.paths import RunPaths
from megatron_telechat.training.signals import StopRequests


def train(run: RunConfig, origins: Mapping[str, str] | None = None) -> int:
    """Run a training from its start, or its resume, to its end.

    Returns:
        The exit code: 0 done, 75 stopped by a signal with a checkpoint saved.

    Raises:
        UserError: on every rank; see ``errors`` for the exit code of each class.
        StopAtStart: stopped by a signal before the first step.
    """
    # Before the imports, which take seconds.
    first = os.environ.get("RANK", "0") == "0"
    requests = StopRequests(RunPaths.of(run).run_dir, watch_files=first, speaks=first)
    with requests.starting():
        from megatron_telechat.backend import get_backend

        backend = get_backend(run.training.device)
        if run.exchanges_overlap:
            backend.open_queues()
        # The fixes for megatron.core hook its import: they come before the first module that needs it.
        backend.install()
        from megatron_telechat.parallel.agreement import lost_ranks_reported
        from megatron_telechat.parallel.state import destroy
        from megatron_telechat.training.loop import Trainer

        with lost_ranks_reported():
            trainer = Trainer(run, origins, requests)
    with lost_ranks_reported():
        try:
            code = trainer.fit()
        except BaseException:
            # The process groups stay as they are: taking them down could wait for a rank that is gone.
            trainer.release()
            raise
        trainer.release()
        destroy()
        return code


__all__ = ["train"]

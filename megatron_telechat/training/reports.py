"""What a training tells, and what goes on telling over the switch of a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_telechat.config.run_stages import RunStage
from megatron_telechat.training.console import Console
from megatron_telechat.training.local_tier import LocalTier
from megatron_telechat.training.signals import StopRequests
from megatron_telechat.training.writers import MetricsWriter


@dataclass(frozen=True)
class Reports:
    """What goes on from one stage of a process to the next.

    Attributes:
        stage: the one that is over.
        warned: whether a person was told that the run saves nothing.
        tier: the local checkpoints of the run; None: it has none.
    """

    stage: RunStage
    console: Console
    writer: MetricsWriter
    requests: StopRequests
    warned: bool
    tier: LocalTier | None = None

    def close(self) -> None:
        """Give files and signal handlers back."""
        self.writer.close()
        if self.tier is not None:
            self.tier.close()
        self.requests.close()

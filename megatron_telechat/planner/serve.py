"""What a worker process runs: `python -m megatron_telechat.planner.serve` answers requests until there are no more."""

from __future__ import annotations

import os
import sys
from typing import IO, Any

from megatron_telechat.planner import tasks, team
from megatron_telechat.planner.messages import decode
from megatron_telechat.planner.worker import Request, received, send

REQUESTS = (tasks.Task, team.Begin, team.Narrow, team.Search)
"""Their modules register them."""


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Until the requests end, or nobody waits for the answers any more."""
    memory: dict[str, Any] = {}
    while (data := received(requests)) is not None:
        request: Request = decode(data)
        assert isinstance(request, REQUESTS)
        try:
            send(answers, request.answer(memory))
        except OSError:
            return


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    serve(sys.stdin.buffer, out)

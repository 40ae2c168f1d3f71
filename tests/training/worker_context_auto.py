"""Two ranks of context parallelism: what is left open of their attention, measured, kept, and taken from before."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402
from tests.training.runs import DENSE, make_trainer  # noqa: E402

BYTES_A_SECOND = 4e6
FLAGS = "--seq-length 512 --micro-batch-size 1 --context-parallel-size 2 --cp-comm-type p2p --train-iters 2".split()
cases = Cases()


class SlowRing:
    """A link on which every byte takes its time, whatever else the machine does."""

    def __init__(self, ring):
        self.ring = ring

    def start(self, rows, step, shape):
        time.sleep(rows.nbytes / BYTES_A_SECOND)
        return self.ring.start(rows, step, shape)

    def finish(self, most=0):
        self.ring.finish(most)


@cases.case
def what_arrives_is_kept_where_that_is_faster_and_fits():
    from megatron_telechat import parallel
    from megatron_telechat.model.context_attention import context_attentions
    from megatron_telechat.training.context import set_context

    trainer = make_trainer([*DENSE, *FLAGS, "--cp-pieces", "1"], Path(os.environ["AUTO_DIR"]) / "run")
    attentions = context_attentions(trainer.virtual_stages)
    for each in attentions:
        each.link = SlowRing(each.link)

    def setting(before=(), **changes):
        run = replace(trainer.run, parallel=replace(trainer.run.parallel, **changes))
        found = set_context(trainer.virtual_stages, run, trainer.state, trainer.backend, before)
        measured = sorted(found.event(0)["measured_ms"]) if found.event(0) else None
        used = sorted({(each.pieces, each.keep) for each in attentions})
        return {"keep": found.keep, "used": used, "measured": measured, "about": found.message}, found.extra

    try:
        first, extra = setting()
        held = {**extra["context"], "conditions": extra["context"]["conditions"]}
        old = {"context": {name: value for name, value in held.items() if name != "keep"}}
        return {
            "measured": first,
            "again": setting([extra])[0],
            "refused": setting([extra], cp_keep_received=False)[0],
            "old": setting([old])[0],
            "bad": setting([{"context": {**held, "keep": 3}}])[0],
            "no room": setting(ranks_per_node=10**9)[0],
        }
    finally:
        trainer.release()
        parallel.destroy(keep_world=True)


if __name__ == "__main__":
    cases.main()

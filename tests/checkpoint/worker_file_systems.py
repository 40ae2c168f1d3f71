"""A checkpoint that one host has written and another does not see yet, on two ranks over `faulty_files.c`."""

from __future__ import annotations

import os
from functools import cache

from tests.checkpoint.worker_damage import Saved
from tests.harness import Cases

cases = Cases()


@cache
def run() -> Saved:
    return Saved("run", seed=1)


def load(patience: str) -> tuple[int, str]:
    from megatron_telechat.checkpoint import verify
    from megatron_telechat.checkpoint.disk import STALE_SECONDS

    os.environ[STALE_SECONDS] = patience
    verify.forget()
    return run().load()


@cases.case
def not_looked_for() -> tuple[int, str]:
    return load("0")


@cases.case
def looked_for() -> tuple[int, str]:
    return load("60")


if __name__ == "__main__":
    cases.main()

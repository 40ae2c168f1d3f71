"""Fixtures of the commands' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_process(request, monkeypatch):
    """A light test starts no process: on a slow machine a plan takes longer than the second after which others join."""
    if request.node.get_closest_marker("heavy") is None:
        monkeypatch.setattr("megatron_telechat.planner.worker.processors", lambda: 1)

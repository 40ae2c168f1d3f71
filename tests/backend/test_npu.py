"""What the Ascend backend tells HCCL before ranks are joined."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch

from megatron_telechat.backend.cpu import CpuBackend
from megatron_telechat.backend.npu import NpuBackend


@pytest.fixture
def environment(monkeypatch):
    """An environment of its own."""
    monkeypatch.setattr("os.environ", {})
    return os.environ


def said(environment) -> dict[str, str]:
    """What is said of HCCL."""
    return {name: value for name, value in environment.items() if name.startswith("HCCL")}


@pytest.mark.parametrize(
    "minutes, connect, executing", [(10, "600", "600"), (0.5, "120", "30"), (600, "7200", "36000"), (1e-9, "120", "1")]
)
def test_hccl_waits_as_long_as_the_run_says(environment, minutes, connect, executing):
    NpuBackend(0).limit_waits(timedelta(minutes=minutes))
    assert said(environment) == {"HCCL_CONNECT_TIMEOUT": connect, "HCCL_EXEC_TIMEOUT": executing}


def test_what_the_environment_says_stays(environment):
    before = {"HCCL_CONNECT_TIMEOUT": "300", "HCCL_EXEC_TIMEOUT": "0"}
    environment.update(before)
    NpuBackend(0).limit_waits(timedelta(minutes=10))
    assert said(environment) == before


def test_gloo_takes_the_limit_of_the_process_group(environment):
    CpuBackend(0).limit_waits(timedelta(minutes=10))
    assert said(environment) == {}


def test_deterministic_reductions(environment, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        NpuBackend(0).use_deterministic_algorithms()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert said(environment) == {"HCCL_DETERMINISTIC": "true"}
    finally:
        torch.use_deterministic_algorithms(False)

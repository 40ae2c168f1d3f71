"""The devices: which is chosen, what they report, what is refused."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.backend.core_patch import CorePatch
from megatron_telechat.backend.cuda import CudaBackend
from megatron_telechat.errors import ConfigError, ResourceError


def test_auto_takes_the_first_that_is_present(monkeypatch):
    monkeypatch.setattr(CorePatch, "installed", staticmethod(lambda: None))  # tests before this one install backends
    assert get_backend("auto").name == ("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_is_what_the_process_runs_on(monkeypatch):
    monkeypatch.setattr(CudaBackend, "present", staticmethod(lambda: True))
    get_backend("cpu").install()
    assert get_backend("auto").name == "cpu"


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        get_backend("tpu")


def test_local_rank_must_be_a_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'first'"):
        get_backend("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ResourceError, match="no CUDA device"):
        get_backend("cuda").install()


@pytest.mark.gpu
def test_more_local_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ResourceError, match="has no device"):
        get_backend("cuda").install()


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_npu_without_torch_npu_names_the_install_line():
    with pytest.raises(ResourceError, match="pip install torch-npu"):
        get_backend("npu").install()


def test_cpu_reports_itself():
    backend = get_backend("cpu")
    backend.install()
    memory = backend.memory()
    assert backend.device == torch.device("cpu") and backend.distributed_backend == "gloo"
    assert 0 < memory.allocated_bytes <= memory.peak_bytes < memory.total_bytes
    assert backend.device_name()
    backend.synchronize(), backend.empty_cache(), backend.reset_peak_memory()


def test_deterministic_kernels_on_cuda_are_asked_for_in_full(monkeypatch):
    """As a warning only, or without a work space of a fixed size, torch's attention or its products would stay as
    they are."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        CudaBackend(0).use_deterministic_algorithms()
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_state_of_another_kind_of_device_is_told():
    backend = get_backend("cpu")
    backend.install()
    state = backend.rng_state()
    assert backend.can_restore(state)
    assert not backend.can_restore({**state, "device": torch.zeros(16, dtype=torch.uint8)})


def test_rng_state_restores_every_generator():
    import random

    import numpy

    backend = get_backend("cpu")
    backend.install()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draw():
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(2).tolist()
        return random.random(), numpy.random.rand(), torch.rand(2).tolist(), tracked

    backend.seed(7)
    model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0)
    state = backend.rng_state()
    first = draw()
    assert draw() != first
    backend.set_rng_state(state)
    assert draw() == first
    backend.seed(7)
    assert random.random() == first[0]


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        get_backend("cpu").install()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        get_backend("cpu").install()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

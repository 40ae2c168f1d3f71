"""What the CUDA backend settles before the first call of CUDA, and which device ``auto`` takes; no device is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_telechat.backend import get_backend
from megatron_telechat.backend.cuda import CudaBackend
from megatron_telechat.backend.mcore_fixes import QUIET
from megatron_telechat.device_kinds import DEVICE_KINDS

SETTINGS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
    "TORCH_FR_BUFFER_SIZE": "2000",
}
OLDER = ("PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_TRACE_BUFFER_SIZE")


@pytest.fixture
def select(monkeypatch):
    """Selects device 0 of a machine with two, whose CUDA is not there; gives what each question to it found in the
    environment."""
    for name in (*SETTINGS, *OLDER):
        monkeypatch.setenv(name, "")  # so that the value of before comes back in the end
        monkeypatch.delenv(name)
    calls: list[tuple[str, dict[str, str]]] = []

    def asked(name, answer):
        def ask(*_):
            calls.append((name, {key: os.environ[key] for key in (*SETTINGS, *OLDER) if key in os.environ}))
            return answer

        return ask

    for name, answer in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, asked(name, answer))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked("allocator", None), raising=False)

    def run(open_queues: bool = False):
        calls.clear()
        backend = CudaBackend(0)
        if open_queues:
            backend.open_queues()
        backend._select_device()
        return calls

    return run


def test_all_is_settled_before_the_context_is_made(select):
    calls = select()
    names = [name for name, _ in calls]
    assert names[0] == "is_available" and names[-1] == "set_device" and names.count("allocator") == 1
    _, first = calls[0]
    assert first["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and first["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert calls[-1][1] == SETTINGS


def test_queues_that_were_opened_before_stay_open(select):
    assert select(open_queues=True)[0][1]["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.parametrize("name", [*SETTINGS, *OLDER])
def test_what_the_environment_says_is_left_as_it_is(select, monkeypatch, name):
    monkeypatch.setenv(name, "mine")
    calls = select()
    found = calls[-1][1]
    assert found[name] == "mine"
    if "ALLOC" in name:
        assert "allocator" not in [call for call, _ in calls]
        assert sum("ALLOC" in key for key in found) == 1
    if name == "TORCH_NCCL_TRACE_BUFFER_SIZE":
        assert "TORCH_FR_BUFFER_SIZE" not in found


def test_looking_for_cuda_asks_nvml(select, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") == "1")
    assert CudaBackend.present()


def test_groups_are_not_split_off_that_of_all_ranks():
    assert CudaBackend(1).process_group_options() == {}
    assert get_backend("cpu").process_group_options() == {}
    assert any("barrier" in message for message in QUIET), "torch warns of every barrier then"


def test_pinned_is_the_tensor_itself_where_there_is_no_such_memory():
    tensor = torch.ones(2)
    assert get_backend("cpu").pinned(tensor) is tensor
    assert DEVICE_KINDS["cuda"].pins_uploads


TORCH_NPU = {
    "torch_npu/__init__.py": """
import sys, types
import torch
torch.utils.rename_privateuse1_backend("npu")
npu = types.ModuleType("torch_npu.npu")
npu.is_available, npu.device_count, npu.set_device = (lambda: True), (lambda: 2), (lambda device: None)
sys.modules["torch_npu.npu"] = npu
""",
    "torch_npu/contrib/__init__.py": "",
    "torch_npu/contrib/transfer_to_npu.py": """
import sys
import torch, torch_npu
torch.cuda = sys.modules["torch.cuda"] = torch_npu.npu
""",
}
"""A package with what the backend asks of torch_npu, and with its redirection of torch.cuda."""

LOOKS = {
    "twice": "first = get_backend('auto'); first.install(); print(first.name, get_backend('auto').name)",
    "redirected before": "import torch_npu.contrib.transfer_to_npu; print(get_backend('auto').name)",
}


@pytest.mark.heavy
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which auto takes")
@pytest.mark.parametrize("look, found", [("twice", "npu npu"), ("redirected before", "npu")])
def test_auto_is_the_npu_however_often_it_is_asked(tmp_path: Path, look: str, found: str):
    for name, text in TORCH_NPU.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "LOCAL_RANK": "0"}
    program = f"from megatron_telechat.backend import get_backend\n{LOOKS[look]}"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == found.split()

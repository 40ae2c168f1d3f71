"""The Triton kernels: left out where they cannot be used, and right where there is a CUDA device."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from megatron_telechat.backend import kernels as package

_, NAMES = package.FAMILIES["triton"]
CARD = torch.device("cuda", 3)


@pytest.fixture
def asked_anew():
    package.usable.cache_clear()
    yield
    package.usable.cache_clear()


def put_in_place(monkeypatch, check) -> None:
    module = types.ModuleType(f"{package.__name__}.sums")
    module.check = check
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: object())


def test_the_cpu_has_none():
    assert all(package.kernels(name, torch.zeros(1)) is None for name in NAMES)


def test_a_kernel_that_passes_its_check_is_used(monkeypatch, asked_anew):
    asked = []
    put_in_place(monkeypatch, asked.append)
    assert package.usable("sums", CARD) and package.usable("sums", CARD)
    assert asked == [CARD], "once a process"


def test_without_triton_there_is_none(monkeypatch, asked_anew):
    put_in_place(monkeypatch, lambda device: None)
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    assert not package.usable("sums", CARD)


def test_they_can_be_switched_off(monkeypatch, asked_anew):
    put_in_place(monkeypatch, lambda device: None)
    monkeypatch.setenv(package.SWITCH, "0")
    assert not package.usable("sums", CARD)


def test_a_kernel_that_is_wrong_is_left_out_with_a_warning(monkeypatch, asked_anew):
    def wrong(device) -> None:
        package.require_close(torch.ones(2), torch.tensor([1.0, 1.1]), "SwiGLU")

    put_in_place(monkeypatch, wrong)
    with pytest.warns(
        UserWarning, match="'sums' is not used .ArithmeticError: SwiGLU in torch.float32 is off by 9.1e-02"
    ):
        assert not package.usable("sums", CARD)


def test_a_number_that_is_none_is_wrong():
    with pytest.raises(ArithmeticError):
        package.require_close(torch.tensor([float("nan"), 1.0]), torch.ones(2), "anything")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_kernels_on_a_gpu(name):
    pytest.importorskip("triton")
    importlib.import_module(f"{package.__name__}.{name}").check(torch.device("cuda", 0))

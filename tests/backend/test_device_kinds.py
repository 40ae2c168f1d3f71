"""The table of device kinds: each row has its class, its device files, and everything that asks it."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch

from megatron_telechat import device_kinds
from megatron_telechat.backend import Backend, get_backend, traits_of
from megatron_telechat.backend.cpu import CpuBackend
from megatron_telechat.backend.cuda import CudaBackend
from megatron_telechat.backend.npu import NpuBackend
from megatron_telechat.cli.plan_request import on_device
from megatron_telechat.config import load_run_config
from megatron_telechat.config.fields import fields_by_name
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.devices import DeviceSpec, device_spec, device_spec_names, read_device_file
from megatron_telechat.device_kinds import DEVICE_CHOICES, DEVICE_KINDS, HOST, planned_device
from megatron_telechat.errors import ConfigError
from megatron_telechat.training.forecast import Forecast


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_each_kind_has_a_backend_that_answers_with_its_row(kind):
    cls = resolve_name(DEVICE_KINDS[kind].backend)
    assert issubclass(cls, Backend) and not cls.__abstractmethods__
    assert cls(0).name == kind and cls(0).traits is DEVICE_KINDS[kind]


def test_what_a_person_may_ask_for_is_the_table():
    assert DEVICE_CHOICES == ("auto", *DEVICE_KINDS) == fields_by_name()["device"].choices


def test_answers_of_the_live_devices():
    assert CudaBackend(0).widest_float == CpuBackend(0).widest_float == torch.float64
    assert NpuBackend(0).widest_float == torch.float32
    assert CpuBackend(0).known_as == HOST and CpuBackend.present()
    assert traits_of(torch.device("cuda", 1)) is DEVICE_KINDS["cuda"]


def test_an_open_choice_is_planned_as_an_accelerator():
    assert planned_device("auto").expert_engine == "grouped"
    assert planned_device(HOST).expert_engine == "loop"


def test_a_new_kind_is_a_row_and_a_class(monkeypatch):
    """Everything that was read from the table when it was imported stays; what is asked at run time finds the row."""
    row = replace(DEVICE_KINDS["npu"], name="xpu", backend=f"{__name__}:XpuBackend", grouped_alignment_bytes=64)
    monkeypatch.setitem(device_kinds.DEVICE_KINDS, "xpu", row)  # type: ignore[arg-type]
    monkeypatch.setattr("megatron_telechat.backend.DEVICE_CHOICES", (*DEVICE_CHOICES, "xpu"))
    backend = get_backend("xpu")
    assert isinstance(backend, XpuBackend) and backend.widest_float == torch.float32
    assert not backend.overlap_warning()


class XpuBackend(CpuBackend):
    name = "xpu"


@pytest.mark.parametrize("device, told", [("cuda", True), ("npu", True), ("auto", False), ("cpu", False)])
def test_narrow_experts_are_refused_where_the_products_need_wide_ones(device, told):
    flags = ["--preset", "telechat2-tiny-moe", "--mock-data", "--dry-run", "--moe-ffn-hidden-size", "34"]
    try:
        load_run_config([*flags, "--device", device], {})
        found = ""
    except ConfigError as error:
        found = str(error)
    assert ("is not a multiple of 4, which the grouped products" in found) == told


def test_device_files_say_their_kind():
    kinds = {name: device_spec(name).kind for name in device_spec_names()}
    assert set(kinds.values()) <= set(DEVICE_KINDS) and kinds["cpu"] == "cpu" and kinds["ascend-910b-64g"] == "npu"


@pytest.mark.parametrize(
    "text, kind",
    [("name: cpu", "cpu"), ("name: cpu-8-cores", "cpu"), ("name: mine", ""), ("name: mine\nkind: npu", "npu")],
)
def test_device_files_without_a_kind_are_read_by_their_name(tmp_path, text, kind):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert read_device_file(path).kind == kind


def test_an_unknown_kind_of_a_device_file_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nkind: gpu")
    with pytest.raises(ConfigError, match="kind: 'gpu' is no kind of device"):
        read_device_file(path)


def test_a_run_is_planned_on_the_kind_of_the_device_file():
    run = RunConfig()
    assert on_device(run, DeviceSpec("mine")).training.device == "auto"
    assert on_device(run, DeviceSpec("mine", kind="npu")).training.device == "npu"


def test_memory_of_a_process_is_called_so(monkeypatch):
    assert "peak of the whole process" in Forecast(1.0, 1.0, "", True, [1.0]).line()
    assert "measured peak" in Forecast(1.0, 1.0, "", False, [1.0]).line()

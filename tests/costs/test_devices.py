"""Device figures are found by file name and by the name that torch reports."""

from __future__ import annotations

import pytest

from megatron_telechat.costs import device_spec, device_spec_names


@pytest.mark.parametrize(
    "reported, name, bf16",
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g", 989.4),
        ("NVIDIA H200", "h200-141g", 989.4),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", 312.0),
        ("Ascend910B3", "ascend-910b-64g", 294.9),
        ("Ascend910B2", "ascend-910b2", 353.9),
        ("Ascend910B", "ascend-910b-64g", 294.9),
        ("nvidia h200", "h200-141g", 989.4),
    ],
)
def test_torch_names(reported, name, bf16):
    spec = device_spec(reported)
    assert (spec.name, spec.peak("bf16")) == (name, bf16)


def test_every_file_is_found_by_its_own_name_and_is_plausible():
    names = "a100-40g a100-80g ascend-910b-64g ascend-910b2 ascend-910c b200 cpu gb200 h100-80g h200-141g mi300x"
    assert device_spec_names() == names.split()
    for name in device_spec_names():
        spec = device_spec(name)
        assert spec.name == name
        if name != "cpu":
            assert 39 < spec.memory_gib < 192 and 0.1 <= spec.error <= 0.3
            assert spec.peak("bf16") > spec.peak("fp32") > 0
            assert spec.hbm_bandwidth_gb_s > spec.intra_node_bandwidth_gb_s > spec.inter_node_bandwidth_gb_s


def test_a_cpu_has_no_peak_of_its_own():
    assert device_spec("cpu").peak("bf16") is None
    assert device_spec("cpu").memory_gib is None


@pytest.mark.parametrize("reported", ["NVIDIA H100 PCIe", "NVIDIA H20", "Ascend910B4"])
def test_a_slower_or_smaller_relative_does_not_match(reported):
    assert device_spec(reported) is None

"""Bytes and seconds of optimizer state on the host and in 16 bits, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs import device_spec
from megatron_telechat.costs.memory import host_bytes_of_node, host_memory_problem, stage_memory
from megatron_telechat.costs.optimizer_state import BUCKET_ELEMENTS, host_bytes, passage_bytes, travel_seconds


def run_of(flags: str = "", precision: str = "--bf16") -> RunConfig:
    argv = (
        f"--preset telechat2-7b {precision} --world-size 16 --use-distributed-optimizer --mock-data --dry-run {flags}"
    )
    return load_run_config(argv.split(), {}).run


def of_stage(flags: str = "", precision: str = "--bf16"):
    return stage_memory(run_of(flags, precision))[0]


def test_bytes_go_from_the_device_to_the_host():
    kept, away = of_stage(), of_stage("--optimizer-cpu-offload")
    share = kept.parameters.total / 16
    assert (kept.optimizer_bytes, kept.host_bytes) == (12 * share, 0)
    assert (away.optimizer_bytes, away.host_bytes) == (12 * BUCKET_ELEMENTS, 12 * share)
    assert kept.total_bytes - away.total_bytes == 12 * (share - BUCKET_ELEMENTS)


def test_a_fraction_and_overlap():
    found = of_stage("--optimizer-cpu-offload --optimizer-offload-fraction 0.25 --overlap-cpu-optimizer-d2h-h2d")
    share = found.parameters.total / 16
    assert found.host_bytes == 3 * share
    assert found.optimizer_bytes == 9 * share + 3 * 12 * BUCKET_ELEMENTS


@pytest.mark.parametrize(
    "flags,precision,at_rest,widened",
    [
        ("", "--fp32", 8, 0),
        ("--exp-avg-dtype bf16", "--bf16", 10, 4),
        ("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", "--bf16", 8, 8),
        ("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16", "--fp32", 4, 8),
    ],
)
def test_types(flags, precision, at_rest, widened):
    found = of_stage(flags, precision)
    assert found.optimizer_bytes == at_rest * found.parameters.total / 16 + widened * BUCKET_ELEMENTS


def test_few_parameters_take_no_more_than_they_have():
    run = run_of("--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d")
    assert passage_bytes(run, 1000.0, 0.0) == 3 * 12 * 1000


def test_seconds_over_the_link():
    device = replace(device_spec("h100-80g") or pytest.fail(), host_bandwidth_gb_s=50.0)
    in_turn, beside = (
        run_of("--optimizer-cpu-offload"),
        run_of("--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d"),
    )
    one_way = host_bytes(beside, 1e9) / 50e9
    assert one_way == pytest.approx(0.24)
    assert travel_seconds(in_turn, 1e9, device, 0.01) == pytest.approx(2 * one_way + 0.01)
    assert travel_seconds(beside, 1e9, device, 0.01) == one_way
    assert travel_seconds(run_of(), 1e9, device, 0.01) == 0.01


def test_a_host_that_is_too_small():
    run = run_of("--optimizer-cpu-offload --host-memory-gib 20")
    assert host_bytes_of_node(run) == 8 * 12 * of_stage().parameters.total / 16
    problem = host_memory_problem(run)
    assert problem is not None and "8 ranks" in problem.what and "host_memory_gib=20" in problem.what
    fraction = float(problem.fix.split()[1].rstrip(","))
    fits = replace(run, parallel=replace(run.parallel, optimizer_offload_fraction=fraction))
    assert host_memory_problem(fits) is None
    assert host_memory_problem(run_of("--optimizer-cpu-offload")) is None

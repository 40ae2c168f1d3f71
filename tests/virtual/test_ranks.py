"""The CUDA path on virtual ranks: whole worlds of eight, held to each other and to the models of costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.communicators import communicators
from megatron_telechat.costs.flops import layer_forward_flops
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.virtual.compare import exchanged, group_of
from megatron_telechat.virtual.launch import VirtualRankError, executable, execute_several
from megatron_telechat.virtual.match import MESSAGES, match
from megatron_telechat.virtual.records import RankRecord

pytestmark = pytest.mark.heavy

DENSE, MOE = "telechat2-tiny", "telechat2-tiny-moe"
SHARDED = "--use-distributed-optimizer"
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
LAYOUTS: dict[str, tuple[str, str] | tuple[str, str, int]] = {
    "dense_uneven": (
        DENSE,
        "--num-layers 3 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t*2L "
        f"--tensor-model-parallel-size 2 {OVERLAPPED} --loss-chunk-rows 100",
    ),
    "dense_interleaved": (
        DENSE,
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --overlap-grad-reduce",
    ),
    "moe_folded_pp2": (
        MOE,
        "--num-layers 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 4 "
        f"--moe-input-chunks 2 {OVERLAPPED}",
    ),
    "moe_etp2_recompute": (
        MOE,
        "--num-layers 2 --tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 2 "
        "--no-fold-tensor-into-experts "
        f"--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 {SHARDED}",
    ),
    "dense_cp4_2d": (
        DENSE,
        "--num-layers 2 --context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2 --cp-keep-received "
        "--micro-batch-size 2 --recompute-layout core_attn,none",
        4,
    ),
    "moe_cp2_pp2": (
        MOE,
        "--num-layers 2 --pipeline-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type p2p --cp-pieces 2 "
        f"--seq-length 1024 --expert-model-parallel-size 2 --recompute-layout full|none {OVERLAPPED}",
        4,
    ),
}
WORLD = 8
"""Ranks where a layout does not say."""


def run_of(preset: str, flags: str, world: int = WORLD) -> RunConfig:
    argv = ["--preset", preset, "--bf16", "--world-size", str(world), "--device", "cuda", "--dry-run", "--mock-data"]
    return load_run_config([*argv, "--train-iters", "100", *flags.split()], {}).run


OPTIMIZERS = {
    "plain": "",
    "sharded": SHARDED,
    "reduce overlapped": f"{SHARDED} --overlap-grad-reduce",
    "both overlapped": OVERLAPPED,
}


LONG_ROWS = {
    "tensor ranks": "--tensor-model-parallel-size 2",
    "tensor ranks without sequence parallelism": "--tensor-model-parallel-size 2 --no-sequence-parallel",
    "one rank": f"{SHARDED}",
}
"""Ranks whose loss is computed in chunks, since their rows are long."""


OFFLOADED = {
    "all on the host": "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d",
    "half, moments in bf16": "--optimizer-cpu-offload --optimizer-offload-fraction 0.5 --exp-avg-dtype bf16 "
    "--exp-avg-sq-dtype bf16",
}
"""Ranks whose optimizer state is on the host."""


@pytest.fixture(scope="module")
def played() -> dict[str, tuple[RunConfig, list[RankRecord]]]:
    """All ranks of every layout, and one rank of every setting of the optimizer."""
    whole = {name: executable(run_of(*layout)) for name, layout in LAYOUTS.items()}
    runs = {name: (run, range(run.parallel.world_size)) for name, run in whole.items()}
    for name, flags in OPTIMIZERS.items():
        runs[name] = (
            executable(run_of(MOE, f"--num-layers 2 --expert-model-parallel-size 2 {flags}", world=4)),
            range(1, 2),
        )
    for name, flags in LONG_ROWS.items():
        run = run_of("telechat2-3b", f"--num-layers 2 --seq-length 32768 --global-batch-size 2 {flags}", world=2)
        runs[name] = (executable(run), range(1))
    for name, flags in OFFLOADED.items():
        run = run_of("telechat2-3b", f"--num-layers 4 --global-batch-size 2 {SHARDED} {flags}", world=2)
        runs[name] = (executable(run), range(1))
    records = execute_several(list(runs.values()))
    return {name: (run, found) for (name, (run, _)), found in zip(runs.items(), records, strict=True)}


@pytest.fixture(params=LAYOUTS)
def world(request, played) -> tuple[RunConfig, list[RankRecord]]:
    """A layout, and all of its ranks."""
    return played[request.param]


def test_all_ranks_meet(world):
    _, records = world
    met = match(records)
    assert met.problems == ()
    assert met.groups >= 3 and met.compared > 50


def test_a_call_that_one_rank_leaves_out_is_found(world):
    _, records = world
    number = next(place for place, call in enumerate(records[1].calls) if call.kind not in MESSAGES)
    calls = [call for place, call in enumerate(records[1].calls) if place != number]
    assert match([records[0], replace(records[1], calls=tuple(calls)), *records[2:]]).problems


def test_exchanges_are_those_of_the_cost_model(world):
    run, records = world
    per_stage: dict[tuple[int, str, str], list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for entry in exchanged(run, record):
            if entry.modelled is not None:
                per_stage[record.stage, entry.group, entry.kind].append((entry.bytes, entry.modelled))
    assert per_stage
    for (_, group, kind), found in per_stage.items():
        executed, modelled = (sum(column) / len(found) for column in zip(*found, strict=True))
        # Which of a few hundred tokens meet on one rank is drawn; buffers are padded to whole shares.
        tolerance = 0.03 if group == "ep" else 0.01
        assert executed == pytest.approx(modelled, rel=tolerance), (group, kind)


def test_context_parallel_exchanges_are_modelled_to_the_byte(world):
    run, records = world
    for record in records:
        found = {entry.kind: entry for entry in exchanged(run, record) if entry.group == "cp"}
        heads, ring = run.parallel.context_sizes
        assert found.keys() == {*["all-to-all"] * (heads > 1), *["send", "receive"] * (ring > 1)}
        assert all(entry.bytes == entry.modelled for entry in found.values())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "cp" in name])
def test_products_of_attention_over_ranks_are_those_of_the_cost_model(played, name):
    """Of a rank in the forward of a layer that repeats nothing: its part of a row, the work shared evenly."""
    run, records = played[name]
    training, layer = run.training, run.model.num_layers - 1
    tokens = training.seq_length * training.micro_batch_size / run.parallel.context_parallel_size
    flops = layer_forward_flops(run.model, layer, training.seq_length)
    for record in records:
        work = record.work.get(f"layer {layer} forward")
        if work is not None:
            assert work.flops / record.microbatches == pytest.approx(flops.total * tokens, rel=0.02)


def test_resident_memory_is_that_of_the_cost_model(world):
    run, records = world
    stages = stage_memory(run)
    for record in records:
        stage = stages[record.stage]
        modelled = stage.parameters_bytes + stage.gradients_bytes + stage.optimizer_bytes
        assert record.resident_bytes == pytest.approx(modelled, rel=0.06)


@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_rows_take_what_the_memory_model_says(played, name):
    run, (record,) = played[name]
    (stage,) = stage_memory(run)
    assert record.peak_bytes == pytest.approx(stage.total_bytes, rel=0.03)
    (whole,) = stage_memory(replace(run, training=replace(run.training, loss_chunk_rows=0)))
    assert whole.total_bytes - stage.total_bytes > 8 * 2**30
    for entry in exchanged(run, record):
        if entry.modelled is not None and entry.group == "tp":
            assert entry.bytes == pytest.approx(entry.modelled, rel=0.01), entry.kind


@pytest.mark.parametrize("name", OFFLOADED)
def test_state_on_the_host_is_not_on_the_device(played, name):
    run, (record,) = played[name]
    (stage,) = stage_memory(run)
    resident = stage.parameters_bytes + stage.gradients_bytes + stage.optimizer_bytes
    assert record.resident_bytes == pytest.approx(resident, rel=0.02)
    assert record.peak_bytes == pytest.approx(stage.total_bytes, rel=0.03)
    (kept,) = stage_memory(replace(run, parallel=replace(run.parallel, optimizer_cpu_offload=False)))
    assert kept.optimizer_bytes - stage.optimizer_bytes > 0.3 * kept.optimizer_bytes
    waits = {place for what, place, _ in record.syncs if "resting" in place or "shelves" in place}
    assert not waits, "copies are queued, the host goes on"


def test_communicators_are_those_that_the_memory_model_counts(world):
    run, records = world
    for record in records:
        used = {call.group for call in record.calls if call.kind not in MESSAGES}
        assert len(used) == len(communicators(run)), sorted({call.description for call in record.calls})


HOST_WAITS = {
    # The sizes of the experts' messages and products, once for each layer, micro-batch and recomputation.
    "megatron_telechat/moe/dispatch.py tolist": "layers",
    # Loss, tokens and requests of the step; the norm of the gradients, twice with experts; whether it is finite.
    "megatron_telechat/training/step.py tolist": 1,
    "megatron/core/optimizer/clip_grads.py item": 2,
    "megatron_telechat/training/numerics.py item": 1,
    # Uploads of a few numbers from pageable memory.
    "megatron_telechat/training/step.py copy to it": 2,
    "megatron_telechat/training/numerics.py copy to it": 1,
    # megatron-core: the tokens of the step, for the division of the gradients of each virtual stage.
    "megatron/core/distributed/finalize_model_grads.py item": 2,
}
"""Where the host waits for the device in a step, and at most how often. A new place in the hot path belongs here only
with a reason."""


def test_the_host_waits_where_it_is_known_to(world):
    run, records = world
    for record in records:
        waits: Counter[str] = Counter()
        places: dict[str, str] = {}
        for what, place, count in record.syncs:
            name = f"{place.rpartition(':')[0]} {what}"
            waits[name] += count
            places[name] = place
        unknown = [places[name] for name in waits if name not in HOST_WAITS]
        assert not unknown, f"the host waits for the device at {', '.join(unknown)}"
        for name, most in HOST_WAITS.items():
            if isinstance(most, int):
                assert waits[name] <= most, places[name]


@pytest.mark.parametrize("setting", OPTIMIZERS)
def test_every_gradient_is_reduced_and_every_parameter_gathered_once(played, setting):
    run, (record,) = played[setting]
    count = stage_memory(run)[0].parameters
    found: dict[tuple[str, str], int] = defaultdict(int)
    for call in record.calls:
        found[group_of(call), call.kind] += call.bytes
    for group, parameters in (("dp", count.dense), ("edp", count.expert)):
        reduced = found[group, "reduce-scatter"] + found[group, "all-reduce"]
        # Shares of a buffer begin at whole multiples; a few hundred numbers are added.
        assert reduced == pytest.approx(4 * parameters, rel=0.005), group
        gathered = found[group, "all-gather"]
        assert gathered == (pytest.approx(2 * parameters, rel=0.005) if setting != "plain" else 0), group


def test_launches_of_a_layer_of_experts_stay_under_a_ceiling(played):
    _, (record,) = played["plain"]
    for way, most in (("forward", 230), ("backward", 120)):
        work = record.work[f"layer 1 {way}"]  # the first one checks kernels for the first time
        assert work.launches / record.microbatches <= most, way


def broken(monkeypatch, how: str, ranks=(0,)) -> list[RankRecord]:
    monkeypatch.setenv("BREAK", how)
    run = executable(
        run_of(MOE, "--num-layers 1 --tensor-model-parallel-size 2 --expert-model-parallel-size 2", world=2)
    )
    (records,) = execute_several([(run, ranks)], program="tests.virtual.broken_rank")
    return records


def test_a_tensor_on_the_wrong_device_ends_the_rank(monkeypatch):
    with pytest.raises(VirtualRankError, match="device"):
        broken(monkeypatch, "cpu_tensor")


def test_a_misaligned_grouped_product_ends_the_rank(monkeypatch):
    with pytest.raises(VirtualRankError, match="(?i)stride|align"):
        broken(monkeypatch, "misaligned")


def test_a_collective_that_one_rank_leaves_out_is_named(monkeypatch):
    problems = match(broken(monkeypatch, "dropped", (0, 1))).problems
    assert problems and "all-reduce" in problems[0] and "1 of its 2 ranks start nothing" in problems[0]


def test_a_new_wait_of_the_host_is_found_with_its_line(monkeypatch):
    (record,) = broken(monkeypatch, "waiting")
    waits = [place for what, place, _ in record.syncs if what == "item" and "broken_rank.py" in place]
    assert waits

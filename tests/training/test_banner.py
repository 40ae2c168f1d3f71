"""What the start of a run says about its experts, and what it warns of."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from megatron_telechat.backend.cpu import CpuBackend
from megatron_telechat.backend.cuda import CudaBackend
from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.training.banner import expert_lines, given_lines, resume_differences, warnings

CUDA, CPU = CudaBackend(0), CpuBackend(0)


def load(*argv: str, world: int = 4):
    return load_run_config(["--preset", "telechat2-tiny-moe", "--mock-data", *argv], {"WORLD_SIZE": str(world)}).run


TP2 = ("--tensor-model-parallel-size", "2")


def test_experts_their_groups_and_their_chunks():
    first, second = expert_lines(load(*TP2, "--moe-input-chunks", "3"))
    assert first == "16, top-4: 8 a rank; their input in 3 chunks"
    assert second == "the tensor domain folded in, 2 groups of 2: ranks 0-1, 2-3; none crosses nodes of 4"
    (alone,) = expert_lines(load())
    assert alone == "16, top-4: 16 a rank; their input whole"
    assert "number measured (auto)" in next(iter(expert_lines(load(*TP2, "--moe-input-chunks", "auto"))))


@pytest.mark.parametrize(
    "backend, connections, flags, told",
    [
        (CUDA, "1", (*TP2, "--moe-input-chunks", "auto"), True),
        (CUDA, "1", (*TP2, "--moe-input-chunks", "4"), True),
        (CUDA, "1", TP2, False),
        (CUDA, "1", ("--moe-input-chunks", "4"), False),
        (CUDA, "8", (*TP2, "--moe-input-chunks", "4"), False),
        (CPU, "1", (*TP2, "--moe-input-chunks", "4"), False),
    ],
)
def test_one_cuda_queue_is_warned_of_where_chunks_need_more(monkeypatch, backend, connections, flags, told):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    found = [text for text in warnings(load(*flags), backend) if "CUDA_DEVICE_MAX_CONNECTIONS" in text]
    assert bool(found) == told


def test_what_a_person_gave_is_said_and_what_a_file_repeats_is_not(tmp_path):
    (tmp_path / "model.yaml").write_text(
        "model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, vocab_size: 256, "
        "activation: swiglu, add_bias_linear: false}\n"
    )
    flags = ["--config", str(tmp_path / "model.yaml"), "--mock-data", "--lr", "3e-4", "--train-iters", "5"]
    loaded = load_run_config(flags, {"WORLD_SIZE": "1"})
    assert loaded.run.optimizer.lr == RunConfig().optimizer.lr
    (line,) = given_lines(loaded.run, loaded.origins)
    assert "lr=0.0003" in line and "num_layers=2" in line, "typed, and different"
    assert "activation" not in line and "add_bias_linear" not in line and "num_query_groups" not in line


def test_weights_alone_are_compared_by_their_model():
    loaded = load_run_config(["--preset", "telechat2-tiny-moe", "--mock-data"], {"WORLD_SIZE": "1"})
    run = loaded.run
    model = replace(run.model, kv_channels=None, rotary_base=5.0)
    saved = replace(run, model=model, optimizer=replace(run.optimizer, lr=1.0))
    origins = {**loaded.origins, "kv_channels": "derived from the widths"}
    assert resume_differences(run, saved, origins, weights_only=False) == [
        f"model.rotary_base: 5.0 -> {run.model.rotary_base}",
        f"optimizer.lr: 1.0 -> {run.optimizer.lr}",
    ]
    assert resume_differences(run, saved, origins, weights_only=True) == [
        f"model.rotary_base: 5.0 -> {run.model.rotary_base}"
    ]


@pytest.mark.parametrize(
    "flags, overlaps",
    [
        ((*TP2, "--moe-input-chunks", "auto"), True),
        ((*TP2, "--moe-input-chunks", "4"), True),
        (TP2, False),
        (("--context-parallel-size", "2", "--cp-comm-type", "p2p"), True),
        (("--context-parallel-size", "2", "--cp-comm-type", "a2a"), False),
    ],
)
def test_exchanges_overlap_where_they_come_in_pieces(flags, overlaps):
    assert load(*flags).exchanges_overlap == overlaps


@pytest.mark.parametrize("backend, given, after", [(CUDA, None, "8"), (CUDA, "1", "1"), (CPU, None, None)])
def test_queues_are_opened_unless_the_environment_says(monkeypatch, backend, given, after):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    backend.open_queues()
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == after


def test_expert_groups_across_nodes_are_warned_of():
    (text,) = warnings(load(*TP2, "--expert-model-parallel-size", "4", "--ranks-per-node", "2"), CPU)
    assert "cross nodes of 2" in text and "--expert-model-parallel-size 2 stays" in text

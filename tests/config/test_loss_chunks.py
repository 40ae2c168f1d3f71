"""How many rows of logits are held at once: by the size of a micro-batch, or as asked; told where it matters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.cli.dry_run import report
from megatron_telechat.config import load_run_config
from megatron_telechat.config.loss_chunks import AUTO_BYTES, logits_bytes, loss_chunk_rows
from megatron_telechat.config.presets import preset_names
from megatron_telechat.training.banner import loss_lines


def load(*argv: str, preset: str = "telechat2-7b", planning: bool = False):
    return load_run_config(["--preset", preset, "--dry-run", *argv], {}, planning=planning)


@pytest.mark.parametrize(
    "preset, flags, rows",
    [
        ("telechat2-7b", "", 0),  # 8,192 x 131,072 numbers are the most that stays whole
        ("telechat2-7b", "--seq-length 8208", 2048),
        ("telechat2-7b", "--micro-batch-size 2", 2048),
        ("telechat2-7b", "--seq-length 32768", 2048),
        ("telechat2-7b", "--seq-length 32768 --tensor-model-parallel-size 4 --world-size 4", 0),
        ("telechat2-7b", "--seq-length 65536 --tensor-model-parallel-size 4 --world-size 4", 8192),
        ("telechat2-115b", "--seq-length 131072", 8192),
        ("telechat2-115b", "--seq-length 131072 --loss-chunk-rows 0", 0),
        ("telechat2-tiny", "--loss-chunk-rows 100", 100),
        ("telechat2-tiny", "--loss-chunk-rows 100 --loss-chunk-rows auto", 0),
    ],
)
def test_rows_follow_from_the_logits_of_a_micro_batch(preset, flags, rows):
    assert loss_chunk_rows(load(*flags.split(), preset=preset).run) == rows


def test_presets_hold_all_logits_at_their_own_length():
    for name in preset_names():
        run = load(preset=name).run
        assert loss_chunk_rows(run) == 0 and logits_bytes(run) <= AUTO_BYTES, name


def test_context_parallel_ranks_share_the_rows():
    run = load("--seq-length", "32768").run
    shared = replace(run, parallel=replace(run.parallel, world_size=4, context_parallel_size=4))
    assert logits_bytes(shared) == logits_bytes(run) / 4
    assert loss_chunk_rows(shared) == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", None),
        (
            "--seq-length 32768",
            "in chunks of 2,048 rows (auto: fp32 logits of a micro-batch would take 16.0 GiB a rank)",
        ),
        ("--loss-chunk-rows 512", "in chunks of 512 rows (--loss-chunk-rows); fp32 logits of a micro-batch: 4.0 GiB a"),
        ("--seq-length 32768 --loss-chunk-rows 0", "of all rows at once (--loss-chunk-rows)"),
        ("--loss-chunk-rows 0", None),
    ],
)
def test_the_dry_run_and_the_banner_say_it(flags, said):
    loaded = load("--mock-data", *flags.split())
    found = [line for line in report(loaded).splitlines() if line.startswith("  loss ")]
    assert [*loss_lines(loaded.run)] == [line.removeprefix("  loss    ") for line in found]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_pasted_command_is_planned_as_megatron_lm_runs_it():
    """Its output layer holds all logits, unless the command says our flag."""
    command = (
        "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --vocab-size 131072 --seq-length 65536 "
        "--micro-batch-size 1 --global-batch-size 1 --bf16"
    ).split()
    for more, rows in (((), 0), (("--loss-chunk-rows", "auto"), 2048), (("--loss-chunk-rows", "512"), 512)):
        run = load_run_config([*command, *more, "--dry-run"], {}, planning=True).run
        assert loss_chunk_rows(run) == rows

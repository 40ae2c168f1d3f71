"""How a context-parallel size is split, where nobody says it and where somebody does; words of Megatron-LM."""

from __future__ import annotations

import pytest

from megatron_telechat.config import LoadedConfig, load_run_config
from megatron_telechat.errors import ConfigError

MEGATRON = (
    "--num-layers 4 --hidden-size 1024 --num-attention-heads 8 --ffn-hidden-size 4096 --vocab-size 1024 --seq-length "
    "4096 --micro-batch-size 1 --global-batch-size 64 --bf16 --world-size 16 --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --normalization RMSNorm --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --train-iters 10 --mock-data"
)


def load(words: str, planning: bool = False) -> LoadedConfig:
    return load_run_config([*words.split(), "--dry-run"], {}, planning=planning)


def preset(name: str, words: str, world: int = 64) -> LoadedConfig:
    return load(f"--preset {name} --mock-data --train-iters 100 --world-size {world} {words}")


@pytest.mark.parametrize(
    "name, words, sizes",
    [
        # as many groups as heads: keys and values are heavy, and heads travel less, as far as the node reaches
        ("telechat2-7b", "--context-parallel-size 8", (8, 1)),
        ("telechat2-7b", "--context-parallel-size 8 --tensor-model-parallel-size 2", (4, 2)),
        ("telechat2-7b", "--context-parallel-size 16", (8, 2)),
        ("telechat2-7b", "--context-parallel-size 4 --tensor-model-parallel-size 8", (1, 4)),
        ("telechat2-7b", "--context-parallel-size 8 --ranks-per-node 4", (4, 2)),
        ("telechat2-7b", "--context-parallel-size 2", (2, 1)),
        # one group on each of eight tensor-parallel ranks: nothing to exchange
        ("telechat2-115b", "--context-parallel-size 4", (1, 4)),
        # few groups: they are the cheaper part
        ("telechat2-tiny", "--context-parallel-size 2", (1, 2)),
        ("telechat2-7b", "--context-parallel-size 8 --cp-comm-type p2p", (1, 8)),
        ("telechat2-7b", "--context-parallel-size 8 --cp-comm-type a2a", (8, 1)),
        ("telechat2-7b", "--context-parallel-size 8 --hierarchical-context-parallel-sizes 2 4", (2, 4)),
        (
            "telechat2-7b",
            "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4",
            (2, 4),
        ),
    ],
)
def test_the_split_of_a_size(name, words, sizes):
    loaded = preset(name, words, world=512 if name == "telechat2-115b" else 64)
    assert loaded.run.parallel.context_sizes == sizes
    assert loaded.run.parallel.hierarchical_context_parallel_sizes == sizes
    derived = "hierarchical" not in words
    assert (loaded.origins["hierarchical_context_parallel_sizes"] == "derived") == derived


TE = "--context-parallel-size 4 --cp-implementation transformer_engine"


def test_the_ring_of_transformer_engine_is_p2p_over_all_ranks():
    run = preset("telechat2-7b", f"{TE} --device cuda").run
    assert run.parallel.cp_implementation == "transformer_engine" and run.parallel.context_sizes == (1, 4)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (TE.replace("4", "1"), "every rank holds whole samples"),
        (f"{TE} --device cpu", "no kernels for device=cpu"),
        (f"{TE} --cp-comm-type a2a", "is p2p alone"),
        (f"{TE} --hierarchical-context-parallel-sizes 2 2", "is p2p alone"),
        (f"{TE} --cp-pieces 2", "cp_pieces belongs to cp_implementation=own"),
        (f"{TE} --cp-keep-received", "cp_keep_received belongs to"),
        (f"{TE} --cp-trace 2-3", "cp_trace belongs to"),
    ],
)
def test_what_transformer_engines_ring_cannot_do_is_refused(words, complaint):
    with pytest.raises(ConfigError, match=complaint):
        preset("telechat2-7b", words if "--device" in words else f"{words} --device cuda")


def test_transformer_engines_ring_keeps_no_documents_apart():
    words = f"--preset telechat2-7b --train-iters 100 --world-size 64 {TE} --device cuda --data-path d"
    with pytest.raises(ConfigError, match="does not keep documents apart"):
        load(f"{words} --reset-attention-mask --tokenizer-model t.json")


def test_a_run_without_context_parallelism_has_no_split():
    run = preset("telechat2-tiny", "").run
    assert run.parallel.context_sizes == (1, 1) and run.parallel.hierarchical_context_parallel_sizes == ()


def test_a_batch_that_nobody_gave_fits_the_context_parallel_ranks():
    run = preset("telechat2-tiny", "--context-parallel-size 2", world=16).run
    assert run.parallel.data_parallel_size == 8 and run.training.global_batch_size % 8 == 0


def test_one_value_for_every_layer_is_that_value():
    run = preset("telechat2-7b", "--context-parallel-size 4 --cp-comm-type a2a a2a a2a").run
    assert run.parallel.context_sizes == (4, 1)


def test_a_command_without_a_kind_is_read_as_megatron_reads_it():
    words = f"{MEGATRON} --context-parallel-size 4"
    assert load(words, planning=True).run.parallel.context_sizes == (1, 4)
    # the training takes its own default, and says so
    loaded = load(words)
    assert loaded.run.parallel.context_sizes == (4, 1)
    assert any("cp_comm_type p2p / auto" in note for note in loaded.notes)
    assert not any("cp_comm_type" in note for note in load(MEGATRON).notes)


def test_a_planner_leaves_out_what_is_refused():
    loaded = load(f"{MEGATRON} --context-parallel-size 4 --cp-comm-type all_gather", planning=True)
    assert loaded.run.parallel.context_sizes == (1, 4)
    assert "--cp-comm-type all_gather is not modelled and was ignored for the plan" in loaded.notes

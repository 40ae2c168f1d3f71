"""Layout strings: reading, writing, Megatron-Core's meaning of the order, and the default split."""

from __future__ import annotations

import random

import pytest

from megatron_telechat.config.layout import PipelineLayout, default_layout, parse_stages
from megatron_telechat.errors import ConfigError

STRINGS = [
    "Et*7|t*8|t*8|t*7L",
    "EtL",
    "Et*3|(t*4|)*2t*3L",
    "E|(t|)*4L",
    "E,t,t|tt,L",
    "Ettt|(tt|)*29,t|L",
    "E(t|)*3tL",
    "E t*2 | t*2 L",
]


@pytest.mark.parametrize("text", STRINGS)
def test_read_as_megatron_core_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text.replace(" ", ""))
    assert parse_stages(text) == tuple("".join(letters[kind.name] for kind in stage) for stage in theirs)


@pytest.mark.parametrize("pipeline_size, text", [(2, "Et|t*2|t*3|t*2L"), (4, "Et*7|t*8|t*8|t*7L"), (2, "E|t*4|t|L")])
def test_layers_of_agrees_with_megatron_core(pipeline_size: int, text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    ours = PipelineLayout.parse(text, pipeline_size)
    theirs = PipelineParallelLayerLayout(text, pipeline_size)
    for rank in range(pipeline_size):
        for virtual_stage in range(ours.num_virtual_stages):
            names = [kind.name for kind in theirs.layout[rank][virtual_stage]]
            assert len(ours.layers_of(rank, virtual_stage)) == names.count("decoder")
            assert ours.has_embedding(rank, virtual_stage) == ("embedding" in names)
            assert ours.has_loss(rank, virtual_stage) == ("loss" in names)


def test_random_layouts_survive_writing_and_tile_the_layers() -> None:
    dice = random.Random(7)
    for _ in range(200):
        ranks, virtual_stages = dice.randint(1, 8), dice.randint(1, 4)
        counts = tuple(dice.randint(1, 9) for _ in range(ranks * virtual_stages))
        layout = PipelineLayout.from_counts(counts, ranks)
        assert PipelineLayout.parse(str(layout), ranks) == layout
        assert layout.problems(sum(counts), virtual_stages) == []
        seen = [
            layer
            for virtual_stage in range(virtual_stages)
            for rank in range(ranks)
            for layer in layout.layers_of(rank, virtual_stage)
        ]
        assert seen == list(range(sum(counts)))  # stage c is virtual stage c // P of rank c % P, in layer order
        assert layout.has_embedding(0, 0) and layout.has_loss(ranks - 1, virtual_stages - 1)
        assert layout.counts == counts


def test_default_layout_is_as_even_as_it_goes() -> None:
    for layers in range(1, 65):
        for ranks in (1, 2, 3, 4, 8):
            for virtual_stages in (1, 2, 3):
                stages = ranks * virtual_stages
                try:
                    layout = default_layout(layers, ranks, virtual_stages)
                except ConfigError:
                    assert layers < stages  # only then can a stage be empty
                    continue
                assert layout.problems(layers, virtual_stages) == []
                assert max(layout.counts) - min(layout.counts) <= 1
                assert layout.counts[-1] == layers // stages  # the loss is work enough for the last stage


@pytest.mark.parametrize(
    "layers, ranks, virtual_stages, expected",
    [
        (30, 4, 1, "Et*7|t*8|t*8|t*7L"),
        (30, 2, 1, "Et*15|t*15L"),
        (32, 4, 1, "Et*8|t*8|t*8|t*8L"),
        (2, 4, 1, "E|t|t|L"),
        (3, 2, 1, "Et*2|tL"),
        (9, 2, 2, "Et*2|t*2|t*3|t*2L"),
    ],
)
def test_default_layouts(layers: int, ranks: int, virtual_stages: int, expected: str) -> None:
    assert str(default_layout(layers, ranks, virtual_stages)) == expected


def test_no_layout_leaves_a_stage_empty() -> None:
    with pytest.raises(ConfigError, match="would deadlock"):
        default_layout(1, 4, 1)


@pytest.mark.parametrize("text", ["E(t", "Et)L", "Et*L", "Ex|L", "E(t|)*0*", "*3", "Et*123456789012L", "(" * 50])
def test_nonsense_is_refused_with_a_fix(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_stages(text)
    assert caught.value.problems[0].fix


def test_a_stage_that_is_not_there() -> None:
    layout = PipelineLayout.parse("Et|tL", 2)
    with pytest.raises(IndexError):
        layout.layers_of(2)

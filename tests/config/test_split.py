"""Splits without a layout string, against megatron-core's own arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.split import SplitFlags, num_virtual_stages, split_counts
from megatron_telechat.errors import ConfigError

MODEL = [
    "--architecture",
    "telechat2",
    "--hidden-size",
    "64",
    "--ffn-hidden-size",
    "128",
    "--num-attention-heads",
    "4",
    "--vocab-size",
    "512",
    "--seq-length",
    "64",
    "--mock-data",
    "--dry-run",
    "--global-batch-size",
    "16",
    "--train-iters",
    "10",
]


def cores_counts(layers: int, stages: int, virtual_stages: int, split: SplitFlags) -> tuple[int, ...] | None:
    """Layers of every virtual stage as megatron-core builds them; None where it refuses, or builds another model."""
    import torch
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
            pipeline_dtype=torch.float32,
            num_layers_in_first_pipeline_stage=split.first,
            num_layers_in_last_pipeline_stage=split.last,
            account_for_embedding_in_pipeline_split=split.embedding,
            account_for_loss_in_pipeline_split=split.loss,
        )
        built = [
            (
                get_transformer_layer_offset(config, virtual_stage, rank),
                get_num_layers_to_build(config, virtual_stage, rank),
            )
            for virtual_stage, rank in itertools.product(range(virtual_stages), range(stages))
        ]
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    numbers = [layer for offset, count in built for layer in range(offset, offset + count)]
    return (
        tuple(count for _, count in built)
        if numbers == list(range(layers)) and min(count for _, count in built) >= 0
        else None
    )


def combinations() -> Iterator[tuple[int, int, int, SplitFlags]]:
    ends = [SplitFlags(first, last) for first, last in itertools.product([None, 0, 1, 2, 3, 4, 6], repeat=2)]
    counted = [
        SplitFlags(embedding=embedding, loss=loss) for embedding, loss in itertools.product([False, True], repeat=2)
    ]
    for layers, stages, virtual_stages in itertools.product(range(1, 15), range(1, 6), range(1, 4)):
        if stages == 1 and virtual_stages > 1:
            continue  # no schedule of either runs it
        for split in [*ends, *counted, SplitFlags(2, None, True), SplitFlags(None, 2, False, True)]:
            if stages > 1 or None in (
                split.first,
                split.last,
            ):  # one rank is both ends, and core looks at the last alone
                yield layers, stages, virtual_stages, split


def test_splits_are_megatron_cores() -> None:
    """Some 9,000 combinations: the same layers on the same stages, or the same refusal."""
    accepted = 0
    for layers, stages, virtual_stages, split in combinations():
        try:
            ours = split_counts(layers, stages, virtual_stages, split)
        except ConfigError:
            ours = None
        assert ours == cores_counts(layers, stages, virtual_stages, split), (layers, stages, virtual_stages, split)
        accepted += ours is not None
    assert accepted > 900


def test_virtual_stages_of_so_many_layers_are_megatron_cores() -> None:
    """V from layers a virtual stage, where the embedding and the loss may count: the only V whose virtual stages are so
    large."""
    for layers, stages, each in itertools.product(range(1, 27), range(2, 6), range(1, 6)):
        for split in (
            SplitFlags(embedding=embedding, loss=loss) for embedding, loss in itertools.product([False, True], repeat=2)
        ):
            total = layers + split.counted
            try:
                virtual_stages = num_virtual_stages(layers, stages, each, split)
            except ConfigError:
                assert total % (stages * each), (layers, stages, each, split)
                continue
            assert virtual_stages * stages * each == total


def loaded(words: str, layers: int, world: int):
    return load_run_config(["--num-layers", str(layers), *MODEL, "--world-size", str(world), *words.split()], {})


@pytest.mark.parametrize(
    "words, layers, layout",
    [
        # 14 layers and both ends are 16 = 4 ranks x 2 virtual stages x 2
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 "
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            14,
            "Et|t*2|t*2|t*2|t*2|t*2|t*2|tL",
        ),
        ("--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split", 15, "Et*4|t*4|t*4|t*3L"),
        (
            "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split",
            2,
            "Et|tL",
        ),
        (
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers "
            "1",
            12,
            "Et*3|t*4|t*4|tL",
        ),
        ("--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 3", 8, "Et*5|t*3L"),
        (
            "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 "
            "--num-layers-in-first-pipeline-stage=2",
            14,
            "Et|t*2|t*2|t*2|t|t*2|t*2|t*2L",
        ),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", 8, "Et*2|t*2|t*2|t*2L"),
        ("--decoder-first-pipeline-num-layers 4", 4, "Et*4L"),
    ],
)
def test_the_training_takes_megatrons_split_flags(words: str, layers: int, layout: str) -> None:
    found = loaded(words, layers, 8)
    assert str(pipeline_layout(found.run)) == layout
    assert pipeline_layout(found.run).num_virtual_stages == found.run.parallel.num_virtual_stages_per_pipeline_rank
    if "per-virtual" not in words or "account" in words:
        assert (
            any(f'taken as --pipeline-model-parallel-layout "{layout}"' in note for note in found.notes)
            or "*" not in layout
        )


@pytest.mark.parametrize(
    "words, layers, said",
    [
        (
            "--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split",
            16,
            "17 layers (the loss counted) do not split over 4",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 "
            "--account-for-loss-in-pipeline-split",
            14,
            "15 layers (the loss counted) do not split over 4 pipeline ranks",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 "
            "--decoder-first-pipeline-num-layers 2",
            14,
            "--num-virtual-stages-per-pipeline-rank",
        ),
        (
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 3",
            14,
            "the 11 layers that are left of 14",
        ),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 9", 8, "-1 of 8 layers are left"),
        ("--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers x", 8, "it takes an integer"),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
            "--num-layers-in-first-pipeline-stage 5",
            8,
            "keep one of the two",
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-layout "
            "Et*5|t*3L",
            8,
            "both set the split",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
            "--num-virtual-stages-per-pipeline-rank 4",
            8,
            "num_virtual_stages_per_pipeline_rank=4",
        ),
    ],
)
def test_what_does_not_split_is_a_problem(words: str, layers: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(words, layers, 8)
    assert said in caught.value.render() and len(caught.value.problems) == 1, caught.value.render()
    assert caught.value.problems[0].fix


# ---- virtual stages from a layout string ---------------------------------------------------------


@pytest.mark.parametrize("stages, virtual_stages", [(2, 1), (2, 2), (2, 3), (4, 2), (4, 3)])
def test_a_layout_says_how_many_virtual_stages(stages: int, virtual_stages: int) -> None:
    layout = PipelineLayout.from_counts(tuple(1 + number % 2 for number in range(stages * virtual_stages)), stages)
    found = loaded(
        f"--pipeline-model-parallel-size {stages} --pipeline-model-parallel-layout {layout}", layout.num_layers, 8
    )
    assert found.run.parallel.num_virtual_stages_per_pipeline_rank == virtual_stages
    assert found.run.parallel.overlap_p2p_communication == (virtual_stages > 1)
    same = loaded(
        f"--pipeline-model-parallel-size {stages} --pipeline-model-parallel-layout {layout} "
        f"--num-virtual-stages-per-pipeline-rank {virtual_stages}",
        layout.num_layers,
        8,
    )
    assert same.run == found.run


def test_a_layout_takes_the_place_of_a_presets_virtual_stages() -> None:
    layout = "Et*12|" + "t*12|" * 6 + "t*12L"
    words = [
        "--preset",
        "telechat2-115b",
        "--dry-run",
        "--world-size",
        "512",
        "--pipeline-model-parallel-layout",
        layout,
    ]
    assert load_run_config(words, {}).run.parallel.num_virtual_stages_per_pipeline_rank == 1


@pytest.mark.parametrize(
    "words, said, fix",
    [
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t*2|tL",
            "3 stages, which is not a multiple of",
            '"Et*2|t*2L"',
        ),
        ("--pipeline-model-parallel-layout Et*2|t*2L", "the layout has 2 stages", "--pipeline-model-parallel-size 2"),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 1 "
            "--pipeline-model-parallel-layout Et|t|t|tL",
            "the layout has 4 stages, not 2",
            "--num-virtual-stages-per-pipeline-rank 2",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
            "--pipeline-model-parallel-layout Et|t|t|tL",
            "the layout has 4 stages, not 2",
            "--num-virtual-stages-per-pipeline-rank 2",
        ),
    ],
)
def test_layouts_that_contradict(words: str, said: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(words, 4, 8)
    assert len(caught.value.problems) == 1 and said in caught.value.render(), caught.value.render()
    assert fix in caught.value.problems[0].fix


@pytest.mark.parametrize(
    "text",
    [
        "[[embedding, decoder, decoder], [decoder, decoder], [decoder], [decoder, loss]]",
        "[[E, t, t], [t*2], [t], [t, L]]",
        "[Et*2, t*2, t, tL]",
        "\n    - [embedding, decoder*2]\n    - [decoder, decoder]\n    - [decoder]\n    - [decoder, loss]",
        "\"[['embedding', 'decoder', 'decoder'], ['decoder', 'decoder'], ['decoder'], ['decoder', 'loss']]\"",
        '"Ett|tt|t|tL"',
    ],
)
def test_layouts_as_lists_in_a_file(tmp_path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"parallel:\n  pipeline_model_parallel_size: 2\n  pipeline_model_parallel_layout: {text}\n")
    run = loaded(f"--config {path}", 6, 2).run
    assert str(pipeline_layout(run)) == "Et*2|t*2|t|tL" and run.parallel.num_virtual_stages_per_pipeline_rank == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("[[embedding, decoder], [decoder], [], [decoder, loss]]", "stage 3 of the layout is empty"),
        ("[[embedding, decoder], [mtp], [decoder], [decoder, loss]]", "multi-token-prediction"),
        ("[[embedding, decodr], [decoder, loss]]", "'decodr' is not valid in a layout"),
        ("[[[embedding], decoder], [decoder, loss]]", "is one list of layers for each stage"),
        ("{a: b}", "a mapping"),
    ],
)
def test_lists_that_are_no_layout(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"parallel:\n  pipeline_model_parallel_size: 2\n  pipeline_model_parallel_layout: {text}\n")
    with pytest.raises(ConfigError) as caught:
        loaded(f"--config {path}", 3, 2)
    assert said in caught.value.render() and len(caught.value.problems) == 1, caught.value.render()

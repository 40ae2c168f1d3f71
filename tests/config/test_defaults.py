"""Fields that may stay unset: what the library reads in their place is what loading fills in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import RunConfig

READ_AS = {
    "num_query_groups": lambda run: run.model.query_groups,
    "kv_channels": lambda run: run.model.head_dim,
    "ranks_per_node": lambda run: run.parallel.node_size,
    "expert_model_parallel_size": lambda run: run.parallel.expert_sizes[0],
    "expert_tensor_parallel_size": lambda run: run.parallel.expert_sizes[1],
    "sequence_parallel": lambda run: run.parallel.sequence_parallel_size > 1,
    "overlap_p2p_communication": lambda run: run.parallel.overlaps_p2p,
    "run_dir": lambda run: str(run.run_dir),
    "save": lambda run: str(run.save_dir),
    "load": lambda run: str(run.load_dir),
    "data_cache_path": lambda run: str(run.cache_dir),
}
"""Field → what the library reads."""

COMMANDS = {
    "dense": "--preset telechat2-tiny",
    "tensor and pipeline": "--preset telechat2-tiny --world-size 12 --tensor-model-parallel-size 2 "
    "--pipeline-model-parallel-size 2",
    "interleaved": "--preset telechat2-tiny --world-size 2 --pipeline-model-parallel-size 2 --num-layers 4 "
    "--num-virtual-stages-per-pipeline-rank 2",
    "folded": "--preset telechat2-tiny-moe --world-size 4 --tensor-model-parallel-size 2",
    "experts cut": "--preset telechat2-tiny-moe --world-size 4 --tensor-model-parallel-size 2 "
    "--no-fold-tensor-into-experts",
    "folders": "--preset telechat2-tiny --run-dir here --save there",
}


def without_derived(run: RunConfig, origins: dict[str, str]) -> RunConfig:
    """The run as a person of the library writes it: what loading derived is unset."""
    for section, fields in ((name, vars(part)) for name, part in vars(run).items()):
        unset = {name: None for name in fields if name in READ_AS and origins[name] == "derived"}
        run = replace(run, **{section: replace(getattr(run, section), **unset)})
    return run


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_unset_fields_read_as_loading_fills_them(command):
    loaded = load_run_config([*command.split(), "--mock-data", "--dry-run"], {})
    bare = without_derived(loaded.run, loaded.origins)
    assert bare != loaded.run
    for name, read in READ_AS.items():
        value = next(getattr(part, name) for part in vars(loaded.run).values() if hasattr(part, name))
        assert read(loaded.run) == read(bare) == value, name


def test_folders_are_paths_with_their_defaults():
    run = RunConfig()
    assert (run.run_dir, run.save_dir) == (Path("runs/custom"), Path("runs/custom/checkpoints"))
    assert (run.load_dir, run.cache_dir) == (run.save_dir, Path("runs/custom/cache"))

"""The planner's ways to share a row: what it tries, what it takes, and that the training takes it as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_telechat.cli.plan_pipeline import main
from megatron_telechat.config import load_run_config
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.costs.memory import stage_memory
from megatron_telechat.planner.context import KEEP, SPLIT, context_sizes, ways
from megatron_telechat.planner.plan import Question
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.remedy import remedies
from megatron_telechat.planner.space import layouts

H100 = device_spec("h100-80g")
LONG = "--preset telechat2-115b --seq-length 131072 --world-size 512"


def load(words: str, *changes: str):
    return load_run_config([*words.split(), "--dry-run"], {}, planning=True, changes=changes).run


def answer(capsys, *words: str):
    assert main(["--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_leave_a_rank_a_part_that_is_not_small():
    assert context_sizes(load("--preset telechat2-7b --world-size 64")) == [1]
    assert context_sizes(load("--preset telechat2-7b --world-size 64 --seq-length 4096")) == [1]
    assert context_sizes(load(LONG)) == [1, 2, 4, 8, 16]
    assert context_sizes(load("--preset telechat2-7b --world-size 12 --seq-length 49152")) == [1, 2, 3, 4, 6]


def split(words: str, device=H100) -> list[tuple[tuple[int, int], bool]]:
    """Splits that a planner tries, and whether it keeps what arrives."""
    found = ways(load(words), device, None, ())
    return [(run.parallel.context_sizes, bool(run.parallel.cp_keep_received)) for _, run in found]


def test_the_split_with_the_fastest_attention_is_taken():
    long = "--seq-length 131072 --context-parallel-size 8 --world-size 512 --global-batch-size 64"
    # one group on each rank: there is nothing to exchange
    assert split(f"--preset telechat2-115b {long}") == [((1, 8), False)]
    # as many groups as heads: heads for tokens as far as the node reaches, keys and values between nodes
    seven = "--preset telechat2-7b --tensor-model-parallel-size"
    assert split(f"{seven} 1 {long}") == [((8, 1), False)]
    assert split(f"{seven} 2 {long}".replace("size 8", "size 16")) == [((4, 4), False)]
    # the longest rows hide all of it
    assert split(f"{seven} 8 {long}".replace("131072", "1048576")) == [((1, 8), False)]


def test_keys_and_values_are_kept_where_that_saves_time():
    slow = replace(H100, inter_node_bandwidth_gb_s=2.0)
    words = "--preset telechat2-115b --seq-length 32768 --context-parallel-size 4 --world-size 512"
    assert split(words, slow) == [((1, 4), False), ((1, 4), True)]
    assert split(words.replace("32768", "131072")) == [((1, 4), False)]
    run = load(words)
    assert [run for _, run in ways(run, slow, None, {*SPLIT, KEEP})] == [run]
    assert len(list(ways(run, slow, None, {*SPLIT}, plain=True))) == 1


@pytest.fixture
def slow_device(tmp_path):
    from megatron_telechat.costs.devices import write_device_file

    path = tmp_path / "slow.yaml"
    write_device_file(path, replace(H100, inter_node_bandwidth_gb_s=2.0))
    return str(path)


def test_a_plan_keeps_what_arrives_and_says_so(capsys, slow_device, tmp_path):
    words = [*"--preset telechat2-115b --seq-length 32768 --context-parallel-size 4 --world-size 512".split()]
    more = ["--num-virtual-stages-per-pipeline-rank", "1", "--device", slow_device, "--gap", "0.02"]
    path = tmp_path / "plan.json"
    found = answer(capsys, *words, *more, "--output", str(path))
    assert "--cp-keep-received" in found["plan"]["flags"] and found["plan"]["sets"]["cp_keep_received"]
    base = [*words, "--dry-run", "--device", "cuda", "--num-virtual-stages-per-pipeline-rank", "1"]
    by_plan = load_run_config([*base, "--plan", str(path)], {}).run
    by_flags = load_run_config([*base, *found["plan"]["flags"]], {}).run
    assert by_plan.parallel.cp_keep_received and replace(by_plan, parallel=by_flags.parallel) == by_flags
    assert max(stage.total_bytes for stage in stage_memory(by_plan)) < (79.1 - 3) * 2**30
    assert main([*words, *more]) == 0
    assert "TP8 x PP8 x CP4 (p2p, kept) x DP2" in capsys.readouterr().out
    # what a person says stays
    found = answer(capsys, *words, *more, "--no-cp-keep-received")
    assert "--cp-keep-received" not in found["plan"]["flags"]
    with pytest.raises(Exception, match="cp_keep_received"):
        load_run_config([*base, "--plan", str(path), "--no-cp-keep-received"], {})


def test_a_sweep_tries_all_sizes_and_no_two_rows_where_one_on_fewer_ranks_is_the_same():
    run = load(LONG)
    fixed = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 8}
    found = layouts(Question(run, H100), lambda *flags: load(LONG, *flags), fixed)
    runs = [one.question.run for one in found]
    tried = {(run.parallel.context_parallel_size, run.training.micro_batch_size) for run in runs}
    assert {context for context, _ in tried} == {1, 2, 4, 8}
    assert {(1, 2), (8, 1), (8, 2)} <= tried
    kept = {run.parallel.cp_keep_received for run in runs if run.parallel.context_parallel_size == 8}
    assert kept == {False, True}


@pytest.mark.heavy
@pytest.mark.parametrize("world", ["512", "1024"])
def test_long_rows_of_the_largest_model_are_shared(capsys, world, tmp_path):
    words = ["--preset", "telechat2-115b", "--seq-length", "131072", "--world-size", world]
    plan = tmp_path / "plan.json"
    fixed = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8"]
    ask = [*words, *fixed, "--device", "ascend-910b-64g", "--sweep", "--time-limit", "3", "--output", str(plan)]
    best = answer(capsys, *ask)[0]
    assert best["plan"]["sets"]["context_parallel_size"] > 1
    device = device_spec("ascend-910b-64g")
    for extra in (best["flags"], ["--plan", str(plan)]):
        run = load_run_config([*words, *extra, "--dry-run", "--device", "npu"], {}).run
        assert predict(run, device).iteration == pytest.approx(best["plan"]["predicted"]["iteration_s"])
        assert max(stage.device_bytes for stage in stage_memory(run)) < (60.9 - 3) * 2**30


@pytest.mark.heavy
def test_a_sweep_keeps_the_way_of_sharing_that_is_given(capsys):
    words = "--preset telechat2-7b --seq-length 65536 --world-size 16 --global-batch-size 16 --device h100-80g --sweep"
    more = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --cp-comm-type a2a --time-limit 3"
    found = answer(capsys, *words.split(), *more.split())
    sets = [one["plan"]["sets"] for one in found]
    assert {tuple(one["hierarchical_context_parallel_sizes"]) for one in sets if one["context_parallel_size"] > 1} == {
        (2, 1), (4, 1), (8, 1)
    }  # fmt: skip
    code = main([*words.split(), *more.split()])
    assert code == 0 and "8 (a2a)" in capsys.readouterr().out


SEVEN = "--preset telechat2-7b --seq-length 65536 --world-size 8 --global-batch-size 8"


def changes(words: str, memory_gib: float) -> dict[tuple[str, ...], str]:
    question = Question(load(words), H100, memory_bytes=memory_gib * 2**30, time_limit_s=2.0)
    return {change.flags: change.text for change in remedies(question, lambda *flags: load(words, *flags))}


def test_sharing_rows_is_a_change_that_may_fit():
    assert changes(SEVEN, 66)[("--context-parallel-size", "4")] == "4 ranks that share a row instead of 1"


def test_ranks_of_one_row_share_the_state_of_the_optimizer_too():
    words = f"{SEVEN} --no-use-distributed-optimizer --no-overlap-param-gather --context-parallel-size 8"
    assert changes(words, 79)[("--use-distributed-optimizer",)] == "shard the optimizer state over 8 ranks"


PASTED = (
    "torchrun --nproc-per-node 8 --nnodes 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 "
    "--num-attention-heads 32 --group-query-attention --num-query-groups 8 --ffn-hidden-size 14336 --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --normalization RMSNorm --position-embedding-type "
    "rope --vocab-size 128256 --seq-length 131072 --micro-batch-size 1 --global-batch-size 64 --bf16 "
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer --sequence-parallel "
    "--attention-dropout 0 --hidden-dropout 0 --context-parallel-size 8"
)


@pytest.mark.parametrize(
    "flags, text",
    [
        ("", "CP8 (p2p) x DP2"),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4", "CP8 (a2a 2 x p2p 4) x DP2"),
        ("--cp-comm-type all_gather", "not modelled, and ignored for the plan: --cp-comm-type all_gather"),
    ],
)
def test_pasted_commands_are_planned_with_their_context_parallelism(capsys, flags, text):
    assert main(["--device", "h100-80g", "--gap", "0.05", "--", *PASTED.split(), *flags.split()]) == 0
    assert text in capsys.readouterr().out

"""plan_pipeline: groups of micro-batches, and a stage that may run slower, in plans, sweeps and pasted commands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_telechat.cli.dry_run import report as dry_run
from megatron_telechat.cli.plan_pipeline import main
from megatron_telechat.config import load_run_config
from megatron_telechat.costs.devices import device_spec
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import balance_problem
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.simulate import simulate

GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
RUN = "--preset telechat2-35b --world-size 16 --num-virtual-stages-per-pipeline-rank 2".split()
DEVICE = ["--device", "h200-141g", "--gap", "0.02"]
MEGATRON = """torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 16 --hidden-size 2048 --num-attention-heads 16
  --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 10 --bf16 --vocab-size 32000
  --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2""".split()


@pytest.fixture
def ask(capsys):
    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_groups_are_in_the_report_and_in_its_flags(ask):
    code, text = ask(*RUN, GROUP, "6", "--global-batch-size", "34", *DEVICE)
    assert code == 0 and "TP4 x PP4 x VP2 (groups of 6 micro-batches) x DP1" in text, text
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert f"{GROUP} 6" in lines["flags"] and f"{GROUP} 6" in lines["Megatron-LM"]
    assert GROUP not in ask(*RUN, GROUP, "4", *DEVICE)[1], "this is what the flag means where it is not given"
    loaded = load_run_config([*RUN, GROUP, "6", "--global-batch-size", "34", "--dry-run"], {})
    assert "PP 4 x VP 2 in groups of 6 micro-batches" in dry_run(loaded)
    loaded = load_run_config([*RUN[:4], GROUP, "6", "--dry-run"], {})
    assert any("has no effect: one virtual stage a rank" in note for note in loaded.notes)


def test_groups_of_a_pasted_command(ask):
    """Ten micro-batches over four stages go in groups of five or more only."""
    code, text = ask("--device", "a100-80g", "--", *MEGATRON)
    assert code == 2 and f"--global-batch-size 12, or {GROUP} 5" in text, text
    code, text = ask("--device", "a100-80g", "--", *MEGATRON, GROUP, "5")
    assert code == 0 and "(groups of 5 micro-batches)" in text and "not modelled" not in text, text
    assert f"{GROUP} 5" in next(line for line in text.splitlines() if line.startswith("remove from your command"))
    megatron = next(line for line in text.splitlines() if line.startswith("Megatron-LM: "))
    assert f" {GROUP} 5" in megatron


@pytest.mark.heavy
def test_a_sweep_varies_groups_unless_they_are_given(ask):
    words = "--preset telechat2-7b --num-layers 8 --world-size 4 --global-batch-size 10 --micro-batch-size 1".split()
    words += "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --device h100-80g".split()
    words += "--sweep --processes 1 --no-optimizer-cpu-offload".split()
    code, text = ask(*words)
    assert code == 0 and "the two smallest groups of micro-batches, 2 x PP, and all at once" in text, text
    assert text.splitlines()[3].split()[:4] == ["TP", "PP", "VP", "group"]
    assert {line.split()[4] for line in text.splitlines()[4:8]} == {"-", "5", "6", "10"}
    megatron = next(line for line in text.splitlines() if line.startswith("Megatron-LM: "))
    assert megatron.count(GROUP) == 1
    found = json.loads(ask(*words, "--json")[1])
    for one in found:
        assert one["flags"].count(GROUP) == ("--num-virtual-stages-per-pipeline-rank" in one["flags"])
        run = load_run_config([*words[:8], "--dry-run", *one["flags"]], {}).run
        seconds = predict(run, device_spec("h100-80g")).iteration
        assert seconds == pytest.approx(one["plan"]["predicted"]["iteration_s"])
    code, text = ask(*words, GROUP, "10")
    assert code == 0 and "group 10, mbs 1, offload False; --free tp,pp,group,mbs," in text, text
    assert "the two smallest groups" not in text and " 2 parallel layouts" in text


def test_a_plan_for_the_worst_slow_stage(ask):
    words = [*"--preset telechat2-35b --world-size 16 --global-batch-size 8".split(), "--device", "ascend-910b-64g"]
    slow = json.loads(ask(*words, "--slow-stage", "0.2", "--json")[1])
    plain = json.loads(ask(*words, "--json")[1])
    assert slow["status"] == "optimal"
    run = load_run_config([*words[:6], "--dry-run", "--device", "npu"], {}).run
    nominal = balance_problem(run, device_spec("ascend-910b-64g"))
    worst = replace(nominal, slow_stage=0.2)
    of_slow, of_plain = (Assignment.from_json(found) for found in (slow, plain))
    assert slow["makespan"] == simulate(worst, of_slow).makespan < simulate(worst, of_plain).makespan
    assert plain["makespan"] == simulate(nominal, of_plain).makespan <= simulate(nominal, of_slow).makespan
    assert slow["predicted"]["pipeline_s"] == pytest.approx(simulate(nominal, of_slow).makespan)
    rest = slow["predicted"]["iteration_s"] - slow["predicted"]["pipeline_s"]
    case = slow["plan"]["worst_case"]
    assert case["slow_stage"] == 0.2 and case["iteration_s"] == pytest.approx(slow["makespan"] + rest)
    code, text = ask(*words, "--slow-stage", "0.2")
    assert code == 0 and "with one stage 20.0% slower, whichever it is: at most" in text, text
    assert "faster in their worst case under this model" in text and "pipeline time in the worst case, by" in text


@pytest.mark.heavy
def test_a_sweep_for_the_worst_slow_stage(ask):
    words = "--preset telechat2-7b --num-layers 8 --world-size 4 --global-batch-size 8 --device h100-80g".split()
    words += "--sweep --processes 1 --slow-stage 0.1 --gap 0.001 --top 2".split()
    code, text = ask(*words)
    assert code == 0 and "each in its worst case (one stage 10.0% slower)" in text and " worst " in text, text
    first = json.loads(ask(*words, "--json")[1])[0]
    assert first["proof"]["step"] == pytest.approx(first["plan"]["worst_case"]["iteration_s"])
    assert first["plan"]["predicted"]["iteration_s"] < first["proof"]["step"]

"""--calibrate --from: one known throughput fits the factor of a program, the logged steps of a run the times of its
parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_telechat.cli.plan_pipeline import main
from megatron_telechat.config import load_run_config
from megatron_telechat.config.layout import PipelineLayout, pipeline_layout
from megatron_telechat.config.recompute import recompute_plan
from megatron_telechat.config.schema import RunConfig
from megatron_telechat.config.yaml_io import dump_run_config
from megatron_telechat.costs.devices import device_spec, read_device_file
from megatron_telechat.costs.time import TimeModel
from megatron_telechat.planner.assignment import Assignment
from megatron_telechat.planner.build import assignment_of, balance_problem, kinds_of
from megatron_telechat.planner.from_run import SeenRun, fit_to_run
from megatron_telechat.planner.predict import predict
from megatron_telechat.planner.problem import BalanceProblem
from megatron_telechat.planner.simulate import stage_times

RUN = ["--preset", "telechat2-7b", "--world-size", "8"]
DEVICE = ["--device", "ascend-910b-64g"]


def calibrated(tmp_path, source: str, *words: str):
    path = tmp_path / "mine.yaml"
    assert main(["--calibrate", "--from", source, *DEVICE, "--output", str(path), *words]) == 0
    return read_device_file(path)


def test_the_prediction_is_the_throughput_that_was_seen(tmp_path, capsys):
    device = calibrated(tmp_path, "2,950", *RUN)
    run = load_run_config([*RUN, "--dry-run"], {}).run
    assert predict(run, device).tokens_per_s_per_device == pytest.approx(2950, rel=1e-3)
    assert predict(run, device).error == 0.1
    assert "efficiency.stack" in capsys.readouterr().out
    again = calibrated(tmp_path, "2950", *RUN)
    assert again.efficiency["stack"] == device.efficiency["stack"]


def test_a_command_of_megatron_lm(tmp_path):
    words = "torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 "
    words += "--num-attention-heads 32 --seq-length 4096 --micro-batch-size 1 --global-batch-size 64 --bf16 --swiglu "
    words += "--vocab-size 32000 --tensor-model-parallel-size 2 --position-embedding-type rope"
    device = calibrated(tmp_path, "3000", "--", *words.split())
    assert 0.2 < device.efficiency["stack"] < 5


def test_a_run_folder_says_both_the_run_and_its_throughput(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    loaded = load_run_config([*RUN, "--train-iters", "10", "--dry-run"], {})
    (folder / "config.yaml").write_text(dump_run_config(loaded.run), encoding="utf-8")
    rates = [100.0, 200.0, 300.0, 8 * 2900.0, 8 * 2950.0, 8 * 3000.0]
    lines = [json.dumps({"step": step, "tokens_per_s": rate}) for step, rate in enumerate(rates, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    device = calibrated(tmp_path, str(folder))
    assert predict(loaded.run, device).tokens_per_s_per_device == pytest.approx(2950, rel=1e-3)


def logged(folder: Path, words: Sequence[str], layers: float, ends: float, more: float, steps: int = 20) -> RunConfig:
    """A run folder whose steps took what the device file says, times a factor for layers and one for both ends."""
    run = load_run_config([*words, "--train-iters", "10", "--dry-run"], {}).run
    device = device_spec("ascend-910b-64g")
    assert device is not None
    times, layout = TimeModel(run, device), pipeline_layout(run)
    seconds = []
    for rank in range(run.parallel.pipeline_model_parallel_size):
        own = [
            layer
            for chunk in range(len(layout.stages) // layout.pipeline_size)
            for layer in layout.layers_of(rank, chunk)
        ]
        parts = [times.layer(layer, modes) for layer, modes in enumerate(recompute_plan(run)) if layer in own]
        of_layers = sum(part.forward + part.backward + part.extra for part in parts)
        both = [times.embedding()] * (rank == 0) + [times.output_layer()] * (rank == layout.pipeline_size - 1)
        of_ends = sum(part.forward + part.backward for part in both)
        seconds.append(run.num_microbatches * (layers * of_layers + ends * of_ends))
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_run_config(run), encoding="utf-8")
    records = [
        {
            "step": step,
            "tokens_per_s": 1.0,
            "iteration_time_s": 50.0 if step < 4 else max(seconds) * more,
            # cold, and now and then a slow one
            "stage_compute_s": [one * (9.0 if step < 4 else 2.0 if step % 7 == 0 else 1.0) for one in seconds],
        }
        for step in range(1, steps + 1)
    ]
    lines = [
        {"step": 0, "stage_compute_s": [1.0] * len(seconds), "iteration_time_s": 1.0},
        {"event": "resume", "step": 0},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in [*lines, *records]), encoding="utf-8"
    )
    return run


PIPELINE = "--preset telechat2-35b --world-size 32 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 "
SHAPES = {
    "pipeline": PIPELINE + "--global-batch-size 32",
    "uneven, chunks, recompute": PIPELINE
    + "--global-batch-size 32 --num-virtual-stages-per-pipeline-rank 2 --pipeline-model-parallel-layout "
    "Et*9|t*8|t*8|t*7|t*9|t*9|t*8|t*6L --recompute-layout full*9|none*8|none*8|none*7|mlp*9|none*9|none*8|none*6",
    "experts": "--preset telechat2-39b-a12b --world-size 64 --tensor-model-parallel-size 4 "
    "--pipeline-model-parallel-size 2 --global-batch-size 64",
}


@pytest.mark.parametrize(
    "shape, layers, ends",
    [("pipeline", 1.0, 1.0), ("pipeline", 0.6, 2.5), ("uneven, chunks, recompute", 1.4, 0.7), ("experts", 1.4, 0.7)],
)
def test_logged_steps_fit_layers_and_ends(shape, layers, ends, tmp_path, capsys):
    run = logged(tmp_path / "run", SHAPES[shape].split(), layers, ends, 1.3)
    device = calibrated(tmp_path, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert f"a layer takes {layers:.3f} times as long as the file says" in said
    assert f"embedding and output layer {ends:.3f} times" in said and "17 records" in said
    known = device_spec("ascend-910b-64g")
    assert known is not None and not known.measured and len(device.measured) == 1
    before, after = TimeModel(run, known), TimeModel(run, device)
    for layer, modes in enumerate(recompute_plan(run)):
        one, other = before.layer(layer, modes), after.layer(layer, modes)
        assert other.forward == pytest.approx(layers * one.forward)
        assert other.extra == pytest.approx(layers * one.extra)
    assert after.output_layer().backward == pytest.approx(ends * before.output_layer().backward)
    seen = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert predict(run, device).iteration == pytest.approx(seen["iteration_time_s"], rel=0.002)


def test_a_slow_rank_of_a_calibrated_device_is_not_put_to_the_ends(tmp_path):
    """The ends are a tenth of the last rank: its 4 % would be 40 % of them."""
    words = SHAPES["pipeline"].split()
    run = logged(tmp_path / "run", words, 1.3, 0.8, 1.0)
    device = calibrated(tmp_path, str(tmp_path / "run"))
    problem = balance_problem(run, device, kinds_of(run))
    seconds = [run.num_microbatches * one for one in rank_seconds(problem, assignment_of(run, problem))]
    for slow, ends in ((1.04, 1.15), (0.96, 0.85)):
        seen = SeenRun(2 * max(seconds), (*seconds[:-1], slow * seconds[-1]), "a run")
        fitted = fit_to_run(run, device, seen)
        assert fitted.layers == pytest.approx(1.0, abs=0.015)
        assert min(ends, 1.0) < fitted.ends < max(ends, 1.0)
        estimated = device_spec("ascend-910b-64g")
        assert estimated is not None
        apart = fit_to_run(run, estimated, seen)
        assert abs(apart.ends / 0.8 - 1) > 2 * abs(ends - 1), "without a calibration the ends may be anything"
    assert fit_to_run(run, device, SeenRun(2 * max(seconds), tuple(seconds), "a run")).ends == pytest.approx(1.0)


def rank_seconds(problem: BalanceProblem, assignment: Assignment) -> list[float]:
    times = stage_times(problem, assignment)
    return [sum(times[rank :: problem.P]) for rank in range(problem.P)]


def test_one_pipeline_rank_has_one_factor(tmp_path, capsys):
    words = ["--preset", "telechat2-7b", "--world-size", "8", "--tensor-model-parallel-size", "8"]
    run = logged(tmp_path / "run", [*words, "--global-batch-size", "8"], 1.2, 1.2, 1.1)
    device = calibrated(tmp_path, str(tmp_path / "run"))
    assert "1.200 times as long as the file says, embedding and output layer 1.200 times" in capsys.readouterr().out
    assert predict(run, device).iteration == pytest.approx(
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["iteration_time_s"]
    )


def test_another_plan_is_made_with_what_was_seen(tmp_path):
    """The head takes four times as long as the file says: the last stage gets fewer layers."""
    words = SHAPES["pipeline"].split()
    logged(tmp_path / "run", words, 1.0, 4.0, 1.2)
    calibrated(tmp_path, str(tmp_path / "run"))
    layers = []
    words += ["--output", str(tmp_path / "plan.json"), "--num-virtual-stages-per-pipeline-rank", "1"]
    for more in (DEVICE, ["--device", str(tmp_path / "mine.yaml")], [*DEVICE, "--from", str(tmp_path / "run")]):
        assert main([*words, *more]) == 0
        layout = json.loads((tmp_path / "plan.json").read_text())["sets"]["pipeline_model_parallel_layout"]
        layers.append(PipelineLayout.parse(layout, 4).counts)
    assert layers[1] == layers[2] and layers[1][-1] < layers[0][-1]


def test_few_records_fit_one_factor_and_other_runs_are_refused(tmp_path, capsys):
    run = logged(tmp_path / "run", SHAPES["pipeline"].split(), 1.0, 1.0, 1.0, steps=7)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens_per_s": 1.0', '"tokens_per_s": 12000'))
    assert "stack" in calibrated(tmp_path, str(tmp_path / "run")).efficiency
    logged(tmp_path / "other", SHAPES["experts"].split(), 1.0, 1.0, 1.0)
    capsys.readouterr()
    out = tmp_path / "OUT"
    words = ["--calibrate", *DEVICE, "--output", str(out)]
    assert main([*words, "--from", str(tmp_path / "other"), *SHAPES["pipeline"].split()]) == 2
    assert "has the compute of 2 pipeline ranks, the run has 4" in capsys.readouterr().err
    logged(tmp_path / "far", SHAPES["pipeline"].split(), 20.0, 20.0, 1.0)
    assert main([*words, "--from", str(tmp_path / "far")]) == 2
    assert "20 times as long as ascend-910b-64g should" in capsys.readouterr().err
    assert not out.exists() and run.parallel.world_size == 32
    assert main([*SHAPES["pipeline"].split(), *DEVICE, "--from", str(tmp_path / "run")]) == 2
    assert "fewer than 8 logged steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--calibrate", "--from", "23600000", *RUN, *DEVICE, "--output", "OUT"], "not of the whole machine"),
        (["--calibrate", "--from", "fast", *RUN, *DEVICE, "--output", "OUT"], "neither a run folder nor a throughput"),
        (["--calibrate", "--from", "0", *RUN, *DEVICE, "--output", "OUT"], "neither a run folder nor a throughput"),
        (["--calibrate", "--from", "2950", *RUN, *DEVICE], "--calibrate needs --output"),
        (["--calibrate", "--from", "2950", *RUN, "--output", "OUT"], "no device is given"),
        (["--from", "2950", *RUN, *DEVICE, "--sweep"], "--from belongs to --calibrate, or to the plan of one layout"),
        (["--from", "2950", *RUN, *DEVICE], "2950 holds no config.yaml"),
        (["--calibrate", "--from", "EMPTY", *RUN, *DEVICE, "--output", "OUT"], "metrics.jsonl"),
    ],
)
def test_mistakes_are_named(words, said, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    code = main([str(tmp_path / word) if word in ("OUT", "EMPTY") else word for word in words])
    assert code in (2, 3, 4)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()

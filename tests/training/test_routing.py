"""Recording, replaying and comparing the experts' choices: over ranks, in files, through the tool, and before the
start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_telechat.cli.compare_routing import main as compare
from megatron_telechat.config import load_run_config
from megatron_telechat.config.routing import SHAPE, read_recording, step_folder
from megatron_telechat.errors import ConfigError, DataError
from megatron_telechat.training.routing_files import Box, StepReader, begin_step, commit_step, write_box, write_manifest
from tests.harness import run_cases
from tests.training.runs import MOE
from tests.training.worker_routing import LAYOUTS, forged

WORKER = Path(__file__).with_name("worker_routing.py")
LAYERS, TOPK, EXPERTS, SAMPLES, LENGTH = 4, 4, 16, 8, 32
NUMBERS = dict(zip(SHAPE, (LAYERS, 1, EXPERTS, TOPK, SAMPLES, LENGTH), strict=True))


def write(
    path: Path, steps=(1, 2, 3), gap: float = 1.0, replayed: bool = False, cuts=(0, 20, LENGTH), **changes
) -> Path:
    """A recording by formula, its positions and samples spread over several files."""
    write_manifest(path, {**NUMBERS, **changes}, replayed, None)
    for step in steps:
        begin_step(path, step)
        boxes = []
        for part, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            for half in (0, 1):
                samples = tuple(range(half, SAMPLES, 2))
                box = Box(f"rank_{2 * part + half:05d}.safetensors", tuple(range(LAYERS)), samples, start, stop)
                experts = {
                    layer: np.array(
                        [[forged(layer, s, p, TOPK, EXPERTS) for p in range(start, stop)] for s in samples],
                        dtype=np.uint8,
                    )
                    for layer in range(LAYERS)
                }
                gaps = {layer: np.full((len(samples), stop - start), gap, dtype=np.float32) for layer in range(LAYERS)}
                write_box(path, step, box, experts, gaps)
                boxes.append(box)
        commit_step(path, step, boxes)
    return path


def change(path: Path, step: int, layer: int, row: int, position: int, experts: list[int], gap: float) -> None:
    """Another choice of one token in the first file of a step (samples 0, 2, 4, 6)."""
    from safetensors.numpy import load_file, save_file

    file = step_folder(path, step) / "rank_00000.safetensors"
    tensors = load_file(file)
    tensors[f"experts.{layer}"][row, position] = experts
    tensors[f"gaps.{layer}"][row, position] = gap
    save_file(tensors, file)


# ---- over ranks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    write(folder / "forged")
    found = run_cases(WORKER, 2, timeout=300, env={"ROUTING_DIR": str(folder)})
    return folder, found


@pytest.mark.gloo
def test_another_layout_replays_what_a_stopped_and_resumed_run_recorded(report):
    folder, found = report
    resumed_at, *losses = found.check("recorded")[0]
    assert resumed_at == 2
    assert read_recording(folder / "recording").steps() == (1, 2, 3)
    whole = [json.loads(line) for line in (folder / "recorded" / "metrics.jsonl").read_text().splitlines()]
    expected = [record["loss"] for record in whole if "loss" in record][:2] + losses
    assert found.check("replayed")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.gloo
def test_a_recording_made_during_a_replay_differs_at_ties_only_and_is_not_replayed(report, capsys):
    folder, found = report
    found.check("replayed")
    assert read_recording(folder / "again").replayed
    assert compare([str(folder / "recording"), str(folder / "again")]) == 0
    assert f"EQUAL: 3 steps, {3 * LAYERS * SAMPLES * LENGTH:,} choices" in capsys.readouterr().out
    assert "recorded during a replay" in refused(f"--moe-routing-replay {folder}/again")


@pytest.mark.gloo
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_router_takes_the_choices_of_its_own_tokens(report, name):
    assert all(calls > 0 for calls in report[1].check(f"given_{name}"))


@pytest.mark.gloo
@pytest.mark.parametrize(
    "name,kind,text",
    [
        ("other_data", "DataError", "the data is not the data of the recording: seed"),
        ("recording_of_other_data", "ConfigError", "holds the recording of another run: seed"),
        ("step_before_the_recording", "ConfigError", "does not hold step 1, which is to be replayed"),
    ],
)
def test_what_the_rules_cannot_see_is_refused_on_every_rank(report, name, kind, text):
    for found in report[1].check(name):
        assert found[0] == kind and text in found[1]


# ---- before the start ---------------------------------------------------------------------------


def refused(flags: str, base=MOE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*base, "--train-iters", "3", *flags.split(), "--dry-run"], {})
    return caught.value.render()


def test_a_recording_that_does_not_fit_is_refused_by_name_in_the_dry_run(tmp_path):
    path = write(tmp_path / "r")
    load_run_config([*MOE, "--train-iters", "3", "--moe-routing-replay", str(path), "--dry-run"], {})
    sizes = (
        "--moe-router-topk 3 --num-experts 8 --num-layers 2 --seq-length 16 --global-batch-size 4 --moe-layer-freq 2"
    )
    text = refused(f"--moe-routing-replay {path} {sizes}")
    for part in (
        "moe_router_topk=3, recorded 4",
        "num_experts=8, recorded 16",
        "num_layers=2, recorded 4",
        "seq_length=16, recorded 32",
        "global_batch_size=4, recorded 8",
        "moe_layer_freq=2, recorded 1",
    ):
        assert part in text
    assert "and not step 4 (7 are missing)" in refused(f"--moe-routing-replay {path} --train-iters 10")
    assert "not step 4" in refused(f"--moe-routing-replay {path} --train-iters 10 --moe-routing-steps 3-4")
    load_run_config(
        [*MOE, "--train-iters", "10", "--moe-routing-replay", str(path), "--moe-routing-steps", "1-3", "--dry-run"], {}
    )


def test_flags_of_the_routing_that_mean_nothing_are_refused(tmp_path):
    path = write(tmp_path / "r")
    other = write(tmp_path / "other", num_experts=8)
    (tmp_path / "file").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "routing.json").write_text("{}")
    write_manifest(tmp_path / "empty", NUMBERS, False, None)
    dense = ["--preset", "telechat2-tiny", "--mock-data"]
    assert "without num_experts" in refused(f"--moe-routing-record {tmp_path}/new", dense)
    assert "nothing is recorded or replayed" in refused("--moe-routing-steps 1-2")
    assert "names no steps" in refused(f"--moe-routing-record {tmp_path}/new --moe-routing-steps x")
    assert "there is no routing.json" in refused(f"--moe-routing-replay {tmp_path}/none")
    assert "is damaged, or not of the format" in refused(f"--moe-routing-replay {tmp_path}/broken")
    assert "holds no step" in refused(f"--moe-routing-replay {tmp_path}/empty")
    assert "both the recording to write and the one to replay" in refused(
        f"--moe-routing-replay {path} --moe-routing-record {path}"
    )
    assert "recording of another run: num_experts=16, recorded 8" in refused(f"--moe-routing-record {other}")
    assert "recording of another run: a replay, recorded none" in refused(
        f"--moe-routing-record {write(tmp_path / 'x')} --moe-routing-replay {path}"
    )
    assert "is a file" in refused(f"--moe-routing-record {tmp_path}/file")


# ---- files --------------------------------------------------------------------------------------


def test_any_part_of_a_step_is_read_from_any_files(tmp_path):
    reader = StepReader(write(tmp_path / "r"), 2)
    samples = [6, 1, 3]
    found = reader.read("experts", 2, samples, 13, 27)
    assert found.tolist() == [
        [forged(2, sample, position, TOPK, EXPERTS) for position in range(13, 27)] for sample in samples
    ]


def test_a_torn_or_damaged_step_is_no_step(tmp_path):
    path = write(tmp_path / "r")
    (step_folder(path, 3) / "index.json").unlink()
    begin_step(path, 2)  # cut off after its first file was written anew
    assert read_recording(path).steps() == (1,)
    file = step_folder(path, 1) / "rank_00000.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="the recording is damaged"):
            StepReader(path, 1).read("experts", 0, range(SAMPLES), 0, LENGTH)
    file.unlink()
    assert StepReader(path, 1).read("experts", 0, [1, 3], 0, LENGTH).shape == (2, LENGTH, TOPK)
    with pytest.raises(DataError, match="the recording is damaged"):
        StepReader(path, 1).read("experts", 0, [0], 0, LENGTH)


def test_a_step_whose_files_lack_tokens_is_named(tmp_path):
    path = write(tmp_path / "r", cuts=(0, 20, 31))
    with pytest.raises(DataError, match="lacks experts of layer 0 for 8 of 256 tokens"):
        StepReader(path, 1).read("experts", 0, range(SAMPLES), 0, LENGTH)


# ---- the tool -----------------------------------------------------------------------------------


def test_the_tool_tells_ties_from_other_choices(tmp_path, capsys):
    one = write(tmp_path / "one")
    other = tmp_path / "other"
    shutil.copytree(one, other)
    assert compare([str(one), str(other)]) == 0
    assert "EQUAL: 3 steps, 3,072 choices; 0 differ" in capsys.readouterr().out

    for path in (one, other):  # the order of a token's experts is no difference
        change(path, 1, 0, 0, 0, [1, 2, 3, 4] if path == one else [4, 3, 2, 1], 1.0)
    change(one, 2, 1, 1, 5, [1, 2, 3, 4], 3e-7)
    change(other, 2, 1, 1, 5, [1, 2, 3, 9], 2e-7)
    assert compare([str(one), str(other)]) == 0
    said = capsys.readouterr().out
    assert (
        "step 2 layer 1: 1 of 256 tokens differ, 1 of them ties; clearest: sample 2 position 5, experts 1 2 3 4 / 1 2 "
        "3 9, gap 3e-07 / 2e-07" in said
    )
    assert compare([str(one), str(other), "--tie", "1e-7"]) == 5

    change(other, 3, 2, 0, 1, [1, 2, 3, 9], float("nan"))
    assert compare([str(one), str(other)]) == 5
    said = capsys.readouterr().out
    assert "DIFFERENT: 3 steps" in said and "2 differ, of which 1 are ties" in said and "gap 1 / nan" in said
    assert compare([str(one), str(other), "--steps", "1-2"]) == 0
    assert compare([str(one), str(other), "--limit", "1"]) == 5
    assert "... 1 more layers and steps (--limit)" in capsys.readouterr().out


def test_the_tool_refuses_what_cannot_be_compared(tmp_path, capsys):
    one = write(tmp_path / "one", steps=(1, 2))
    assert compare([str(one), str(tmp_path / "none")]) == 2
    assert compare([str(one), str(write(tmp_path / "other", num_experts=8))]) == 2
    assert "num_experts is 16 and 8" in capsys.readouterr().err
    later = write(tmp_path / "later", steps=(2, 3))
    assert compare([str(one), str(later), "--steps", "1-2"]) == 2
    assert "step 1 is not in both recordings" in capsys.readouterr().err
    assert compare([str(one), str(later)]) == 0
    assert "steps in one recording only, not compared: 1 of" in capsys.readouterr().out
    assert compare([str(one), str(write(tmp_path / "last", steps=(7,)))]) == 2
    (step_folder(later, 2) / "rank_00001.safetensors").write_bytes(b"")
    assert compare([str(one), str(later)]) == 3

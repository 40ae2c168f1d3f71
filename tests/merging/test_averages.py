"""The averages that a run has kept: exported, merged, shown; refused where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_telechat.checkpoint.format import CheckpointReader
from megatron_telechat.cli.convert_checkpoint import main as convert
from megatron_telechat.cli.inspect_checkpoint import main as inspect
from megatron_telechat.cli.merge_checkpoints import main as merge
from megatron_telechat.huggingface.weights import weight_map
from megatron_telechat.merging.inputs import PROVENANCE
from tests.merging.material import MODEL, SHARDED, checkpoint, random_averages, random_state

pytestmark = pytest.mark.heavy


@pytest.fixture
def run(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a bf16 training in TP2 EP2 with its averages, and what it holds."""
    averages, extra = random_averages(11)
    state = random_state(1) | averages
    return checkpoint(tmp_path / "run", state, SHARDED["tp2 ep2"], extra=extra).parent, state


def hugging_face(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder with these values."""
    return {
        name: part
        for link in weight_map(MODEL)
        for name, part in zip(link.names, link.split(state[prefix + link.key][link.box.slices()]), strict=True)
    }


@pytest.mark.parametrize("kind", ["ema", "window"])
@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_an_export_holds_the_average_rounded(run, tmp_path, kind, dtype):
    root, state = run
    flags = ["--values", kind, "--dtype", dtype, "--output", str(tmp_path / "hf")]
    assert convert(["export", "--checkpoint", str(root), *flags]) == 0
    wanted = hugging_face(state, f"average/{kind}/")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == (torch.bfloat16 if dtype == "keep" else torch.float32)
        assert value.equal(wanted[name].to(value.dtype)), name


def test_averages_of_two_runs_are_merged(run, tmp_path):
    one, state = run
    averages, extra = random_averages(12)
    two = checkpoint(tmp_path / "two", random_state(2) | averages, extra=extra).parent
    flags = ["--values", "ema", "--dtype", "fp32", "--weights", "0.25,0.75", "--output", str(tmp_path / "out")]
    assert merge([str(one), str(two), *flags]) == 0
    reader = CheckpointReader(next((tmp_path / "out").glob("iter_*")), verify=True)
    assert all(key.startswith("model/") for key in reader.entries) and "averages" not in reader.manifest.extra
    for key in reader.entries:
        of = key.replace("model/", "average/ema/")
        wanted = (0.25 * state[of].double() + 0.75 * averages[of].double()).float()
        assert reader.read(key).equal(wanted), key
    told = json.loads((reader.path / "hf" / PROVENANCE).read_text())
    assert told["values"] == "ema"


def test_a_task_vector_of_an_average_begins_at_the_weights_of_its_base(run, tmp_path):
    root, state = run
    base = random_state(3)
    begun = checkpoint(tmp_path / "base", base, step=0).parent
    flags = ["--method", "task-arithmetic", "--base", str(begun), "--values", "window", "--scale", "1"]
    assert merge([str(root), *flags, "--dtype", "fp32", "--output", str(tmp_path / "out")]) == 0
    reader = CheckpointReader(next((tmp_path / "out").glob("iter_*")))
    for key in reader.entries:
        torch.testing.assert_close(reader.read(key), state[key.replace("model/", "average/window/")])


def test_one_average_alone_is_its_copy(run, tmp_path):
    root, state = run
    assert merge([str(root), "--values", "ema", "--output", str(tmp_path / "out")]) == 0
    reader = CheckpointReader(next((tmp_path / "out").glob("iter_*")))
    for key in reader.entries:
        assert reader.read(key).equal(state[key.replace("model/", "average/ema/")].bfloat16()), key


def test_the_optimizers_average_leaves_the_averages_of_the_weights_out(run, tmp_path):
    assert merge([str(run[0]), "--optimizer", "average", "--output", str(tmp_path / "out")]) == 0
    reader = CheckpointReader(next((tmp_path / "out").glob("iter_*")))
    assert "averages" not in reader.manifest.extra and not any(key.startswith("average/") for key in reader.entries)


def test_what_does_not_go_with_an_average_is_refused(run, tmp_path, capsys):
    root, _ = run
    plain = checkpoint(tmp_path / "plain", random_state(2)).parent
    out = ["--output", str(tmp_path / "out")]
    assert merge([str(root), "--values", "ema", "--optimizer", "average", *out]) == 2
    assert "belongs to the weights, not to their average" in capsys.readouterr().err
    assert merge([str(root), "--values", "ema", "--examples", "few.jsonl", *out]) == 2
    assert "losses are those of the weights" in capsys.readouterr().err
    assert merge([str(root), str(plain), "--values", "ema", *out]) == 4
    assert "holds no average ema, but no average of the weights" in capsys.readouterr().err
    assert convert(["export", "--checkpoint", str(plain), "--values", "window", *out]) == 4
    text = capsys.readouterr().err
    assert str(plain) in text and "--average-window-steps" in text
    assert not (tmp_path / "out").exists()


def test_an_inspection_shows_them(run, capsys):
    assert inspect([str(run[0])]) == 0
    text = capsys.readouterr().out
    assert "average   ema: decay 0.9, since 0, updates 10" in text
    assert "average   window: first 6, last 10, averaged 5" in text
    assert "average/ema 0." in text and "average/window 0." in text

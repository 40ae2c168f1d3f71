"""What a run reads, through the real command over real files: longer, with another batch, from a checkpoint of the
release before."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_telechat.checkpoint.manifest import read_manifest
from megatron_telechat.checkpoint.names import MANIFEST
from megatron_telechat.cli import build_index
from tests.data.material import write_dataset
from tests.harness import LaunchResult, launch
from tests.training.runs import DENSE
from tests.training.test_resume import PRETRAIN, records

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Two small sources; 6 steps of 8 samples fit into an epoch of each, 12 do not."""
    folder = tmp_path_factory.mktemp("data")
    data = ["3", write_dataset(folder / "a", 28, 1), "1", write_dataset(folder / "b", 9, 2)]
    base = [flag for flag in DENSE if flag != "--mock-data"]
    base[base.index("--vocab-size") + 1] = "512"
    return [*base, "--split", "1", "--data-path", *data, "--data-cache-path", str(folder / "cache")]


def train(flags: list[str], run_dir: Path, iters: int, *more: str, nproc: int = 2) -> LaunchResult:
    return launch(PRETRAIN, nproc, *flags, "--train-iters", str(iters), "--run-dir", str(run_dir), *more, timeout=240)


def epochs(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"train: .* = ([\d.]+) epochs", output)]


@pytest.mark.slow
def test_a_run_made_longer_reads_what_the_long_run_reads_and_then_takes_another_batch(flags, tmp_path):
    whole = train(flags, tmp_path / "whole", 12).ok()
    short = train(flags, tmp_path / "run", 6).ok()
    assert max(epochs(short.stdout)) < 1 < max(epochs(whole.stdout))
    longer = train(flags, tmp_path / "run", 12).ok()
    assert epochs(longer.stdout) == epochs(whole.stdout)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    # One rank more or less, half the batch: the steps to come are counted from what was consumed.
    halved = train(flags, tmp_path / "run", 14, "--global-batch-size", "4", nproc=1).ok()
    assert "done: 14 steps" in halved.stdout
    assert [records(tmp_path / "run")[step][3] for step in (12, 13, 14)] == [96, 100, 104]


@pytest.mark.slow
def test_a_checkpoint_that_names_no_order_goes_on_in_megatrons(flags, tmp_path, capsys):
    """Written by the release before: the order follows from its own length and batch, whatever those of the run are
    now."""
    whole = train([*flags, "--data-order", "megatron"], tmp_path / "whole", 12, nproc=1).ok()
    assert "order: Megatron's for 96 of train samples" in whole.stdout
    train([*flags, "--data-order", "megatron"], tmp_path / "run", 12, "--exit-interval", "5", nproc=1).ok()
    folder = tmp_path / "run" / "checkpoints" / "iter_0000005"
    forget_order(folder)
    resumed = train(flags, tmp_path / "run", 16, nproc=1).ok()
    assert "order: Megatron's for 96 of train samples" in resumed.stdout
    found = records(tmp_path / "run")
    assert {step: found[step] for step in range(1, 13)} == records(tmp_path / "whole") and max(found) == 16
    # The order stays with the run, and the tools see it too.
    assert read_manifest(tmp_path / "run" / "checkpoints" / "iter_0000016").extra["sample_order"] == {
        "version": 1,
        "kind": "megatron",
        "built_for": {"train": 96},
    }
    command = [*flags, "--train-iters", "16", "--run-dir", str(tmp_path / "run")]
    assert build_index.main(command) == 0
    said = capsys.readouterr().out
    assert "there already" in said and "128 of them read by step 16" in said and "order: Megatron's for 96" in said


def forget_order(folder: Path) -> None:
    """Make the manifest one of the release before."""
    manifest = read_manifest(folder)
    extra = {name: value for name, value in manifest.extra.items() if name != "sample_order"}
    config = "".join(line for line in manifest.config.splitlines(keepends=True) if "data_order" not in line)
    assert len(extra) < len(manifest.extra) and len(config) < len(manifest.config)
    (folder / MANIFEST).write_bytes(replace(manifest, extra=extra, config=config).to_bytes())


def test_samples_that_end_early_are_an_error_and_no_end_of_iteration():
    import torch

    from megatron_telechat.errors import DataError
    from megatron_telechat.training.step import forward_step

    with pytest.raises(DataError, match="the samples end before the run"):
        forward_step(torch.device("cpu"), iter(()), torch.nn.Identity())

"""launch/finetune.sh is the published job: a Hugging Face folder and dialogs in, the losses of a plain loop, a Hugging
Face folder out; killed and started again it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_telechat.data import build_datasets
from tests.data.chat_material import chat_run, letters_tokenizer, numbered, write_lines
from tests.data.material import Rank
from tests.harness import ROOT
from tests.huggingface.folders import telechat_config, telechat_shapes
from tests.training.published_loop import LossScale, published_losses

pytestmark = pytest.mark.gloo

SEQ, BATCH, PEAK = 64, 4, 1e-3
SMALL = f"--device cpu --seq-length {SEQ} --lr {PEAK} --log-interval 1 --no-progress".split()


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A tiny random model with a tokenizer, as published folders are laid out."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    letters_tokenizer(folder)
    config = telechat_config(8, 4, layers=4, head_dim=8, vocab_size=288, training_seqlen=SEQ, base_seqlen=SEQ)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.ones(shape)
        if "layernorm" in name or "ln_f" in name
        else torch.randn(shape, generator=generator) / 16
        for name, shape in telechat_shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory) -> str:
    return write_lines(tmp_path_factory.mktemp("dialogs") / "d.jsonl", numbered(165))


def command(hf: Path, output: Path, dialogs: str, *flags: str) -> list[str]:
    return ["bash", str(ROOT / "launch" / "finetune.sh"), str(hf), str(output), dialogs, *SMALL, *flags]


def finetune(hf: Path, output: Path, dialogs: str, *flags: str, ranks: int = 1) -> str:
    """The script to its end; its output."""
    environment = {**os.environ, "NPROC": str(ranks), "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(hf, output, dialogs, *flags), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(output: Path) -> list[dict]:
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lr" in record]


def rows(tmp_path: Path, dialogs: str, tokenizer: Path, steps: int) -> list[list[int]]:
    """Token ids of the packed rows; how packing lays them out is shown in tests/data/test_packing.py."""
    run = chat_run(tmp_path, dialogs, seq_length=SEQ, tokenizer=str(tokenizer), seed=42, gbs=BATCH, iters=steps)
    source = build_datasets(run, Rank()).train.source
    return [source.tokens(sample).tolist() for sample in range(steps * BATCH)]


def require_published(hf: Path, output: Path, said: str, dialogs: str, tmp_path: Path, with_frame: bool, scale) -> None:
    """The losses of a finished job are those of the published loop, and its weights are where it says."""
    ours = records(output)
    steps = len(ours)
    assert steps >= 20 and f"{steps} steps: 1 epoch" in said
    held = None if scale is None else LossScale(*scale)
    theirs = published_losses(hf, rows(tmp_path, dialogs, hf, steps), BATCH, steps, PEAK, with_frame, held)
    assert [record["loss"] for record in ours[:20]] == pytest.approx([loss for loss, _ in theirs[:20]], rel=1e-4)
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.3
    if scale is not None:
        scales = [record["loss_scale"] for record in ours]
        assert scales == [value for _, value in theirs] and len(set(scales)) > 3
    assert said.splitlines()[-1] == f"weights: {output}/hf"
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, output / "hf"))
    assert before.keys() == after.keys() and not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert (output / "hf" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


FP32 = ("--fp32", "--save-interval", "4")


@pytest.fixture(scope="module")
def whole(hf, dialogs, tmp_path_factory) -> tuple[Path, str]:
    """A job on one rank that nothing disturbs: its folder and its output."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, finetune(hf, output, dialogs, *FP32)


def test_the_losses_are_those_of_the_published_loop(hf, dialogs, whole, tmp_path):
    require_published(hf, *whole, dialogs, tmp_path, True, None)


JOBS = {
    "answers_alone": (1, "--fp32 --sft-loss-mask answer", False, None),
    "fp16": (1, "--loss-scale-window 4 --initial-loss-scale 64", True, (64.0, 4)),
    "tp2_pp2": (4, "--fp32 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", True, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_so_are_those_of_another_mask_precision_or_layout(hf, dialogs, tmp_path, name):
    ranks, flags, with_frame, scale = JOBS[name]
    said = finetune(hf, tmp_path / "out", dialogs, *flags.split(), ranks=ranks)
    require_published(hf, tmp_path / "out", said, dialogs, tmp_path, with_frame, scale)


@pytest.mark.slow
def test_a_killed_job_goes_on(hf, dialogs, whole, tmp_path):
    environment = {**os.environ, "NPROC": "1", "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "killed"
    killed = subprocess.Popen(
        command(hf, output, dialogs, *FP32), start_new_session=True, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not any((output / "run" / "checkpoints").glob("iter_" + 7 * "[0-9]")):  # committed, not under way
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = finetune(hf, output, dialogs, *FP32)
    assert "there already" in again and "resumed from" in again
    found, expected = ({one["step"]: one["loss"] for one in records(folder)} for folder in (output, whole[0]))
    assert found == expected
    a, b = (load_file(folder / "hf" / "model.safetensors") for folder in (whole[0], output))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_mistakes_are_told_before_anything_is_imported(hf, dialogs, tmp_path):
    def refused(*words: str) -> str:
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "finetune.sh"), *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        return done.stdout + done.stderr

    assert "HF_FOLDER OUTPUT DATA" in refused(str(hf))
    assert "holds no config.json" in refused(str(tmp_path), str(tmp_path / "out"), dialogs)
    assert not (tmp_path / "out").exists()

"""launch/finetune.sh --dpo: a Hugging Face folder and pairs in, one that prefers the chosen answers out; killed at any
time and started again it is the same job."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.chat_material import letters_tokenizer, write_lines
from tests.harness import ROOT
from tests.huggingface.folders import telechat_config, telechat_shapes

pytestmark = [pytest.mark.gloo, pytest.mark.slow]

SEQ = 96
FLAGS = (
    f"--dpo --device cpu --fp32 --seq-length {SEQ} --lr 2e-3 --log-interval 1 --no-progress --save-interval 4 "
    "--split 90,10 --eval-interval 8 --eval-iters 2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model, and pairs whose chosen answers have other letters than the rejected ones."""
    folder = tmp_path_factory.mktemp("dpo_job")
    letters_tokenizer(folder / "hf")
    config = telechat_config(8, 4, layers=4, head_dim=8, vocab_size=288, training_seqlen=SEQ, base_seqlen=SEQ)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.ones(shape) if "norm" in name or "ln_f" in name else torch.randn(shape, generator=generator) / 12
        for name, shape in telechat_shapes(config).items()
    }
    save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    letters = random.Random(7)
    lines = [
        {
            "prompt": f"q{n}",
            "chosen": "".join(letters.choices("abcd", k=letters.randint(4, 20))),
            "rejected": "".join(letters.choices("wxyz", k=letters.randint(4, 20))),
        }
        for n in range(300)
    ]
    write_lines(folder / "pairs.jsonl", lines)
    return folder


def command(folder: Path, output: Path, *flags: str) -> list[str]:
    words = [str(folder / "hf"), str(output), str(folder / "pairs.jsonl")]
    return ["bash", str(ROOT / "launch" / "finetune.sh"), *words, *FLAGS, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "NPROC": "2", "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def job(folder: Path, output: Path, *flags: str) -> str:
    done = subprocess.run(
        command(folder, output, *flags), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(folder: Path, output: Path, is_time) -> None:
    """Start the job, and kill every process of it."""
    started = subprocess.Popen(
        command(folder, output), start_new_session=True, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not is_time():
        assert started.poll() is None, "the job ended before it was killed"
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def by_step(output: Path) -> dict[int, dict]:
    lines = map(json.loads, (output / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: {key: line[key] for key in ("loss", "reward_margin")} for line in lines if "lr" in line}


def tables(cache: Path) -> dict[str, bytes]:
    """What the cache holds of the reference, without what a kill left half written."""
    found = cache.glob("dpo-*/log_probs.npy")
    return {str(table): table.read_bytes() for table in found if ".partial-" not in table.parent.name}


def test_a_job_that_is_killed_is_the_job_that_is_not(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    planned = job(folder, whole, "--dry-run")
    assert "are computed before the first step: a forward over every pair, about a quarter" in planned
    said = job(folder, whole)
    assert "log-probabilities of 300 pairs computed in" in said
    steps = by_step(whole)
    last = [line for line in said.splitlines() if "validation loss" in line][-1]
    assert steps[1]["loss"] == pytest.approx(0.6931, abs=1e-3) and "accuracy 100.0%" in last
    assert "its log-probabilities are in" in job(folder, whole, "--dry-run")

    cache = killed / "run" / "cache"
    # While the reference is asked or what it said is written; then in the middle of the training.
    kill_when(folder, killed, lambda: any(cache.glob("dpo-*")))
    kill_when(folder, killed, lambda: (killed / "run" / "checkpoints" / "latest").exists())
    before = tables(cache)
    assert len(before) == 1
    again = job(folder, killed)
    assert "resumed from" in again and "log-probabilities of 300 pairs from" in again
    assert tables(cache) == before
    assert by_step(killed) == steps
    a, b = (load_file(output / "hf" / "model.safetensors") for output in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()

"""The real command: exit codes, no traceback, no torch, and a fraction of a second."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_telechat

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "pretrain" / "pretrain_telechat2.py"
LIMIT_CPU_S = 1.0
"""Processor time, which a busy machine does not stretch; importing torch alone takes more."""


def command(*argv: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    return subprocess.run(
        [sys.executable, str(DOOR), *argv],
        capture_output=True,
        text=True,
        cwd="/",
        env={**clean, **environ},
        timeout=60,
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--preset telechat2-7b --pipeline-model-parallel-size 4 --dry-run", "Et*7|t*8|t*8|t*7L"),
        ("--preset telechat2-7", "did you mean telechat2-7b?"),
        ("--tensor-model-parralel-size 2", "did you mean --tensor-model-parallel-size?"),
        ("--config /nowhere/run.yaml", "No such file"),
        ("", "no model"),
    ],
)
def test_refused_in_a_fraction_of_a_second(argv: str, expected: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*argv.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert expected in done.stderr and done.stderr.startswith("config error:")
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT_CPU_S


@pytest.mark.heavy
@pytest.mark.parametrize(
    "argv", ["--preset telechat2-7b --lr x", "--help", "--preset telechat2-39b-a12b --print-config"]
)
def test_nothing_heavy_is_imported(argv: str) -> None:
    code = (
        "import sys; from megatron_telechat.cli.pretrain import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'numpy', 'megatron.core', 'transformers') if name in sys.modules], "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.mark.heavy
def test_only_the_first_rank_speaks() -> None:
    first = command("--preset", "nope", RANK="0", WORLD_SIZE="2")
    second = command("--preset", "nope", RANK="1", WORLD_SIZE="2")
    assert first.returncode == second.returncode == 2
    assert first.stderr and not second.stderr


@pytest.mark.heavy
def test_information() -> None:
    done = command("--help")
    assert done.returncode == 0
    for part in ("--tensor-model-parallel-size N", "--preset NAME", "telechat2-39b-a12b", "optimizer: ", "--bf16"):
        assert part in done.stdout
    assert command("--version").stdout.strip() == f"megatron_telechat {megatron_telechat.__version__}"
    assert "telechat2-tiny-moe" in command("--list-presets").stdout


@pytest.mark.heavy
def test_print_config() -> None:
    done = command("--preset", "telechat2-tiny", "--lr", "1e-3", "--print-config")
    assert done.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["lr"].split() == ["lr:", "0.001", "#", "flag"]
    assert lines["hidden_size"].endswith("# preset telechat2-tiny")
    assert lines["expert_model_parallel_size"].endswith("# derived")
    assert lines["adam_eps"].endswith("# default")


@pytest.mark.heavy
def test_printed_yaml_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(command("--preset", "telechat2-tiny", "--mock-data", "--print-config=yaml").stdout)
    again = command("--config", str(path), "--print-config=yaml")
    assert again.returncode == 0 and again.stdout == path.read_text()


@pytest.mark.heavy
def test_notes_come_with_the_refusal() -> None:
    done = command("--preset", "telechat2-tiny", "--swiglu", "--lr", "x", "--mock-data")
    assert "note: --swiglu: nothing to do" in done.stderr and "--lr is 'x'" in done.stderr


@pytest.mark.heavy
def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {DOOR} --help | head -1"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr and done.stdout.startswith("torchrun")

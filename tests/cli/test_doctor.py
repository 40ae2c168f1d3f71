"""The doctor answers quickly, tells apart what only looks right, and says how to fix it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_telechat.backend.core_versions import LINES, PYTHON_OF_NEWEST, TRANSFORMER_ENGINE, condition_here
from megatron_telechat.cli.doctor import PACKAGES

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str, python: tuple[str, ...] = (), path: Path | None = None, **env: str):
    environment = {**os.environ, **env}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *python, str(ROOT / "tools" / "doctor.py"), *arguments],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name + " "))


@pytest.mark.heavy
def test_here_everything_required_is_there():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = doctor()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    for name in ("Python", "torch", "megatron-core", "gloo", "NCCL", "NPU, HCCL", "NVIDIA apex", "free disk"):
        assert row(done.stdout, name)
    assert done.stdout.rstrip().endswith("ready to train")


@pytest.mark.heavy
def test_a_bare_python_gets_the_lines_that_mend_it():
    done = doctor(python=("-S",))
    assert done.returncode == 2
    assert done.stderr == ""
    assert 'torch: pip install "torch>=2.10"' in done.stdout
    assert f'megatron-core: pip install "megatron-core{condition_here()}"' in done.stdout
    assert "bash launch/setup_env.sh" in done.stdout
    assert "not ready: torch" in done.stdout


@pytest.mark.heavy
def test_one_cuda_queue_is_told_where_there_is_a_gpu(tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB'\n")
    fake.chmod(0o755)
    gpu = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = doctor(**gpu, CUDA_DEVICE_MAX_CONNECTIONS="1").stdout
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in row(told, "CUDA queues") and "unset CUDA_DEVICE_MAX_CONNECTIONS" in told
    assert "CUDA queues" not in doctor(**gpu, CUDA_DEVICE_MAX_CONNECTIONS="8").stdout
    assert "CUDA queues" not in doctor(CUDA_DEVICE_MAX_CONNECTIONS="1").stdout, "no GPU, no matter"


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.heavy
def test_an_old_version_is_not_enough(tmp_path):
    distribution(tmp_path, "torch", "2.4.1")
    distribution(tmp_path, "megatron_core", "0.17.0")
    done = doctor(path=tmp_path)
    assert done.returncode == 2
    assert "2.4.1, needs >=2.10" in row(done.stdout, "torch")
    assert f"0.17.0, needs {condition_here()}" in row(done.stdout, "megatron-core")


@pytest.mark.heavy
@pytest.mark.parametrize("version", ["0.16.1", "0.19.2", "0.19.7"])
def test_both_lines_of_megatron_core_are_good(tmp_path, version):
    distribution(tmp_path, "megatron_core", version)
    assert version in row(doctor(path=tmp_path).stdout, "megatron-core") and doctor(path=tmp_path).returncode == 0


@pytest.mark.heavy
def test_the_apex_of_pypi_is_not_nvidias(tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    done = doctor(path=tmp_path)
    assert done.returncode == 0
    assert "another project" in row(done.stdout, "NVIDIA apex")
    assert "pip uninstall -y apex" in done.stdout


@pytest.mark.heavy
def test_transformer_engine_without_its_torch_part_would_break_megatron(tmp_path):
    distribution(tmp_path, "transformer_engine", "2.4.0")
    done = doctor(path=tmp_path)
    assert done.returncode == 2
    assert "importing megatron-core fails" in row(done.stdout, "transformer-engine")
    assert "pip uninstall -y transformer-engine" in done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("version, read", [("2.4.0", True), ("2.20.2", True), ("2.21.0", False), ("2.3.0", False)])
def test_a_transformer_engine_that_nobody_has_read_is_told(tmp_path, version, read):
    distribution(tmp_path, "transformer_engine", version)
    (tmp_path / "transformer_engine_torch.py").write_text("raise RuntimeError('must not be imported')")
    done = doctor(path=tmp_path)
    assert done.returncode == 0
    line = row(done.stdout, "transformer-engine")
    assert version in line and (f"read were {TRANSFORMER_ENGINE}" in line) != read
    assert (f'"transformer-engine[pytorch]{TRANSFORMER_ENGINE}"' in done.stdout) != read


@pytest.mark.heavy
def test_a_gpu_with_a_cpu_build_of_torch_is_told(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    done = doctor(path=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "H100" in row(done.stdout, "CUDA") and "CPU build" in row(done.stdout, "CUDA")
    assert "download.pytorch.org" in done.stdout
    (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    done = doctor(path=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "torch for CUDA 12.8" in row(done.stdout, "CUDA")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.distribution)
def test_versions_are_those_of_the_package(package):
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'"{re.escape(package.distribution + package.needs)}["; ]', pyproject), package


def test_each_python_of_the_package_gets_its_megatron_core():
    pyproject = (ROOT / "pyproject.toml").read_text()
    older, newer = LINES.values()
    newest = ".".join(map(str, PYTHON_OF_NEWEST))
    assert f"\"megatron-core{older}; python_version < '{newest}'\"" in pyproject
    assert f"\"megatron-core{newer}; python_version >= '{newest}'\"" in pyproject

"""Every named fix is needed: with all of them its probe passes, without it alone the probe fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_telechat.backend import mcore_fixes
from megatron_telechat.backend.core_versions import LINES, condition_here, installed_line, line_of
from megatron_telechat.backend.triton_guard import triton_present
from megatron_telechat.errors import ConfigError
from tests.harness import ROOT

LINE = installed_line()
BY_NAME = {fix.name: fix for fix in mcore_fixes.FIXES if LINE in fix.lines}
"""Of the megatron-core that is installed; `tests/run.sh --core` runs this file on the other line."""


@pytest.fixture(scope="module")
def endings() -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fix_probes.py"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["fix"]: line for line in lines}


@pytest.mark.gloo
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_probe_passes_with_all_fixes(endings, name):
    assert endings[name]["with_all"] == ""


@pytest.mark.gloo
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_probe_fails_without_its_fix(endings, name):
    import torch

    if torch.cuda.is_available():
        pytest.skip("with a CUDA device torch.cuda works, so that leaving a fix out is not an error")
    if name == "triton" and triton_present():
        pytest.skip("triton is installed, so that nothing has to stand in for it")
    assert endings[name]["without"] != ""


def test_every_fix_says_why_and_for_which_versions():
    for fix in mcore_fixes.FIXES:
        assert len(fix.reason) > 20
        assert fix.lines and set(fix.lines) <= set(LINES)
        assert fix.when in ("always", "te_absent", "triton_absent") or set(fix.when) <= {"cpu", "npu", "cuda"}


def applied(backend: str, te: bool, line: str) -> list[str]:
    return [fix.name for fix in mcore_fixes.FIXES if fix.applies(backend, te, line)]


def test_cuda_with_transformer_engine_gets_almost_none(monkeypatch):
    monkeypatch.setattr(mcore_fixes, "triton_present", lambda: True)
    assert applied("cuda", True, "0.16") == ["quiet"]
    assert applied("cuda", False, "0.16") == ["quiet", "router_gemm", "clipping"]
    assert applied("cuda", True, "0.19") == ["quiet"]
    assert applied("cuda", False, "0.19") == ["quiet", "clipping"]


def test_npu_relies_on_torch_npu_for_the_rest(monkeypatch):
    monkeypatch.setattr(mcore_fixes, "triton_present", lambda: False)
    expected = ["hide_gpu_packages", "clipping", "eager_jit", "rng_restore", "tensor_type", "split_sizes"]
    assert applied("npu", False, "0.16") == ["quiet", "router_gemm", *expected]
    assert applied("npu", False, "0.19") == ["quiet", "triton", *expected]


def test_the_documentation_gives_every_fix_with_its_versions():
    rows = [line.split("|") for line in (ROOT / "docs" / "backend.md").read_text().splitlines() if line[:3] == "| `"]
    told = {row[1].strip(" `"): row[2].strip() for row in rows}
    for fix in mcore_fixes.FIXES:
        assert told.get(fix.name) == ("both" if fix.lines == tuple(LINES) else ", ".join(fix.lines)), fix.name


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("0.16.1", "0.16"), ("0.16.0", None), ("0.16.2", None), ("0.17.1", None), ("0.18.2", None), ("0.19.1", None),
        ("0.19.2", "0.19"), ("0.19.3", "0.19"), ("0.20.0", None), ("1.19.2", None),
    ],
)  # fmt: skip
def test_versions_that_are_known(version, line):
    assert line_of(version) == line


def test_other_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.17.0")
    with pytest.raises(ConfigError, match=r"0\.17\.0.*==0\.16\.1 or >=0\.19\.2,<0\.20") as caught:
        installed_line()
    assert f'pip install "megatron-core{condition_here()}"' in str(caught.value)


def test_each_python_gets_the_newest_line_that_pip_installs_on_it():
    assert condition_here((3, 11)) == "==0.16.1" and condition_here((3, 12)) == ">=0.19.2,<0.20"


def test_missing_megatron_core_is_named(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="not installed"):
        installed_line()


def test_broken_transformer_engine_is_named(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("no CUDA core")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    with pytest.raises(ConfigError, match="does not load: no CUDA core"):
        mcore_fixes.transformer_engine_present()


def test_only_megatron_core_sees_the_changes():
    import torch

    from megatron_telechat.backend import get_backend

    before = torch.cuda.current_device, torch.zeros, torch.Tensor.type
    backend = get_backend("cpu")
    names = backend.install()
    assert backend.install() == names == tuple(fix.name for fix in mcore_fixes.applied_fixes())
    assert (torch.cuda.current_device, torch.zeros, torch.Tensor.type) == before
    # A module that nobody imported before, and one of the first imported.
    from megatron.core import utils
    from megatron.core.transformer import multi_token_prediction as late

    for module in (utils, late):
        assert module.torch is not torch
        assert module.torch.Tensor is torch.Tensor
        assert module.torch.cuda.current_device() == torch.device("cpu")


def test_one_backend_a_process():
    import torch

    from megatron_telechat.backend import get_backend

    get_backend("cpu").install()
    with pytest.raises(ConfigError, match="already runs on cpu"):
        mcore_fixes.apply_fixes("cuda", torch.device("cuda", 0))

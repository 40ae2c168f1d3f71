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
from megatron_telechat.errors import ConfigError
from tests.harness import ROOT

BY_NAME = {fix.name: fix for fix in mcore_fixes.FIXES}


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
    assert endings[name]["without"] != ""


def test_every_fix_says_why_and_for_which_version():
    for fix in mcore_fixes.FIXES:
        assert len(fix.reason) > 20
        assert fix.version == mcore_fixes.MCORE_VERSION
        assert fix.when in ("always", "te_absent") or set(fix.when) <= {"cpu", "npu", "cuda"}


def test_cuda_with_transformer_engine_gets_almost_none():
    assert [fix.name for fix in mcore_fixes.FIXES if fix.applies("cuda", te_present=True)] == ["quiet"]
    assert [fix.name for fix in mcore_fixes.FIXES if fix.applies("cuda", te_present=False)] == ["quiet", "router_gemm", "clipping"]


def test_npu_relies_on_torch_npu_for_the_rest():
    names = [fix.name for fix in mcore_fixes.FIXES if fix.applies("npu", te_present=False)]
    expected = ["quiet", "router_gemm", "clipping", "hide_gpu_packages", "eager_jit", "rng_restore", "tensor_type", "split_sizes"]
    assert names == expected


def test_the_documentation_names_every_fix():
    text = (ROOT / "docs" / "backend.md").read_text()
    assert [name for name in BY_NAME if f"`{name}`" not in text] == []


def test_other_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.17.0")
    with pytest.raises(ConfigError, match=r"0\.17\.0.*0\.16\.1") as caught:
        mcore_fixes.check_version()
    assert "pip install megatron-core==0.16.1" in str(caught.value)


def test_missing_megatron_core_is_named(monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="not installed"):
        mcore_fixes.check_version()


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

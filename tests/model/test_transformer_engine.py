"""Our calls of Transformer Engine, and megatron-core's for us, against the signatures of its releases.

Transformer Engine needs a GPU; its signatures do not. `te_facts` is a table of them. Held to it are, in every run,

* the grouped product of the experts' weight gradients (`moe.te_products`), called for each release;
* the calls of megatron-core's wrappers, which are imported on a stand-in of the package and build and run the real
  model in a process of their own (`worker_te.py`), with the oldest and the newest release; each call is then bound to
  every release.

Where sources are at hand, the table is held to them:

    MEGATRON_TELECHAT_TE_SOURCES=/folder python -m pytest tests/model/test_transformer_engine.py

The folder has one folder a release, ``2.4.0/transformer_engine/`` and so on. To fill it:

    for v in 2.4.0 2.20.2; do pip download --no-deps -d wheels transformer-engine==$v; done
    for f in wheels/*.whl; do unzip -q "$f" 'transformer_engine/*' -d "$(basename "$f" | cut -d- -f2)"; done
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_telechat.backend.core_versions import TRANSFORMER_ENGINE, numbers, satisfies
from megatron_telechat.moe import te_products
from tests.harness import launch
from tests.model import te_facts

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = te_facts.RELEASES[0], te_facts.RELEASES[-1]


def sources() -> Iterator[tuple[str, Path]]:
    """Release and folder of every release whose sources are at hand."""
    named = os.environ.get("MEGATRON_TELECHAT_TE_SOURCES")
    for folder in sorted(Path(named).iterdir(), key=lambda path: numbers(path.name)) if named else ():
        if (folder / "transformer_engine").is_dir():
            yield folder.name, folder


def test_the_range_is_what_was_read():
    assert all(satisfies(release, TRANSFORMER_ENGINE) for release in te_facts.RELEASES)
    major, minor, _ = numbers(NEWEST)
    assert satisfies(f"{major}.{minor}.99", TRANSFORMER_ENGINE) and not satisfies(
        f"{major}.{minor + 1}.0", TRANSFORMER_ENGINE
    )
    assert not satisfies("2.3.9", TRANSFORMER_ENGINE)
    assert f'"transformer-engine[pytorch]{TRANSFORMER_ENGINE}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not list(sources()), reason="MEGATRON_TELECHAT_TE_SOURCES names no folder of releases")
@pytest.mark.heavy
def test_the_table_is_what_the_sources_say():
    wrong = []
    for release, folder in sources():
        for name in te_facts.SIGNATURES:
            said, found = te_facts.parameters(name, release), te_facts.read_signature(folder, name)
            if said != found:
                wrong.append(f"{release} {name}: table {said!r}, source {found!r}")
        for module in te_facts.NAMES:
            has = te_facts.read_names(folder, module)
            said = te_facts.names_of(module, release)
            wrong += [f"{release} {module}: no {name}" for name in sorted(said - has)]
            gone = {name for name, (_, until) in te_facts.NAMES[module].items() if until is not None} - said
            wrong += [f"{release} {module}: still {name}" for name in sorted(gone & has)]
        recipe = (folder / "transformer_engine/common/recipe/__init__.py").read_text(encoding="utf-8")
        if not re.search(r"^from pydantic.dataclasses import dataclass$", recipe, re.MULTILINE):
            wrong.append(f"{release} recipes: no pydantic dataclasses, so that other keywords are an error")
    assert wrong == []


def stand_in(release: str, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    """The modules that `te_products` imports, with the functions that this release has."""

    def general_grouped_gemm(*args: Any, **kwargs: Any) -> None:
        given = te_facts.signature("general_grouped_gemm", release).bind(*args, **kwargs).arguments
        calls.append(given)
        assert given["layout"] == "NT" and given["grad"] and given["use_split_accumulator"]
        for x, y, out in zip(given["A"], given["B"], given["out"], strict=True):
            out.copy_(y.float().t() @ x.float() + (out if given["accumulate"] else 0))

    def workspaces() -> list[torch.Tensor]:
        return [torch.empty(8) for _ in range(4)]

    general_grouped_gemm.__signature__ = te_facts.signature("general_grouped_gemm", release)  # type: ignore[attr-defined]
    functions = {"general_grouped_gemm": general_grouped_gemm, "get_multi_stream_cublas_workspace": workspaces}
    for module in ("", ".pytorch", ".pytorch.cpp_extensions", ".pytorch.module", ".pytorch.module.base"):
        made = ModuleType(f"transformer_engine{module}")
        for name in te_facts.names_of(module[1:], release) if module[1:] in te_facts.NAMES else ():
            made.__dict__[name] = functions.get(name)
        monkeypatch.setitem(sys.modules, made.__name__, made)


@pytest.mark.parametrize("release", te_facts.RELEASES)
def test_the_grouped_product_is_called_as_the_release_takes_it(release, monkeypatch):
    calls: list[dict[str, Any]] = []
    stand_in(release, monkeypatch, calls)
    te_products._check(te_products._product(), torch.device("cpu"), torch.bfloat16)
    assert len(calls) == 2 and all(len(call["A"]) == len(call["m_splits"]) == 3 for call in calls)
    assert ("workspaces" in calls[0]) == (numbers(release) < (2, 10, 0))
    assert calls[0].get("quantization_params") == ([None] * 3 if numbers(release) >= (2, 11, 0) else None)


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def report(request) -> dict[str, Any]:
    """What the model made of megatron-core's wrappers called, and what it computed."""
    worker = Path(__file__).with_name("worker_te.py")
    done = subprocess.run(
        [sys.executable, str(worker), request.param], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.heavy
def test_the_calls_of_the_wrappers_fit_every_release(report):
    wanted = {"Linear.__init__", "Linear.forward", "DotProductAttention.__init__", "DotProductAttention.forward"}
    assert wanted | {"FusedAdam.__init__"} <= set(report["calls"])
    wrong = []
    for name, calls in report["calls"].items():
        for release in te_facts.RELEASES:
            if te_facts.parameters(name, release) is None or name == "general_gemm":
                continue  # megatron-core looks whether the work space is there; bound to its own release already
            for count, keywords in calls:
                try:
                    te_facts.signature(name, release).bind(*range(count), **dict.fromkeys(keywords))
                except TypeError as error:
                    wrong.append(f"{release} {name}: {error}")
    assert wrong == []


@pytest.mark.heavy
def test_the_model_on_the_wrappers_is_the_model_on_torch(report):
    assert report["optimizer"] == ["FusedAdam"]
    for model in ("dense", "moe"):
        assert report[model]["loss"] < 1e-5 and report[model]["gradient"] < 1e-4, (model, report[model])
    assert report["quiet"], "FP8 without being asked"


@pytest.mark.gloo
@pytest.mark.parametrize("release", [pytest.param(OLDEST, marks=pytest.mark.slow), NEWEST])
def test_the_attention_over_ranks_of_the_wrappers_is_ours(release):
    """The stand-in's ring holds its rows in the order that the real one wants; loss and gradients are those of ours."""
    done = launch(Path(__file__).with_name("worker_te.py"), 2, release, timeout=240, fresh=True).ok()
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    for model in ("dense", "moe"):
        assert report[model]["loss"] < 1e-5 and report[model]["gradient"] < 1e-4, (model, report[model])
    for count, keywords in report["calls"]["DotProductAttention.__init__"]:
        assert "cp_group" in keywords
        for each in te_facts.RELEASES:
            te_facts.signature("DotProductAttention.__init__", each).bind(*range(count), **dict.fromkeys(keywords))


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_is_in_every_product_of_the_wrappers_and_in_every_pass(report, recipe):
    """Also in the second pass of a recomputed layer, which the backward runs outside of megatron-core's block; and no
    longer than the block."""
    found = report["fp8"][recipe]
    # two micro-batches; a dense layer has four products, one with experts two, those of the attention
    assert found["products"] == 2 * (4 + 2)
    assert found["outside"] == [] and found["left"] is False
    assert found["different"] == [], "a recomputed layer gives other gradients"
    assert 0 < found["bf16"] < 0.05, "FP8 rounds"


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_step_in_fp8_sees_the_weights_of_this_step(report, recipe):
    assert report["fp8"][recipe]["steps"] == [True, True]


@pytest.mark.heavy
def test_what_the_delayed_recipe_ignores_is_known(report):
    """megatron-core hands these on; Transformer Engine 2 drops them without a word (`--no-fp8-wgrad` is refused)."""
    assert report["ignored"] == ["device", "override_linear_precision", "params_dtype"]
    assert {"DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"} <= set(report["calls"])

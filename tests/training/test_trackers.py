"""Trackers: each is imported when asked for, goes on after a crash, and ends no run. The stand-ins have the signatures
of the packages named beside them, so that a call these would refuse fails here."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_telechat.config.schema import LoggingConfig, RunConfig
from megatron_telechat.errors import ConfigError
from megatron_telechat.training import tolerance
from megatron_telechat.training.writers import MetricsWriter

Calls = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(tolerance, "_warned", set())
    for name in ("MLFLOW_TRACKING_URI", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)


def mlflow_like(calls: Calls) -> ModuleType:
    """mlflow 3.17 (and 2.14): what a run uses of it."""
    module = ModuleType("mlflow")

    def set_tracking_uri(uri):
        calls.append(("uri", uri))

    def set_experiment(experiment_name=None, experiment_id=None):
        calls.append(("experiment", experiment_name))

    def start_run(
        run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None, description=None,
        log_system_metrics=None,
    ):  # fmt: skip
        calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc"))

    def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
        assert all(type(value) in (int, float) for value in metrics.values()) and isinstance(step, int)
        calls.append(("log", step, metrics["loss"]))

    def end_run(status="FINISHED"):
        calls.append(("end",))

    for function in (set_tracking_uri, set_experiment, start_run, log_metrics, end_run):
        setattr(module, function.__name__, function)
    return module


def swanlab_like(calls: Calls) -> ModuleType:
    """swanlab 0.10: what a run uses of it."""
    module = ModuleType("swanlab")

    class Run:
        id = "k2j3h4"

        def log(self, data, step=None):
            assert isinstance(step, int)
            calls.append(("log", step, data["loss"]))

        def finish(self, state="success", error=None):
            calls.append(("end",))

    def init(
        *, reinit=None, log_dir=None, mode=None, workspace=None, project=None, public=None, name=None, color=None,
        description=None, job_type=None, group=None, tags=None, id=None, resume=None, parallel=None, config=None,
        settings=None, callbacks=None,
    ):  # fmt: skip
        assert mode in ("disabled", "online", "local", "offline") and resume in (None, "must", "allow", "never")
        calls.append(("start", project, name, mode, id, resume, log_dir))
        return Run()

    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    return module


def crash_and_resume(folder, run: RunConfig) -> None:
    """Steps 1 and 2, killed; resumed from step 1."""
    for step, last in ((0, 2), (1, 3)):
        writer = MetricsWriter(run, folder, True, step)
        for number in range(step + 1, last + 1):
            writer.write({"step": number, "loss": number / 2, "mfu": None, "note": "text"})
        writer.write({"event": "stage", "step": last})
        writer.close()


LOGGED = [("log", 1, 0.5), ("log", 2, 1.0), ("end",)], [("log", 2, 1.0), ("log", 3, 1.5), ("end",)]


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    calls: Calls = []
    monkeypatch.setitem(sys.modules, "mlflow", mlflow_like(calls))
    crash_and_resume(tmp_path, RunConfig(logging=LoggingConfig(mlflow_experiment="pretraining")))
    opened = [("uri", f"sqlite:///{tmp_path}/mlflow.db"), ("experiment", "pretraining")]
    name = tmp_path.name
    assert calls == [*opened, ("start", None, name), *LOGGED[0], *opened, ("start", "abc", name), *LOGGED[1]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    MetricsWriter(RunConfig(logging=LoggingConfig(mlflow_experiment="p", mlflow_run_name="n")), tmp_path / "x", True)
    assert calls[-3:] == [("uri", "http://tracking:5000"), ("experiment", "p"), ("start", None, "n")]


def test_swanlab_goes_on_with_its_run_where_its_cloud_can(tmp_path, monkeypatch):
    calls: Calls = []
    monkeypatch.setitem(sys.modules, "swanlab", swanlab_like(calls))
    online = ("start", "p", "n", "online")
    crash_and_resume(tmp_path, RunConfig(logging=LoggingConfig(swanlab_project="p", swanlab_exp_name="n")))
    place = str(tmp_path / "swanlog")
    first, second = (*online, None, None, place), (*online, "k2j3h4", "allow", place)
    assert calls == [first, *LOGGED[0], second, *LOGGED[1]]
    MetricsWriter(RunConfig(logging=LoggingConfig(swanlab_project="p", swanlab_mode="offline")), tmp_path, True)
    assert calls[-1] == ("start", "p", tmp_path.name, "offline", None, None, place)


@pytest.mark.parametrize("field, package", [("mlflow_experiment", "mlflow"), ("swanlab_project", "swanlab")])
def test_a_missing_package_names_the_line_to_install(tmp_path, monkeypatch, field, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install \"megatron_telechat\[{package}\]\""):
        MetricsWriter(RunConfig(logging=LoggingConfig(**{field: "p"})), tmp_path, enabled=True)


@pytest.mark.parametrize("when", ["start_run", "log_metrics", "end_run"])
def test_a_tracker_that_fails_is_one_warning(tmp_path, monkeypatch, capfd, when):
    """And is not asked again: each try would wait for the network."""
    calls: Calls = []
    module = mlflow_like(calls)

    def fail(*arguments, **keywords):
        calls.append(("failed",))
        raise RuntimeError("the server is gone\nmore lines")

    setattr(module, when, fail)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    run = RunConfig(logging=LoggingConfig(mlflow_experiment="p"))
    writer = MetricsWriter(run, tmp_path, True)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "MLflow could not be written" in said and "the server is gone" in said
    assert calls.count(("failed",)) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("loss") == 3


@pytest.mark.heavy
@pytest.mark.parametrize("package", ["mlflow", "swanlab"])
def test_the_stand_ins_have_the_signatures_of_the_packages(package):
    """Where the real one is installed: every parameter of the stand-in is one of it, of the same kind."""
    real = pytest.importorskip(package)
    stand_in = {"mlflow": mlflow_like, "swanlab": swanlab_like}[package]([])
    for name, function in vars(stand_in).items():
        if inspect.isfunction(function):
            theirs = inspect.signature(getattr(real, name)).parameters
            ours = inspect.signature(function).parameters
            assert {key: one.kind for key, one in ours.items()}.items() <= {
                key: one.kind for key, one in theirs.items()
            }.items(), name

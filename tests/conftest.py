"""Markers, and what ``--fast`` leaves out. Signals are a terminal's.

``slow`` is deselected by pytest.ini, ``gpu`` is skipped where there is no CUDA device. ``--fast`` deselects ``gloo``,
``gpu``, ``slow`` and ``heavy``; the tests without any of these are *light*. Two rules keep that true:

* a light test that starts a process fails, in every run;
* in a whole run with ``--fast`` a light test that computes longer than `LIGHT_SECONDS` fails.

With workers side by side (pytest-xdist) the files with the longest tests come first, so that all workers end together.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_telechat.backend.triton_guard import let_core_import_without_triton

# Tests import megatron.core without a backend, too.
let_core_import_without_triton()

NOT_LIGHT = ("gloo", "gpu", "slow", "heavy")
LIGHT_SECONDS = 3.0
"""Largest CPU time of a light test with its fixtures: CPU time, so that a busy machine fails nothing."""
STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}

_began = pytest.StashKey[float]()
_light_test: str | None = None
"""The light test that runs now."""


@pytest.fixture(scope="session", autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Ctrl-C and a closed terminal reach what a test starts, also where the suite itself runs in the background of a
    script: there both are ignored, and every process would inherit that."""
    ignored = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the tests that start no process and take no time")


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_refuse_processes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if not is_light(item)])
        items[:] = [item for item in items if is_light(item)]
    if hasattr(config, "workerinput"):
        items[:] = longest_files_first(items)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def is_light(item: pytest.Item) -> bool:
    """Whether ``--fast`` runs this test."""
    return not any(item.get_closest_marker(name) for name in NOT_LIGHT)


def longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files with tests of several ranks, then those with other processes, then light ones; each file in one piece."""
    weights: dict[Path, int] = {}
    for item in items:
        weight = 2 if item.get_closest_marker("gloo") else 0 if is_light(item) else 1
        weights[item.path] = max(weight, weights.get(item.path, 0))
    return sorted(items, key=lambda item: -weights[item.path])


def is_whole(config: pytest.Config) -> bool:
    """Whether no test was named: the process that was started knows, and tells its workers."""
    if hasattr(config, "workerinput"):
        return config.workerinput["whole"]
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist, before it starts a worker."""
    node.workerinput["whole"] = is_whole(node.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _light_test
    _light_test = item.nodeid if is_light(item) else None
    item.stash[_began] = time.process_time()
    try:
        return (yield)
    finally:
        _light_test = None


def _refuse_processes(event: str, args: tuple[Any, ...]) -> None:
    if event in STARTS_A_PROCESS and _light_test is not None:
        # No Exception, so that no `except Exception` of the code under test hides it.
        pytest.fail(f"starts a process ({event} {args[:1]}): mark it @pytest.mark.heavy, so that --fast leaves it out")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if item.config.getoption("--fast") and is_whole(item.config) and report.when == "teardown" and report.passed:
        seconds = time.process_time() - item.stash[_began]
        if seconds > LIGHT_SECONDS:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} computed {seconds:.1f} s, a light test may {LIGHT_SECONDS:g} s: make it shorter, or "
                f"mark it @pytest.mark.heavy"
            )
    return report

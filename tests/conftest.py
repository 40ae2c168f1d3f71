"""Markers: ``slow`` is deselected by pytest.ini, ``gpu`` is skipped where there is no CUDA device. Signals are a
terminal's."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megatron_telechat.backend.triton_guard import let_core_import_without_triton

# Tests import megatron.core without a backend, too.
let_core_import_without_triton()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

"""Batches lie where the device reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_telechat.backend.cpu import CpuBackend
from megatron_telechat.data import batches
from megatron_telechat.device_kinds import DEVICE_KINDS
from megatron_telechat.training.step import read_by_device
from tests.data.material import Rank
from tests.data.test_loader import loader_run, numbered


@pytest.mark.parametrize("pins", [True, False])
def test_batches_are_put_where_the_device_reads_them(tmp_path, pins):
    class Device(CpuBackend):
        traits = replace(DEVICE_KINDS["cpu"], pins_uploads=pins)

        def pinned(self, tensor):
            return tensor + 1

    with batches(numbered(), loader_run(tmp_path, 2), Rank(), 0) as iterator:
        read_by_device([iterator, None, iter(())], Device(0))
        assert next(iterator)["tokens"][0, 0].item() == pins

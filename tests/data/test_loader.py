"""The order of micro-batches: the same samples in a step for every data-parallel and micro-batch size."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from megatron_telechat.data import batches, build_datasets
from megatron_telechat.data.samples import TokenDataset
from megatron_telechat.errors import DataError
from tests.data.material import Rank, make_run, with_training, write_dataset

GBS, STEPS = 16, 5


class Numbered:
    """Sample i is i, i, i, ...: batches tell which samples they hold."""

    def __init__(self, size, bad=None):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def tokens(self, sample):
        if sample == self.bad:
            raise OSError("Stale file handle")
        return np.full(5, sample, np.int64)

    def cuts(self, sample):
        return np.empty(0, np.int64)

    def marks(self, sample):
        return None

    def origin(self, sample):
        return "numbered.bin"


def numbered(size=GBS * STEPS, **options):
    return TokenDataset(Numbered(size, **options), size, 10_000)


def loader_run(tmp_path, mbs, num_workers=1):
    return make_run(tmp_path, mbs=mbs, gbs=GBS, iters=STEPS, mock_data=True, num_workers=num_workers)


def steps_of(tmp_path, dp, mbs, consumed=0, num_workers=1):
    """For each optimizer step the set of sample ids over all ranks, gathered in the order Megatron defines."""
    run = loader_run(tmp_path, mbs, num_workers)
    by_rank = []
    for rank in range(dp):
        with batches(numbered(), run, Rank(dp_rank=rank, dp_size=dp), consumed) as iterator:
            by_rank.append([batch["tokens"][:, 0].tolist() for batch in iterator])
    count = GBS // (mbs * dp)
    assert all(len(mine) % count == 0 for mine in by_rank)
    return [
        list(
            itertools.chain.from_iterable(by_rank[rank][micro] for micro in range(at, at + count) for rank in range(dp))
        )
        for at in range(0, len(by_rank[0]), count)
    ]


@pytest.mark.parametrize("dp,mbs", [(1, 1), (1, 4), (1, 16), (2, 1), (2, 2), (2, 8), (4, 1), (4, 4)])
def test_samples_of_a_step_do_not_depend_on_the_layout(tmp_path, dp, mbs):
    assert steps_of(tmp_path, dp, mbs) == [list(range(at, at + GBS)) for at in range(0, GBS * STEPS, GBS)]


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_resume_goes_on_exactly_in_another_layout(tmp_path, step):
    whole = steps_of(tmp_path, 1, 2)
    assert steps_of(tmp_path, 4, 2, consumed=step * GBS) == whole[step:]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_threads_changes_nothing(tmp_path, workers):
    assert steps_of(tmp_path, 2, 2, num_workers=workers) == steps_of(tmp_path, 1, 16)


def test_real_batches_stack_the_samples(tmp_path):
    prefix = write_dataset(tmp_path / "d", 100)
    run = make_run(tmp_path, data_path=(prefix,), iters=3, mbs=2, gbs=8)
    data = build_datasets(run, Rank()).train
    with batches(data, run, Rank(dp_rank=1, dp_size=2), 8) as iterator:
        batch = next(iterator)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, 32))
    for row, sample in enumerate((10, 11)):
        for name in batch:
            assert torch.equal(batch[name][row], data[sample][name])


def test_a_part_of_a_step_is_not_given(tmp_path):
    run = loader_run(tmp_path, 2)
    assert sum(1 for _ in batches(numbered(GBS * 2 + 5), run, Rank(), 0)) == 16
    assert list(batches(numbered(), run, Rank(), GBS * STEPS)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_thread_is_raised_where_its_batch_is_asked_for(tmp_path, workers):
    iterator = batches(numbered(bad=6), loader_run(tmp_path, 2, workers), Rank(), 0)
    assert [next(iterator)["tokens"][0, 0].item() for _ in range(3)] == [0, 2, 4]
    with pytest.raises(DataError, match="Stale file handle.*numbered.bin"):
        next(iterator)
    iterator.close()


def test_close_stops_the_threads(tmp_path):
    before = threading.active_count()
    iterator = batches(numbered(), loader_run(tmp_path, 2, 3), Rank(), 0)
    next(iterator)
    iterator.close()
    assert threading.active_count() == before
    assert list(iterator) == []


def test_the_mock_stream_runs_through_the_same_loader(tmp_path):
    run = loader_run(tmp_path, 4)
    data = build_datasets(run, Rank()).train
    assert sum(batch["tokens"].shape[0] for batch in batches(data, run, Rank(), 0)) == GBS * STEPS
    longer = with_training(run, train_iters=2 * STEPS)
    assert torch.equal(build_datasets(longer, Rank()).train[7]["tokens"], data[7]["tokens"])


@pytest.mark.parametrize("workers", [0, 2])
def test_tensors_are_finished_by_the_thread_that_read_them(tmp_path, workers):
    seen = set()

    def finish(tensor):
        seen.add(threading.current_thread().name)
        return tensor + 1

    with batches(numbered(), loader_run(tmp_path, 2, workers), Rank(), 0) as iterator:
        iterator.finish_with(finish)
        assert [next(iterator)["tokens"][0, 0].item() for _ in range(3)] == [1, 3, 5]
    assert all(name.startswith("batches") == bool(workers) for name in seen)

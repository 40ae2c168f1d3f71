"""The order of the samples does not depend on how long a run is meant to be: random runs, stopped, changed and gone on
with."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from megatron_telechat.data import Progress, batches, build_datasets, resumed_order, samples_needed
from megatron_telechat.data.indexed import epochs
from megatron_telechat.data.order import MEGATRON, SampleOrder
from megatron_telechat.errors import CheckpointError, ConfigError, DataError
from tests.data.chat_material import chat_run, numbered, write_lines
from tests.data.material import Rank, make_run, with_training, write_dataset
from tests.data.slow_samples import blended, endless, surplus
from tests.data.test_blend_properties import write_documents

pytestmark = pytest.mark.heavy

LENGTH = 16


@pytest.fixture(autouse=True)
def many_files(monkeypatch):
    """A few hundred samples a file: the runs of these tests cross several borders."""
    monkeypatch.setattr(epochs, "STRETCH_SAMPLES", 300)


@dataclass(frozen=True)
class Leg:
    """A part of a run between two starts."""

    train_iters: int
    batch: int
    micro_batch: int
    dp: int
    stop: int
    """The step after which it is killed, its checkpoint saved."""


def legs(rng: random.Random) -> list[Leg]:
    found, step = [], 0
    for _ in range(rng.randint(2, 5)):
        dp, micro_batch = rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
        iters = step + rng.randint(1, 40)
        step = rng.randint(step + 1, iters)
        found.append(Leg(iters, dp * micro_batch * rng.randint(1, 6), micro_batch, dp, step))
    return found


def read(run, leg: Leg, progress: Progress) -> tuple[list[list[int]], Progress]:
    """The samples that the ranks of a leg read, in order, and what its checkpoint tells."""
    run = with_training(run, train_iters=leg.train_iters, global_batch_size=leg.batch, micro_batch_size=leg.micro_batch)
    made = build_datasets(run, Rank(), progress)
    ranks = [
        batches(made.train, run, Rank(dp_rank=r, dp_size=leg.dp), progress.consumed_samples) for r in range(leg.dp)
    ]
    steps = leg.stop - progress.steps
    micro_batches = steps * (leg.batch // (leg.dp * leg.micro_batch))
    rows = []
    for _ in range(micro_batches):
        for rank in ranks:
            batch = next(rank)
            rows += [
                [*row, last]
                for row, last in zip(batch["tokens"].tolist(), batch["labels"][:, -1].tolist(), strict=True)
            ]
    for rank in ranks:
        rank.close()
    saved = json.loads(json.dumps(made.order.saved()))
    consumed = progress.consumed_samples + steps * leg.batch
    return rows, Progress(leg.stop, consumed, resumed_order(run, saved, run, "a checkpoint"))


def sources_and_weights(tmp_path, rng: random.Random):
    count = rng.randint(1, 4)
    prefixes = [str(tmp_path / f"d{n}") for n in range(count)]
    documents = [write_documents(prefix, rng) for prefix in prefixes]
    weights = [rng.choice([0.01, 0.3, 1.0, 2.5]) * rng.uniform(0.5, 1.5) for _ in prefixes]
    path = prefixes if count == 1 else [str(x) for pair in zip(map(repr, weights), prefixes, strict=True) for x in pair]
    return tuple(path), documents, weights


def expected(
    documents, weights, count: int, seed: int, built_for: int | None = None
) -> Iterator[tuple[int, int, list[int]]]:
    """(source, epoch, tokens) of the first samples of the one endless order."""
    order = blended(weights, count)
    drawn = Counter(source for source, _ in order)
    if built_for is None:
        ours = [None] * len(weights)
    else:
        ours = [built_for] if len(weights) == 1 else surplus(weights, built_for)
    parts = [endless(d, range(len(d)), drawn[n], LENGTH, seed, ours[n]) for n, d in enumerate(documents)]
    return ((source, *parts[source][sample]) for source, sample in order)


def require_each_once_an_epoch(
    found: list[tuple[int, int, list[int]]], documents, first_epochs: dict | None = None
) -> None:
    """No sample of an epoch twice, and none missing of an epoch that is over."""
    for source, of_source in itertools.groupby(sorted(found, key=lambda entry: entry[:2]), key=lambda entry: entry[0]):
        by_epoch = {epoch: list(rows) for epoch, rows in itertools.groupby(of_source, key=lambda entry: entry[1])}
        tokens = sum(map(len, documents[source]))
        for epoch, rows in by_epoch.items():
            there = Counter(token for document in documents[source] for token in document)
            repeats = 1 if first_epochs is None or epoch else first_epochs[source]
            read_tokens = Counter(token for _, _, row in rows for token in row[:-1])
            # A sample may begin in the epoch before: that many tokens more, at most.
            assert sum(max(0, count - repeats * there[token]) for token, count in read_tokens.items()) <= LENGTH
            if epoch < max(by_epoch):
                assert len(rows) * LENGTH > repeats * tokens - 2 * LENGTH


@pytest.mark.parametrize("seed", range(16))
def test_a_run_reads_the_beginning_of_one_endless_order_however_it_is_stopped_and_changed(tmp_path, seed):
    rng = random.Random(seed)
    path, documents, weights = sources_and_weights(tmp_path, rng)
    run = make_run(tmp_path, seq_length=LENGTH, seed=seed, split="1", data_path=path)
    rows, progress = [], Progress()
    for leg in legs(rng):
        more, progress = read(run, leg, progress)
        rows += more
        assert len(rows) == progress.consumed_samples
    whole = list(expected(documents, weights, len(rows), seed))
    assert rows == [tokens for _, _, tokens in whole]
    require_each_once_an_epoch(whole, documents)


@pytest.mark.parametrize("seed", range(16))
def test_a_run_begun_in_megatrons_order_keeps_it_for_what_it_was_built_for_and_goes_on(tmp_path, seed):
    """Half of them through a checkpoint of the release before, which names no order: its configuration tells."""
    rng = random.Random(100 + seed)
    path, documents, weights = sources_and_weights(tmp_path, rng)
    run = make_run(tmp_path, seq_length=LENGTH, seed=seed, split="1", data_path=path, data_order="megatron")
    first, *later = legs(rng)
    rows, progress = read(run, first, Progress())
    if seed % 2:
        saved = with_training(run, train_iters=first.train_iters, global_batch_size=first.batch)
        run = replace(run, data=replace(run.data, data_order="epochs"))
        progress = replace(progress, order=resumed_order(run, {}, saved, "an old checkpoint"))
    for leg in later:
        more, progress = read(run, leg, progress)
        rows += more
    built_for = first.train_iters * first.batch
    whole = list(expected(documents, weights, len(rows), seed, built_for))
    assert rows == [tokens for _, _, tokens in whole]
    sizes = [built_for] if len(weights) == 1 else surplus(weights, built_for)
    joined = {n: -(-(size * LENGTH + 1) // sum(map(len, documents[n]))) for n, size in enumerate(sizes)}
    require_each_once_an_epoch(whole, documents, joined)


def test_one_epoch_is_in_megatrons_order_and_its_end_changes_nothing_before(tmp_path):
    prefix = write_dataset(tmp_path / "d", 90)
    run = make_run(tmp_path, data_path=(prefix,), split="1", gbs=1, mbs=1)
    theirs = make_run(tmp_path, data_path=(prefix,), split="1", gbs=1, mbs=1, iters=100, data_order="megatron")
    one = build_datasets(with_training(run, train_iters=100), Rank()).train
    many = build_datasets(with_training(run, train_iters=900), Rank()).train
    old = build_datasets(theirs, Rank()).train
    for sample in range(100):
        tokens = one[sample]["tokens"].tolist()
        assert tokens == many[sample]["tokens"].tolist() == old[sample]["tokens"].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_stretches_of_one_epoch_each_lose_less_than_a_sample_at_a_border(tmp_path, seed, monkeypatch):
    """A large source keeps an epoch in a file."""
    monkeypatch.setattr(epochs, "STRETCH_SAMPLES", 1)
    rng = random.Random(seed)
    documents = write_documents(tmp_path / "d", rng)
    tokens = sum(map(len, documents))
    run = make_run(tmp_path, seq_length=LENGTH, seed=seed, split="1", data_path=(str(tmp_path / "d"),), gbs=1, mbs=1)
    of_one = (tokens - 1) // LENGTH
    made = build_datasets(with_training(run, train_iters=3 * of_one), Rank()).train
    pieces = [[tuple(made.source.tokens(sample)) for sample in range(e * of_one, (e + 1) * of_one)] for e in range(3)]
    there = Counter(token for document in documents for token in document)
    for samples in pieces:
        once = Counter(token for sample in samples for token in sample[:-1])
        assert not once - there and there.total() - once.total() <= LENGTH
    assert len({tuple(samples) for samples in pieces}) == 3


def test_a_source_shorter_than_a_sample_is_read_again_and_again(tmp_path):
    prefix = write_dataset(tmp_path / "d", 2, longest=6)
    run = make_run(tmp_path, data_path=(prefix,), split="1", gbs=4, mbs=1, seq_length=64)
    short = build_datasets(with_training(run, train_iters=2), Rank()).train
    long = build_datasets(with_training(run, train_iters=100), Rank()).train
    assert [short[i]["tokens"].tolist() for i in range(8)] == [long[i]["tokens"].tolist() for i in range(8)]


@pytest.mark.parametrize("seed", range(6))
def test_dialogs_and_mock_data_too(tmp_path, seed):
    rng = random.Random(seed)
    if seed % 3 == 0:
        run = make_run(tmp_path, seq_length=LENGTH, mock_data=True)
    else:
        files = [
            write_lines(tmp_path / f"{n}.jsonl", numbered(rng.randint(5, 60), first=100 * n)) for n in range(seed % 3)
        ]
        path = files if len(files) == 1 else ["2", files[0], "0.7", files[1]]
        run = chat_run(tmp_path, *path, seq_length=40, sft_packing=seed != 5)
    rows, progress = [], Progress()
    parts = legs(rng)
    for leg in parts:
        more, progress = read(run, leg, progress)
        rows += more
    whole, _ = read(run, Leg(len(rows), 1, 1, 1, len(rows)), Progress())
    assert rows == whole


def test_what_is_evaluated_does_not_depend_on_the_training(tmp_path):
    prefix = write_dataset(tmp_path / "d", 100)
    run = make_run(tmp_path, data_path=(prefix,), split="80,20", eval_interval=5)
    few = build_datasets(run, Rank()).valid
    more = replace(
        with_training(run, train_iters=500, global_batch_size=24), evaluation=replace(run.evaluation, eval_iters=30)
    )
    many = build_datasets(more, Rank()).valid
    assert len(few) == 16 and len(many) == 720
    assert all(few[i]["tokens"].tolist() == many[i]["tokens"].tolist() for i in range(len(few)))


def test_samples_are_counted_from_what_was_consumed(tmp_path):
    run = make_run(tmp_path, mock_data=True, gbs=8, iters=100)
    assert samples_needed(run)[0] == 800
    half = with_training(run, global_batch_size=4)
    assert samples_needed(half, Progress(60, 480))[0] == 480 + 40 * 4
    assert samples_needed(half, Progress(100, 800))[0] == 800
    assert samples_needed(half, Progress(200, 1600))[0] == 1600


def test_data_that_is_read_once_must_last_for_what_was_read_and_what_is_to_come(tmp_path):
    prefixes = tuple(write_dataset(tmp_path / name, 60, seed) for seed, name in enumerate("ab"))
    run = make_run(tmp_path, data_path=prefixes, split="1", gbs=8, mbs=1, iters=1)
    with pytest.raises(DataError, match=r"ends before the run: (\d+) samples") as caught:
        build_datasets(with_training(run, train_iters=10_000), Rank())
    there = int(caught.value.problems[0].what.split(" samples")[0].rsplit(" ", 1)[1])
    # 10 steps of 8, then steps of 2 to the last sample: fewer than all steps of 8 would need, and one more is too many.
    last = 10 + (there - 80) // 2
    fits = with_training(run, train_iters=last, global_batch_size=2)
    train = build_datasets(fits, Rank(), Progress(10, 80, SampleOrder())).train
    assert len(train) == 80 + (last - 10) * 2 and last * 8 > there
    rows = [tuple(train.source.tokens(i)) for i in range(len(train))]
    assert len(set(rows)) == len(rows)
    with pytest.raises(DataError, match="ends before the run"):
        build_datasets(with_training(fits, train_iters=last + 1), Rank(), Progress(10, 80, SampleOrder()))


def test_an_order_that_is_not_known_or_cannot_be_given_is_refused(tmp_path):
    run = make_run(tmp_path, data_path=("d",))
    with pytest.raises(CheckpointError, match="does not say in which order"):
        resumed_order(run, {}, None, "here")
    allowed = replace(run, checkpoint=replace(run.checkpoint, allow_data_change=True))
    assert resumed_order(allowed, {}, None, "here") == SampleOrder()
    for bad in (
        {"version": 9, "kind": "epochs", "built_for": {}},
        {"version": 1, "kind": "new", "built_for": {}},
        {},
        3,
    ):
        with pytest.raises(CheckpointError, match="does not know"):
            resumed_order(run, {"sample_order": bad}, run, "here")
    megatrons = replace(run, data=replace(run.data, data_order="megatron"))
    with pytest.raises(ConfigError, match="began with data_order=epochs"):
        resumed_order(megatrons, SampleOrder().saved(), run, "here")
    begun = SampleOrder(MEGATRON, {"train": 320})
    assert resumed_order(run, begun.saved(), run, "here") == begun == resumed_order(megatrons, {}, run, "here")


def test_a_longer_run_builds_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(epochs, "STRETCH_SAMPLES", 1)
    prefixes = [write_dataset(tmp_path / name, 60, seed) for seed, name in enumerate("ab")]
    run = make_run(tmp_path, data_path=("1", prefixes[0], "2", prefixes[1]), split="1")
    build_datasets(run, Rank())
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    build_datasets(with_training(run, train_iters=41), Rank())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == before
    build_datasets(with_training(run, train_iters=400), Rank())
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert len(after) > len(before) and before.items() <= after.items()
    assert [path for path in folder.iterdir() if ".partial" in path.name] == []

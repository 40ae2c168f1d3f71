"""Blends against a slow plain reference: random weights, sizes, epochs, splits and data-parallel sizes."""

from __future__ import annotations

import itertools
import json
import random
import re

import numpy as np
import pytest

from megatron_telechat.data import batches, build_datasets
from megatron_telechat.data.indexed.dataset import IndexedWriter
from tests.data.material import VOCAB, Rank, make_run, with_training
from tests.data.slow_samples import blended, endless, flat_samples, surplus

SEEDS = range(12)
ORDERS = ("epochs", "megatron")


def write_documents(prefix, rng: random.Random) -> list[list[int]]:
    """Documents of a dataset of random size, empty ones and one far longer than a sample among them."""
    count = rng.randint(4, 60)
    documents = [[rng.randrange(3, VOCAB) for _ in range(rng.choice([0, 1, 2, 7, 30, 31, 90]))] for _ in range(count)]
    documents[rng.randrange(count)] = [rng.randrange(3, VOCAB) for _ in range(400)]
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in documents:
            writer.add_documents(np.array(document, np.int64), np.array([len(document)]), np.array([1]))
    return documents


def scene(tmp_path, seed: int, kind_of_order: str):
    """A random run, its datasets as lists, and the train samples that the reference gives."""
    rng = random.Random(seed)
    sources = [(str(tmp_path / f"d{n}"), write_documents(tmp_path / f"d{n}", rng)) for n in range(rng.randint(1, 5))]
    length, steps, batch = rng.choice([8, 17, 32]), rng.randint(2, 12), 8
    share = rng.choice([1.0, 0.9, 0.5])
    split = "1" if share == 1.0 else f"{share:g},{1 - share:g}"
    weights = [rng.choice([0.01, 0.3, 1.0, 2.5, 40.0]) * rng.uniform(0.5, 1.5) for _ in sources]
    numbers = [range(0, int(round(share * len(documents)))) for _, documents in sources]
    tokens = [sum(len(documents[n]) for n in chosen) for (_, documents), chosen in zip(sources, numbers, strict=True)]
    kind = rng.choice(["weights", "copies", "none"])
    options: dict = {"split": split, "data_order": kind_of_order}
    if kind == "copies":
        (tmp_path / "data.json").write_text(
            json.dumps({prefix: weight for (prefix, _), weight in zip(sources, weights, strict=True)})
        )
        options["data_json"] = str(tmp_path / "data.json")
        weights = [weight * size for weight, size in zip(weights, tokens, strict=True)]
    elif kind == "weights":
        options["data_path"] = tuple(
            str(x) for (prefix, _), weight in zip(sources, weights, strict=True) for x in (repr(weight), prefix)
        )
    else:
        options["data_path"] = tuple(prefix for prefix, _ in sources)
    size = steps * batch
    once = kind == "none" and len(sources) > 1
    if kind == "none":
        there = [len(flat_samples(d, c, None, length, seed)) for (_, d), c in zip(sources, numbers, strict=True)]
        if len(sources) > 1:
            steps = max(1, min(steps, sum(there) // batch))
            size = steps * batch
        wanted = [size] if len(sources) == 1 else [None] * len(sources)
        weights = [1.0] if len(sources) == 1 else there
    else:
        wanted = surplus(weights, size)
    run = make_run(tmp_path, seq_length=length, gbs=batch, mbs=8, iters=steps, seed=seed, **options)
    order = blended(weights, size)
    if kind_of_order == "megatron" or once:
        parts = [flat_samples(d, c, w, length, seed) for (_, d), c, w in zip(sources, numbers, wanted, strict=True)]
    else:
        drawn = [sum(source == number for source, _ in order) for number in range(len(sources))]
        parts = [
            [s for _, s in endless(d, c, n, length, seed)] for (_, d), c, n in zip(sources, numbers, drawn, strict=True)
        ]
    return run, order, [parts[source][sample] for source, sample in order], tokens


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_sample_is_that_of_the_plain_reference(tmp_path, seed, kind):
    run, order, expected, tokens = scene(tmp_path, seed, kind)
    made = build_datasets(run, Rank())
    found = [[*made.train[i]["tokens"].tolist(), int(made.train[i]["labels"][-1])] for i in range(len(made.train))]
    assert found == expected
    drawn = [sum(source == number for source, _ in order) for number in range(len(tokens))]
    told = [float(re.search(r"= ([\d.]+) epochs", line)[1]) for line in made.summary if line.startswith("train")]
    assert told == pytest.approx(
        [n * run.training.seq_length / size for n, size in zip(drawn, tokens, strict=True)], abs=0.006
    )


@pytest.mark.heavy
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_samples_at_every_data_parallel_size_from_any_step(tmp_path, seed):
    run, _, expected, _ = scene(tmp_path, seed, ORDERS[seed % 2])
    inputs = [sample[:-1] for sample in expected]
    train = build_datasets(run, Rank()).train
    rng = random.Random(seed)
    for dp, mbs in itertools.product((1, 2, 4), (1, 2)):
        other = with_training(run, micro_batch_size=mbs)
        consumed = 8 * rng.randint(0, run.training.train_iters - 1)
        by_rank = [list(batches(train, other, Rank(rank=r, dp_rank=r, dp_size=dp), consumed)) for r in range(dp)]
        rows = [row for micro in zip(*by_rank, strict=True) for batch in micro for row in batch["tokens"].tolist()]
        assert rows == inputs[consumed:]


@pytest.mark.parametrize("seed", range(40))
def test_shares_of_a_blend_are_never_more_than_one_sample_off(seed):
    from megatron_telechat.data.blending import _blend_order, samples_of_each

    rng = random.Random(seed)
    weights = [rng.uniform(1e-3, 1) ** rng.randint(1, 4) for _ in range(rng.randint(1, 9))]
    size = rng.randint(1, 700)
    source, sample = _blend_order(weights, size)
    assert list(zip(source.tolist(), sample.tolist(), strict=True)) == blended(weights, size)
    assert samples_of_each(weights, size) == surplus(weights, size)
    shares = np.array(weights) / sum(weights)
    for end in (1, size // 3, size // 2, size):
        taken = np.bincount(source[:end], minlength=len(weights))
        assert np.all(taken <= shares * end + 1 + 1e-9)

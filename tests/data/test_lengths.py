"""What a run reads where its samples change their length: every token of every document once an epoch, none twice."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_telechat.config.run_stages import Position, RunStage, RunStages, StageStart
from megatron_telechat.config.schema import ModelConfig, RunConfig
from megatron_telechat.data import batches, build_datasets, data_plan, progress_ahead, resumed_order
from megatron_telechat.data.indexed import epochs
from megatron_telechat.data.indexed.dataset import IndexedWriter
from megatron_telechat.data.sources import require_lasting
from megatron_telechat.errors import DataError
from tests.data.material import Rank, make_run, with_training
from tests.data.plain_lengths import PlainSource
from tests.data.slow_samples import blended, surplus

pytestmark = pytest.mark.heavy

VOCAB = 1 << 20
SEED = 77


def write_numbered(prefix, rng: random.Random, first: int, least: int = 1) -> list[list[int]]:
    """Documents of which every token is another number: a token says which document it is of, and where."""
    documents, at = [], first
    for _ in range(rng.randint(12, 30)):
        size = rng.randint(least, 90)
        documents.append(list(range(at, at + size)))
        at += size
    with IndexedWriter(str(prefix), np.int32) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def in_stages(run: RunConfig, *stages: tuple[int, int, int], iters: int, unit="tokens") -> RunStages:
    """Stages of (start, seq_length, batch)."""
    return RunStages(
        tuple(
            RunStage(
                number,
                StageStart(unit, start),
                with_training(run, seq_length=length, global_batch_size=batch, train_iters=iters),
            )
            for number, (start, length, batch) in enumerate(stages, 1)
        )
    )


@dataclass
class Reading:
    """A run that is read as the training reads it: stage after stage, through what a checkpoint keeps."""

    position: Position = Position()
    extra: dict | None = None
    saved: RunConfig | None = None

    def go_on(self, stages: RunStages, until: int) -> list[tuple[int, list[int]]]:
        """(length, tokens) of the samples to a step."""
        rows = []
        while self.position.step < until:
            stage = stages.at(self.position)
            order = resumed_order(stage.run, self.extra, self.saved, "a checkpoint") if self.extra else None
            span, progress = next(progress_ahead(stages, self.position, order))
            made = build_datasets(stage.run, Rank(), progress)
            last = min(until, span.end.step)
            assert len(made.train) == span.end.samples
            with batches(made.train, stage.run, Rank(), self.position.samples) as reader:
                for _ in range((last - self.position.step) * stage.run.training.global_batch_size):
                    batch = next(reader)
                    row = [*batch["tokens"][0].tolist(), int(batch["labels"][0, -1])]
                    assert row[1:] == batch["labels"][0].tolist()
                    rows.append((stage.run.training.seq_length, row))
            self.position = self.position.after(stage.run, last - self.position.step)
            self.extra, self.saved = json.loads(json.dumps(made.order.saved())), stage.run
        return rows


def base(tmp_path, path, **data) -> RunConfig:
    run = make_run(tmp_path, seed=SEED, mbs=1, gbs=1, split="1", data_path=path, **data)
    return replace(run, model=ModelConfig(vocab_size=VOCAB))


def times_read(rows) -> Counter[int]:
    return Counter(token for _, row in rows for token in row[:-1])


@pytest.mark.parametrize("moved", [False, True], ids=["as planned", "moved on the way"])
@pytest.mark.parametrize("kind", ["one", "blend", "once", "megatron", "megatron blend"])
@pytest.mark.parametrize("seed", range(3))
def test_two_switches_read_what_the_plain_reference_reads(tmp_path, monkeypatch, kind, moved, seed):
    """Three lengths, stopped and resumed around both switches; a stage that is moved leaves holes in what was read."""
    rng = random.Random(f"{seed} {kind}")
    monkeypatch.setattr(epochs, "STRETCH_SAMPLES", rng.choice([20, 10_000]))
    count = 1 if kind in ("one", "megatron") else 3
    prefixes = [str(tmp_path / f"d{number}") for number in range(count)]
    documents = [write_numbered(prefix, rng, 100_000 * n) for n, prefix in enumerate(prefixes)]
    weights = [rng.uniform(0.3, 2.0) for _ in prefixes]
    path = prefixes if kind in ("one", "once", "megatron") else [
        str(x) for pair in zip(map(repr, weights), prefixes, strict=True) for x in pair
    ]  # fmt: skip
    run = base(tmp_path, tuple(path), data_order="megatron" if "megatron" in kind else "epochs")
    lengths, batch = (8, 20, 52), (4, 2, 1)
    total = sum(len(document) for source in documents for document in source)
    # Within the first epoch, then across its end; what is read once must last.
    starts = [0, int(0.3 * total), int((0.5 if kind == "once" else 1.2) * total)]
    first, second, _ = in_stages(run, *zip(starts, lengths, batch, strict=True), iters=1000).spans()
    iters = second.end.step + (3 if kind == "once" else 12)
    stages, reading = in_stages(run, *zip(starts, lengths, batch, strict=True), iters=iters), Reading()
    if moved:
        # The second stage begins earlier than was planned: 5 steps of the first are never taken.
        rows = reading.go_on(stages, until=first.end.step - 5)
        stages = in_stages(run, *zip([0, starts[1] - 160, starts[2]], lengths, batch, strict=True), iters=iters)
    else:
        rows = reading.go_on(stages, until=first.end.step - 1)
        rows += reading.go_on(stages, until=first.end.step)
        rows += reading.go_on(stages, until=first.end.step + 1)
    rows += reading.go_on(stages, until=iters)
    legs = reading.extra["sample_order"]["legs"]
    assert [leg["seq_length"] for leg in legs] == list(lengths)
    expected = plain(documents, kind, weights, legs, reading.position.samples, run)
    assert rows == expected
    if kind == "once":
        assert max(times_read(rows).values()) == 1


def plain(documents, kind, weights, legs, total: int, run: RunConfig) -> list[tuple[int, list[int]]]:
    """The rows of the reference."""
    built_for = None
    if "megatron" in kind:
        first = legs[0]["ends"]
        built_for = [first] if len(documents) == 1 else surplus(weights, first)
    sources = [PlainSource(d, SEED, built_for[n] if built_for else None) for n, d in enumerate(documents)]
    left = [sum(map(len, source)) for source in documents]
    rows = []
    for number, leg in enumerate(legs):
        end = legs[number + 1]["begin"] if number + 1 < len(legs) else total
        size, length = end - leg["begin"], leg["seq_length"]
        shares = weights if kind != "once" else [(tokens - 1) // length for tokens in left]
        order = blended(shares, size) if len(documents) > 1 else [(0, at) for at in range(size)]
        drawn = Counter(source for source, _ in order)
        ends: list[int | None] = [None] * len(documents)
        if leg["ends"] is not None:
            asked = leg["ends"] - leg["begin"]
            meant = Counter(source for source, _ in blended(shares, asked)) if len(documents) > 1 else {0: asked}
            ends = [meant.get(n, 0) for n in range(len(documents))]
        parts = [s.read(length, drawn[n], ends[n], kind == "once") for n, s in enumerate(sources)]
        left = [tokens - drawn[n] * length for n, tokens in enumerate(left)]
        rows += [(length, parts[source][at]) for source, at in order]
    return rows


def test_as_planned_whole_documents_are_left_and_every_token_is_read_once(tmp_path):
    """The switches cut one document each; no token is read twice, and those that are not are the last ones."""
    documents = write_numbered(tmp_path / "d", random.Random(5), 0, least=40)
    total = sum(map(len, documents))
    run = base(tmp_path, (str(tmp_path / "d"),))
    starts = [(0, 8, 5), (total // 2, 40, 1), (total - 200, 120, 1)]
    stages = in_stages(run, *starts, iters=in_stages(run, *starts, iters=1000).spans()[-1].begin.step + 1)
    rows = Reading().go_on(stages, until=stages.train_iters)
    found = times_read(rows)
    missing = [token for document in documents for token in document if not found[token]]
    assert max(found.values()) == 1 and len(missing) == total - sum(len(row) - 1 for _, row in rows)
    joins = [
        (a, b) for length, row in rows if length > 8 for a, b in zip(row, row[1:], strict=False) if b != a + 1
    ]  # fmt: skip
    ends = {document[-1] for document in documents}
    assert joins and all(before in ends for before, _ in joins), "a document was cut where no stage begins"


def test_a_stage_that_was_not_planned_leaves_pieces_and_their_borders_are_told(tmp_path):
    """Half of the samples of an epoch in a random order leave holes: attention and positions end at them."""
    documents = write_numbered(tmp_path / "d", random.Random(6), 3, least=40)
    run = base(tmp_path, (str(tmp_path / "d"),), tokenizer_type="NullTokenizer", reset_attention_mask=True,
               reset_position_ids=True)  # fmt: skip
    plain_run = in_stages(run, (0, 8, 4), iters=40)
    reading = Reading()
    rows = reading.go_on(plain_run, until=20)
    stages = in_stages(run, (0, 8, 4), (640, 64, 1), iters=30)
    order = resumed_order(stages.stages[1].run, reading.extra, reading.saved, "here")
    _, progress = next(progress_ahead(stages, reading.position, order))
    made = build_datasets(stages.stages[1].run, Rank(), progress).train
    rows += reading.go_on(stages, until=30)
    assert max(times_read(rows).values()) == 1
    starts = {document[0] for document in documents}
    cuts = 0
    for sample in range(80, 90):
        batch = made.batch([sample])
        row, lengths = batch["tokens"][0].tolist(), batch["segment_lengths"].tolist()
        borders = set(np.cumsum([0, *lengths])[:-1].tolist())
        torn = {at for at in range(1, len(row)) if row[at] != row[at - 1] + 1 and row[at] not in starts}
        assert torn <= borders, "attention looks across a hole"
        cuts += len(torn)
        assert all(batch["position_ids"][0, at] == 0 for at in torn)
        assert all(batch["loss_mask"][0, at - 1] == 0 for at in torn)
    assert cuts > 3


def test_what_is_read_once_must_last_for_all_stages(tmp_path):
    prefixes = [str(tmp_path / name) for name in "ab"]
    documents = [write_numbered(prefix, random.Random(n), 10_000 * n) for n, prefix in enumerate(prefixes)]
    total = sum(len(document) for source in documents for document in source)
    run = base(tmp_path, tuple(prefixes))
    half = total // 2 // 8 * 8
    fits = in_stages(run, (0, 8, 1), (half, 32, 1), iters=half // 8 + (total - half) // 32 - 3)
    rows = Reading().go_on(fits, until=fits.train_iters)
    assert max(times_read(rows).values()) == 1
    longer = in_stages(run, (0, 8, 1), (half, 32, 1), iters=half // 8 + (total - half) // 32 + 1)
    with pytest.raises(DataError, match="ends before the run"):
        Reading().go_on(longer, until=longer.train_iters)
    # Before the first step, too, and exactly so.
    for stages in (fits, longer):
        ahead = [(span.stage.run, progress) for span, progress in progress_ahead(stages, Position(), None)]
        if stages is fits:
            require_lasting(data_plan(run.data), ahead)
            continue
        with pytest.raises(DataError, match="ends before the run.* of 32 tokens each"):
            require_lasting(data_plan(run.data), ahead)


def test_a_run_without_stages_that_is_told_another_length_goes_on_with_what_is_left(tmp_path):
    """--seq-length at a resume, with --allow-data-change."""
    documents = write_numbered(tmp_path / "d", random.Random(8), 0, least=40)
    run = base(tmp_path, (str(tmp_path / "d"),))
    reading = Reading()
    rows = reading.go_on(in_stages(run, (0, 8, 4), iters=100), until=10)
    longer = in_stages(run, (0, 64, 1), iters=10 + (sum(map(len, documents)) - 320) // 64 - 1)
    rows += reading.go_on(longer, until=longer.train_iters)
    assert [length for length, _ in rows].count(64) > 3 and max(times_read(rows).values()) == 1
    assert reading.extra["sample_order"]["legs"] == [
        {"seq_length": 8, "begin": 0, "ends": None},
        {"seq_length": 64, "begin": 40, "ends": None},
    ]


def test_mock_data_never_gives_a_sample_number_twice(tmp_path):
    run = make_run(tmp_path, mock_data=True, mbs=1)
    stages = in_stages(run, (0, 8, 4), (128, 32, 2), iters=10)
    reading = Reading()
    rows = reading.go_on(stages, until=10)
    assert [length for length, _ in rows] == [8] * 16 + [32] * 12
    assert len({tuple(row[:8]) for _, row in rows}) == len(rows)
    assert resumed_order(stages.stages[1].run, reading.extra, reading.saved, "x").tokens(28, 0) == 128 + 12 * 32

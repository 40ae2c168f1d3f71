"""The bench of attention over ranks runs, compares what it says it compares, and can fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from megatron_telechat.parallel.context.layout import fragments, work_of_ranks, zigzag
from tests.bench.doors import BENCH, bench

OURS = {"ours auto", "control", "Ulysses", "all-gather", "only-compute", "only-link"}
ONE_DOCUMENT = {"ours 1 piece", "ours 2 pieces", "ours 4 pieces", "ours keep", "zigzag ring", "TE ring",
                "torch all-gather", "torch all-to-all"}  # fmt: skip
PACKED = {
    "ours zigzag",
    "ours contiguous",
    "ours dealt",
    "ours documents",
    "per-document zigzag",
    "per-document TE",
    "ring of shards",
}


@pytest.fixture
def parts() -> Iterator[None]:
    """The parts of the bench can be imported."""
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(("flags", "arms"), [((), ONE_DOCUMENT), (("--packed",), PACKED)])
def test_arms_agree_and_take_turns(tmp_path, flags, arms):
    path = tmp_path / "context.json"
    done = bench("context_parallel.py", "--quick", "--stand-in", "5", "--json", str(path), *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert "STAND-IN" in report["mode"] and "STAND-IN" in done.stdout
    (row,) = report["rows"]
    assert OURS | arms == set(row["arms"])
    assert all(arm["total_ms"] > 0 for arm in row["arms"].values())
    for errors in report["errors_against_one_rank"].values():
        assert arms <= set(errors) and max(errors.values()) < 1e-5
    assert report["wire"]["counted"] == report["wire"]["formula"]
    assert report["errors"]["fp32"] < 1e-6 and report["errors"]["bf16"] < 1.25 * report["errors"]["bf16 one rank"]


def test_shards_hold_every_pair_once(parts):
    from context.balance import web_like
    from context.peers import blocks_with_shard, per_document_zigzag

    documents = web_like(512, 1, 8)[0]
    for layout in (zigzag(512, 4), per_document_zigzag(documents, 4)):
        cut = fragments(layout, documents)
        for rank, work in enumerate(work_of_ranks(layout, documents)):
            pairs = 0.0
            for other in range(4):
                for q0, q1, k0, k1 in blocks_with_shard(cut, rank, other):
                    pairs += (q1 - q0) * (k1 - k0) - (other == rank) * (q1 - q0) * (q1 - q0 - 1) / 2
            assert pairs == work
    # Equal halves of every document on each rank: as balanced as can be.
    assert np.ptp(work_of_ranks(per_document_zigzag(documents, 4), documents)) == 0


def test_rows_of_documents_end_where_they_should(parts):
    from context.balance import spread, web_like

    for ends in web_like(4096, 4, 16):
        assert ends[0] == 0 and ends[-1] == 4096
        assert all(stop > start and (stop - start) % 16 == 0 for start, stop in pairwise(ends.tolist()))
    found = spread(8192, 4)
    assert found["dealt"].worst < found["zigzag"].work and found["per document"].traffic == 1.0


def test_summary_and_floors(parts):
    from context.report import checks
    from context.summary import summary

    def runs(forward: float, backward: float) -> list[tuple[float, ...]]:
        return [(forward, backward, forward + backward, 0.0, 0)] * 3

    times = {
        "ours auto": runs(1.5, 2.5),
        "control": runs(3.0, 4.0),
        "zigzag ring": runs(2.0, 2.2),
        "torch all-gather": runs(4.0, 6.0),
        "only-compute": runs(1.0, 2.0),
        "only-link": runs(1.4, 2.2),
    }
    row = summary(times)
    ours = row["arms"]["ours auto"]
    assert row["ratio"] == pytest.approx(1.2) and ours["over_limit"] == pytest.approx(4.0 / 3.6)
    assert ours["hidden"] == pytest.approx((3.0 + 3.6 - 4.0) / 3.0)
    assert row["arms"]["control"]["over_auto"] == pytest.approx(7 / 4)
    row |= {"label": "row", "target_ratio": 1.2, "mbit": 100.0}
    report = {
        "rows": [row],
        "packed": False,
        "shape": {"ranks": 2},
        "stand_in_gflops": 60.0,
        "wire": {"counted": 102.0, "formula": 100.0, "counted keep": 50.0, "formula keep": 50.0},
        "errors": {"fp32": 2e-6, "bf16": 1.2e-3, "bf16 one rank": 1e-3},
        "balance": {"8": {"dealt": {"worst": 1.02}}},
    }
    verdicts = {check.what: check.ok for check in checks(report)}
    assert verdicts["row: time over max(computation, link)"] is False
    assert verdicts["row: the control misses that"] is True
    assert verdicts["row: zigzag ring over ours"] is False
    assert verdicts["row: torch all-gather over ours"] is True
    assert verdicts["wire bytes over the formula"] is False and verdicts["wire bytes keep over the formula"] is True
    assert verdicts["fp32: largest relative error to fp64, in 1e-6"] is False
    assert verdicts["bf16: error over the kernel's on one rank"] is True

"""What a run leaves open of its attention over ranks: measured once, within the memory there is, and then the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_cases

WORKER = Path(__file__).with_name("worker_context_auto.py")

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_cases(WORKER, 2, timeout=200, env={"AUTO_DIR": str(tmp_path_factory.mktemp("auto"))})


def test_what_arrives_is_kept_where_that_is_faster_and_fits(report):
    for found in report.check("what_arrives_is_kept_where_that_is_faster_and_fits"):
        for name in ("measured", "again", "bad"):
            assert found[name]["keep"] and found[name]["used"] == [[1, True]], name
        assert found["measured"]["measured"] == found["bad"]["measured"] == ["1", "1 kept"]
        assert "measured before" in found["again"]["about"]
        # what a person says stays; a checkpoint of before this was open fetched again, and goes on so
        for name in ("refused", "old", "no room"):
            assert not found[name]["keep"] and found[name]["used"] == [[1, False]], name
        assert found["refused"]["measured"] is None and found["old"]["measured"] is None
        assert found["no room"]["measured"] == ["1"] and "of a device, over 90%" in found["no room"]["about"]

"""What processes of a search say to each other arrives as it was, and nothing else is made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from megatron_telechat.planner import tasks, team  # they register their messages
from megatron_telechat.planner.messages import decode, encode
from megatron_telechat.planner.path_cuts import PathCut
from megatron_telechat.planner.relaxation import Node
from tests.planner.small_problems import small_problem


def test_messages_arrive_as_they_were():
    for seed in range(30):
        task = tasks.Task(small_problem(seed), math.inf, 7, 0.005, (PathCut(2, (0.1, 1 / 3)),), None, 1.5)
        assert decode(encode(task)) == task
    box = Node(0.1, 3, 4, np.array([0.1, 1 / 3]), np.array([math.inf, 2.0]), np.array([0, 1]), np.array([3, 9]))
    rows = (PathCut(1, (2.0,)), (np.array([1e-17, -0.0]), 0.7))
    found = team.Found(None, (box,), math.inf, 12, team.News(rows, None))
    back = decode(encode(found))
    assert (back.closed_bound, back.searched, back.current) == (math.inf, 12, None)
    assert back.news.rows[0] == rows[0] and back.news.rows[1][1] == 0.7
    assert back.news.rows[1][0].tobytes() == rows[1][0].tobytes()
    assert (back.nodes[0].bound, back.nodes[0].number, back.nodes[0].depth) == (0.1, 3, 4)
    for name in ("lo", "hi", "row_lo", "row_hi"):
        one, other = getattr(back.nodes[0], name), getattr(box, name)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


def test_only_what_is_registered_is_sent_or_made():
    @dataclass
    class Other:
        word: str

    with pytest.raises(AssertionError, match="Other is not registered"):
        encode(Other("x"))
    with pytest.raises(KeyError):
        decode(b'{"kind": "Popen", "args": ["true"]}')

"""How exact the attention over ranks is: against fp64, and in bf16 against what the kernel itself loses."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist

from context.arms import Arms
from context.balance import web_like
from context.problem import DTYPES, Problem, Result, in_fp64, largest, on_one_rank
from megatron_telechat.parallel.context.layout import dealt, zigzag

LENGTH, HEADS, GROUPS, WIDTH = 512, 4, 2, 64
PIECES = 2


def measure(ranks: int) -> dict[str, float]:
    """Largest relative error of output and gradients, of one document and of packed rows. Collective.

    Returns:
        fp32: of ours in fp32, against fp64.
        bf16, bf16 one rank: of ours, and of the same kernel on one rank, in bf16, against fp64.
    """
    found: dict[str, float] = {"fp32": 0.0, "bf16": 0.0, "bf16 one rank": 0.0}
    for ends in ((), tuple(web_like(LENGTH * ranks, 1, 2 * ranks)[0].tolist())):
        for dtype in ("fp32", "bf16"):
            ours, alone = _errors(ranks, ends, dtype)
            found[dtype] = max(found[dtype], ours)
            if dtype == "bf16":
                found["bf16 one rank"] = max(found["bf16 one rank"], alone)
    return found


def _errors(ranks: int, ends: tuple[int, ...], dtype: Literal["fp32", "bf16"]) -> tuple[float, float]:
    """Of ours over the ranks, and of the kernel on one rank."""
    length = LENGTH * ranks
    problem = Problem(length, HEADS, GROUPS, WIDTH, ranks, ends, dtype)
    exact = in_fp64(problem.inputs.to(DTYPES[dtype]), problem.documents)
    arms = Arms(problem, None)
    arm = arms.ours(PIECES, layout=dealt(problem.documents, ranks) if problem.packed else zigzag(length, ranks))
    expected = exact.of_rows(arm.positions)
    ours = _relative(arm.result(), expected)
    alone = on_one_rank(problem.inputs, problem.documents, arms.kernel).errors(exact)
    return ours, largest(alone)


def _relative(result: Result, expected: Result) -> float:
    """As `Result.errors`, over the rows of all ranks."""
    norms = torch.tensor(
        [
            [float((ours.double() - theirs).square().sum()), float(theirs.square().sum())]
            for ours, theirs in zip(result, expected, strict=True)
        ],
        dtype=torch.float64,
    )
    dist.all_reduce(norms)
    return float((norms[:, 0] / norms[:, 1]).sqrt().max())

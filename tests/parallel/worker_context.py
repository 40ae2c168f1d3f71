"""Attention over four ranks against one product in double precision: layouts, pieces, kept rows, types, heads."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.harness import Cases  # noqa: E402

LAYOUTS = ("zigzag", "contiguous", "dealt", "documents")
HEADS, GROUPS, WIDTH, LENGTH, ROWS = 4, 2, 16, 128, 2

cases = Cases()


def one_rank(parts, documents):
    """Output and gradients of one row in double precision."""
    import numpy as np
    import torch

    query, key, value, grad = parts
    document = torch.from_numpy(np.searchsorted(documents, np.arange(LENGTH), side="right"))
    seen = (document[:, None] == document) & torch.ones(LENGTH, LENGTH).tril().bool()
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    keys, values = (part.repeat_interleave(HEADS // GROUPS, 1) for part in leaves[1:])
    scores = torch.einsum("qhd,khd->hqk", leaves[0], keys) / WIDTH**0.5
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def one_rank_kernel_error(parts, documents, wanted, dtype) -> list[float]:
    """What the kernel of the CPU makes of each document on one rank, in this type."""
    import torch

    found = []
    for start, stop in zip(documents, documents[1:], strict=False):
        leaves = [part[start:stop].to(dtype).transpose(0, 1)[None].requires_grad_() for part in parts[:3]]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        grads = torch.autograd.grad(out, leaves, parts[3][start:stop].to(dtype).transpose(0, 1)[None])
        found.append([each[0].transpose(0, 1).double() for each in (out.detach(), *grads)])
    return [error(torch.cat(part), right) for part, right in zip(zip(*found, strict=True), wanted, strict=True)]


def error(found, wanted) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def material(seed: int, documents: int):
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(seed)
    counts = (HEADS, GROUPS, GROUPS, HEADS)
    parts = [torch.randn(ROWS, LENGTH, n, WIDTH, generator=generator, dtype=torch.float64) for n in counts]
    ends = []
    for row in range(ROWS):
        cuts = np.random.default_rng(seed + row).choice(np.arange(1, LENGTH), documents - 1, replace=False)
        ends.append(np.concatenate([[0], np.sort(cuts), [LENGTH]]))
    return parts, ends


def over_ranks(parts, plan, dtype, pieces: int, keep: bool):
    """Output and gradients of this rank's tokens, [t, heads, d] each; bytes sent."""
    import torch
    import torch.distributed as dist

    from megatron_telechat.backend.block_attention import block_attention
    from megatron_telechat.parallel.clock import ExchangeClock, PassClock
    from megatron_telechat.parallel.context.direct import Way, attend
    from megatron_telechat.parallel.context.exchange import Ring

    class Counting(Ring):
        sent = 0

        def start(self, rows, step, shape):
            self.sent += rows.numel() * rows.element_size()
            return super().start(rows, step, shape)

    at = torch.from_numpy(plan.positions)
    mine = [torch.cat([row[where] for row, where in zip(part, at, strict=True)]).to(dtype) for part in parts]
    leaves = [part.requires_grad_() for part in mine[:3]]
    ring, clock = Counting(dist.group.WORLD), ExchangeClock()
    passes = [PassClock(clock, None, late, torch.device("cpu")) for late in (False, True)]
    out = attend(*leaves, plan, Way(ring, block_attention(leaves[0]), pieces, keep, (passes[0], passes[1])))
    return [out.detach(), *torch.autograd.grad(out, leaves, mine[3])], at, ring.sent


@cases.case
def layouts() -> dict:
    """The worst error of each layout in fp32, over documents, pieces and kept rows; bytes on the wire beside the
    plan's."""
    import torch
    import torch.distributed as dist

    from megatron_telechat.parallel.context import plan as plans
    from megatron_telechat.parallel.context.layout import Costs
    from megatron_telechat.parallel.context.rows import RowSplit

    plans.LEAST_ROWS = 4
    worst = dict.fromkeys(LAYOUTS, 0.0)
    wire = set()
    for seed, documents in enumerate((1, 4, 9)):
        parts, ends = material(seed, documents)
        wanted = [one_rank([part[row] for part in parts], ends[row]) for row in range(ROWS)]
        lengths = torch.cat([torch.from_numpy(each).diff() for each in ends])
        for name in LAYOUTS:
            split = RowSplit((1, 4), dist.get_rank(), name, Costs(1.0, 1.0, 1.0))
            plan = split({"tokens": torch.zeros(ROWS, LENGTH, dtype=torch.int64), "segment_lengths": lengths})[
                "context"
            ]
            for pieces in (1, 3):
                for keep in (False, True):
                    found, at, sent = over_ranks(parts, plan, torch.float32, pieces, keep)
                    for one, right in zip(found, zip(*wanted, strict=True), strict=True):
                        mine = torch.cat([row[where] for row, where in zip(right, at, strict=True)])
                        worst[name] = max(worst[name], error(one, mine))
                    rows = sum(step.rows_out for step in plan.steps) * (1 if keep else 2)
                    rows += sum(step.rows_in for step in plan.steps)
                    wire.add(sent - rows * 2 * GROUPS * WIDTH * 4)
    return {"worst": worst, "wire": sorted(wire)}


@cases.case
def narrow_types() -> dict:
    """Errors of bf16 over the ranks and of the kernel on one rank, for output and gradients."""
    import torch
    import torch.distributed as dist

    from megatron_telechat.parallel.context.plan import whole_rows

    parts, _ = material(7, 1)
    ends = [0, LENGTH]
    plan = whole_rows(LENGTH, ROWS, 4, dist.get_rank())
    found, at, _ = over_ranks(parts, plan, torch.bfloat16, 1, False)
    ratios = []
    for number, one in enumerate(found):
        squares = torch.zeros(2, dtype=torch.float64)
        for row, part in enumerate(one.unflatten(0, (ROWS, -1))):
            wanted = one_rank([part[row] for part in parts], ends)[number]
            squares[0] += (part.double() - wanted[at[row]]).square().sum()
            squares[1] += wanted[at[row]].square().sum()
        dist.all_reduce(squares)
        ours = float((squares[0] / squares[1]).sqrt())
        row = [part[0] for part in parts]
        ratios.append(ours / one_rank_kernel_error(row, ends, one_rank(row, ends), torch.bfloat16)[number])
    return {"ratios": ratios}


@cases.case
def heads_for_tokens() -> dict:
    """There and back, forward and backward, is nothing."""
    import torch
    import torch.distributed as dist

    from megatron_telechat.parallel.clock import ExchangeClock, PassClock
    from megatron_telechat.parallel.context.heads import to_heads, to_tokens

    clocks = [PassClock(ExchangeClock(), None, late, torch.device("cpu")) for late in (False, True)]
    group, rank = dist.group.WORLD, dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    parts = tuple(torch.randn(2, 6, count, 4, generator=generator).requires_grad_() for count in (8, 4, 4))
    heads = to_heads(parts, group, (clocks[0], clocks[1]))
    back = to_tokens(heads[0], group, (clocks[0], clocks[1]))
    (grad,) = torch.autograd.grad(back, parts[0], parts[0].detach())
    # The first head of this rank, of the tokens of all ranks.
    everything = [torch.empty_like(parts[1]) for _ in range(4)]
    dist.all_gather(everything, parts[1].detach())
    wanted = torch.cat(everything, 1)[:, :, rank : rank + 1]
    same = (torch.equal(back, parts[0]), torch.equal(grad, parts[0]), torch.equal(heads[1], wanted))
    return {"same": same, "exposed": clocks[0].clock.take_exposed_s() >= 0}


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    cases.main()

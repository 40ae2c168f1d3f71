"""Drawn routings: the plan against a slow plain one, and the experts against the plain loop; four ranks."""

from __future__ import annotations

import itertools
import math
import random
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_telechat.moe.dispatch import Dispatch, RowFormat
from megatron_telechat.moe.router import Routing
from tests.harness import Cases
from tests.moe import worker_block as plain
from tests.moe.reference import random_weights, relative_error

cases = Cases()
WORLD = plain.WORLD
DRAWS = 14  # of each layout
STYLES = ("even", "skewed", "one_expert", "one_rank", "empty_experts", "alternating")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Draw(NamedTuple):
    style: str
    num_tokens: int
    topk: int
    num_chunks: int
    dtype: torch.dtype
    recompute: bool
    seed: int


def draws(layout: str) -> list[Draw]:
    """The same on every rank."""
    source = random.Random(f"routings of {layout}")
    found = []
    for seed, style in zip(range(DRAWS), itertools.cycle(STYLES)):
        found.append(
            Draw(
                style,
                num_tokens=source.choice((1, 2, 5, 13, 31)),
                topk=1 if style == "one_expert" else source.choice((1, 2, 4)),
                num_chunks=source.choice((1, 2, 3, 4, 7, 40)),
                dtype=source.choice((torch.float32, torch.float32, torch.bfloat16)),
                recompute=source.random() < 0.3,
                seed=seed,
            )
        )
    return found


def routings(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and probabilities [ranks, n, k] of all ranks."""
    generator = torch.Generator().manual_seed(draw.seed)
    scores = torch.rand(WORLD, draw.num_tokens, plain.EXPERTS, generator=generator)
    order = torch.arange(plain.EXPERTS)
    if draw.style == "skewed":
        scores += torch.linspace(2, 0, plain.EXPERTS)
    elif draw.style == "one_expert":
        scores[..., draw.seed % plain.EXPERTS] += 2
    elif draw.style == "one_rank":
        scores += 2.0 * (order < draw.topk)
    elif draw.style == "empty_experts":
        scores += 2.0 * (order % 2 == 0)
    elif draw.style == "alternating":  # a chunk without a token for an expert that the next one is full of
        half = (torch.arange(draw.num_tokens) * 2 // draw.num_tokens).view(-1, 1)
        scores += 2.0 * (order // (plain.EXPERTS // 2) == half)
    chosen = scores.topk(draw.topk, dim=-1)
    return chosen.indices, torch.softmax(3 * chosen.values, -1)


# ---- the plan -----------------------------------------------------------------------------------


def check_plan(draw: Draw, state, groups) -> None:
    experts, probabilities = routings(draw)
    rank = dist.get_rank()
    form = RowFormat(plain.HIDDEN, draw.dtype)
    counts = torch.bincount(experts[rank].flatten(), minlength=plain.EXPERTS)
    plan = Dispatch(Routing(probabilities[rank], experts[rank], counts), groups, draw.num_chunks, form)
    plan.lay_out_arrivals()
    size, me = groups.all.size(), groups.all.rank()
    if size == 1:
        for part, arrivals in zip(plan.ranges, plan.arrivals, strict=True):
            check_local(arrivals, part, experts[rank])
        return
    everyone: list = [None] * size
    dist.all_gather_object(everyone, (rank, plan.ranges, plan.outgoing), group=groups.all)
    local = plain.EXPERTS // state.ep_size
    for chunk, (arrivals, outgoing) in enumerate(zip(plan.arrivals, plan.outgoing, strict=True)):
        check_outgoing(outgoing, plan.ranges[chunk], experts[rank], local, state.etp_size, form)
        buffer, plain_buffer, flat, expected = [], [], [], []
        for source, (world_rank, ranges, sides) in enumerate(everyone):
            side, part = sides[chunk], ranges[chunk]
            assert side.send[me] == arrivals.receive[source]
            assert side.send_tokens[me] == arrivals.receive_tokens[source]
            first, count, tokens = sum(side.send[:me]), side.send[me], side.send_tokens[me]
            # Who lies in each row, and which probability in each place.
            rows = side.row_tokens.tolist()[first : first + count]
            buffer += [(world_rank, t) for t in rows]
            plain_buffer += buffer[len(buffer) - count : len(buffer) - count + tokens]
            places = [None] * (sum(side.send) * form.weights_per_row)
            choices = [(t, c) for t in range(part.start, part.stop) for c in range(draw.topk)]
            for slots in side.weight_slots.tolist():
                for slot, choice in zip(slots, choices, strict=True):
                    assert places[slot] is None, "two probabilities in one place"
                    places[slot] = (world_rank, *choice)
            flat += places[first * form.weights_per_row : (first + count) * form.weights_per_row]
            for token, choice in choices:
                if int(experts[world_rank, token, choice]) // local == state.ep_rank:
                    expected.append((int(experts[world_rank, token, choice]), world_rank, token, choice))
        start, found = 0, []
        rows, token_rows, slots = arrivals.rows.tolist(), arrivals.token_rows.tolist(), arrivals.weight_slots.tolist()
        for index, count in enumerate(arrivals.counts):
            for row in range(start, start + count):
                owner, choice = buffer[rows[row]], flat[slots[row]]
                assert owner == plain_buffer[token_rows[row]] == choice[:2], (owner, choice)
                found.append((state.ep_rank * local + index, *choice))
            start += count
            assert int(arrivals.offsets[index]) == start
        assert sorted(found) == sorted(expected), "a pair of token and expert is missing, twice, or somewhere else"
        owners = [plain_buffer[t] for t in token_rows]
        check_bags(arrivals.bags, arrivals.bag_starts, owners, plain_buffer)


def check_outgoing(outgoing, part, experts, local: int, etp: int, form: RowFormat) -> None:
    """Sizes by counting; outputs and gradients lie where the sums look for them."""
    chunk = experts[part.start : part.stop]
    for target, (rows, tokens) in enumerate(zip(outgoing.send, outgoing.send_tokens, strict=True)):
        here = chunk // local == target // etp
        distinct, pairs = int(here.any(1).sum()), int(here.sum())
        assert tokens == distinct and rows == distinct + math.ceil(pairs / form.weights_per_row)
    total = sum(outgoing.send_tokens)
    assert sorted(outgoing.bags.tolist()) == list(range(total)), "every output is added once"
    starts = [*outgoing.bag_starts.tolist(), total]
    for number, token in enumerate(range(part.start, part.stop)):
        mine = slice(starts[number], starts[number + 1])
        assert set(outgoing.output_tokens[outgoing.bags[mine].long()].tolist()) <= {token}
        assert set(outgoing.row_tokens[outgoing.gradient_bags[mine].long()].tolist()) <= {token}
    assert len(set(outgoing.gradient_bags.tolist())) == total


def check_bags(bags, starts, owners, rows) -> None:
    """Every expert row is added once, to the row of its token."""
    assert sorted(bags.tolist()) == list(range(len(owners)))
    edges = [*starts.tolist(), len(owners)]
    for number, owner in enumerate(rows):
        for expert_row in bags[edges[number] : edges[number + 1]].tolist():
            assert owners[expert_row] == owner


def check_local(arrivals, part, experts) -> None:
    """One rank: nothing is sent, all pairs of the chunk are here."""
    start, found = 0, []
    for expert, count in enumerate(arrivals.counts):
        for row in range(start, start + count):
            token, choice = divmod(int(arrivals.weight_slots[row]), experts.shape[1])
            assert int(arrivals.rows[row]) == token == part.start + int(arrivals.token_rows[row])
            found.append((token, choice, expert))
        start += count
    expected = [(t, c, int(experts[t, c])) for t in range(part.start, part.stop) for c in range(experts.shape[1])]
    assert sorted(found) == sorted(expected)


# ---- the experts --------------------------------------------------------------------------------


def reference(draw: Draw, weights, tokens, direction):
    """fp64 over the tokens of all ranks: output, and gradients of tokens, probabilities and weights."""
    experts, probabilities = routings(draw)
    x, p = tokens.double().requires_grad_(), probabilities.double().requires_grad_()
    leaves = {name: weights[name].clone().requires_grad_() for name in ("fc1", "fc2", "bias")}
    output = torch.zeros_like(x)
    for expert in range(plain.EXPERTS):
        gate, up = leaves["fc1"][expert]
        y = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ leaves["fc2"][expert].t() + leaves["bias"][expert]
        output = output + (p * (experts == expert)).sum(-1, keepdim=True) * y
    (output * direction.double()).sum().backward()
    return output.detach(), x.grad, p.grad, {name: leaf.grad for name, leaf in leaves.items()}


def check_experts(draw: Draw, state, block, weights) -> float:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 + draw.seed)
    tokens, direction = (
        torch.randn(WORLD, draw.num_tokens, plain.HIDDEN, generator=generator).to(draw.dtype) for _ in range(2)
    )
    output, grad_tokens, grad_probabilities, by_name = reference(draw, weights, tokens, direction)
    experts, probabilities = routings(draw)
    x, p = tokens[rank].clone().requires_grad_(), probabilities[rank].clone().requires_grad_()
    block.num_chunks, block.recompute_experts = draw.num_chunks, draw.recompute
    counts = torch.bincount(experts[rank].flatten(), minlength=plain.EXPERTS)
    found = block.run_experts(x, Routing(p, experts[rank], counts))
    (found * direction[rank]).sum().backward()
    errors = {
        "output": relative_error(found, output[rank]),
        "tokens": relative_error(x.grad, grad_tokens[rank]),
        "probabilities": relative_error(p.grad, grad_probabilities[rank]),
    }
    for name, parameter in plain.block_parameters(block).items():
        if name != "router":
            total = parameter.grad.double()
            dist.all_reduce(total, group=state.edp_group)
            errors[name] = relative_error(total, plain.local_part(name, by_name[name], state))
            parameter.grad = None
    assert all(error < BOUNDS[draw.dtype] for error in errors.values()), (draw, errors)
    return max(errors.values())


def drawn(layout: str) -> dict[str, float]:
    state = plain.start(layout)
    # Values that bf16 holds, so that only the arithmetic is rounded.
    weights = {
        name: value.bfloat16().double()
        for name, value in random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH).items()
    }
    blocks = {dtype: plain.build_block(plain.make_config(state, dtype), state, weights) for dtype in BOUNDS}
    worst = dict.fromkeys(map(str, BOUNDS), 0.0)
    for draw in draws(layout):
        block = blocks[draw.dtype]
        check_plan(draw, state, block.groups)
        error = check_experts(draw, state, block, weights)
        worst[str(draw.dtype)] = max(error, worst[str(draw.dtype)])
    return worst


for _layout in ("dp4", "ep2", "ep4", "tp2_folded_ep4", "tp2_ep2_etp2", "tp2_ep1_etp2"):
    cases.add(f"drawn_{_layout}", lambda layout=_layout: drawn(layout))


if __name__ == "__main__":
    cases.main()

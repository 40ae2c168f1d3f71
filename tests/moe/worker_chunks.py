"""Chunks of the input against one chunk, against Megatron-Core's own layer, and against the plain loop; four ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_telechat.moe.link import Link
from megatron_telechat.parallel.transfer import Transfer
from tests.harness import Cases
from tests.moe import worker_block as plain
from tests.moe.reference import random_weights, relative_error

cases = Cases()
WORLD = plain.WORLD
CHUNKS = (1, 2, 3, 4, 8, 50)  # 12 tokens a rank: 8 leaves a short and empty chunks, 50 is more than there are
BOUND = 1e-5
TRANSFERS = 4  # of a chunk: dispatch, combine, and the gradients of both


class CountingLink:
    """A link that counts."""

    def __init__(self, link: Link):
        self.link, self.started = link, 0

    def start(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        self.started += 1
        return self.link.start(rows, send, receive)


@contextmanager
def host_copies() -> Iterator[list[int]]:
    """Counts Tensor.cpu: the one way from the device that the block uses."""
    count, real = [0], torch.Tensor.cpu

    def counted(tensor, *arguments: Any, **options: Any):
        count[0] += 1
        return real(tensor, *arguments, **options)

    torch.Tensor.cpu = counted
    try:
        yield count
    finally:
        torch.Tensor.cpu = real


def results(block, tokens, gradients) -> dict[str, torch.Tensor]:
    """Output and all gradients of one forward and backward."""
    output, input_gradient = plain.run_block(block, tokens)
    found = {"output": output, "input": input_gradient, **{n: g.clone() for n, g in gradients(block).items()}}
    for parameter in block.parameters():
        parameter.grad = None
    return found


def own_gradients(block) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in plain.block_parameters(block).items()}
    if block.use_shared_expert:
        found.update({f"shared.{name}": p.grad for name, p in block.shared_experts.named_parameters()})
    return found


def core_gradients(layer) -> dict[str, torch.Tensor]:
    found = plain.core_gradients(layer)
    if layer.use_shared_expert:
        found.update({f"shared.{name}": p.grad for name, p in layer.shared_experts.named_parameters()})
    return found


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], value) for name, value in expected.items()}


def against_core_and_one_chunk(layout: str, route: str, shared: int | None = None) -> dict[str, float]:
    """Numbers of chunks, with and without recompute: results, and how often the ranks exchange."""
    state = plain.start(layout)
    weights = random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH, bias=False)
    tokens = plain.global_batch(route, weights, torch.float32)
    config = plain.make_config(state, torch.float32, moe_shared_expert_intermediate_size=shared)
    block, layer = plain.build_block(config, state, weights, bias=False), plain.core_layer(config, state, weights)
    if shared:
        with torch.no_grad():
            for ours, theirs in zip(block.shared_experts.parameters(), layer.shared_experts.parameters(), strict=True):
                ours.copy_(torch.randn(ours.shape, generator=torch.Generator().manual_seed(state.tp_rank)) / 4)
                theirs.copy_(ours)
    core = results(layer, tokens, core_gradients)
    block.link = CountingLink(block.link)
    alone = state.ep_size * state.etp_size == 1
    one, worst = None, {}
    for recompute in (False, True):
        # The uneven routes take fewer: it is the number of chunks or the route that is unusual.
        for chunks in (1, 4) if recompute else CHUNKS if route == "even" else (1, 3, 50):
            block.num_chunks, block.recompute_experts, block.link.started = chunks, recompute, 0
            with host_copies() as copies:
                found = results(block, tokens, own_gradients)
            one = one or found
            assert copies[0] == 1, f"{copies[0]} copies to the host"
            assert block.link.started == (0 if alone else TRANSFERS * chunks), block.link.started
            for peer, expected in (("core", core), ("one", one)):
                for name, error in differences(found, expected).items():
                    worst[f"{peer}.{name}"] = max(error, worst.get(f"{peer}.{name}", 0.0))
            with torch.no_grad():
                output, _ = block(plain.input_of(tokens))
            assert torch.equal(output.view_as(found["output"]), found["output"]), "another output without gradients"
    assert all(error < BOUND for error in worst.values()), worst  # not a number is no pass
    return worst


for _layout in plain.LAYOUTS:
    for _route in plain.ROUTES:
        cases.add(
            f"core_{_layout}_{_route}", lambda layout=_layout, route=_route: against_core_and_one_chunk(layout, route)
        )
for _layout in ("ep4", "tp2_folded_ep4"):
    cases.add(f"core_shared_{_layout}", lambda layout=_layout: against_core_and_one_chunk(layout, "even", shared=20))


def against_reference(layout: str) -> float:
    """fp64, with the bias: the arithmetic itself."""
    state = plain.start(layout)
    weights = random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH)
    tokens = plain.global_batch("skewed", weights, torch.float64)
    output, input_gradient, by_name = plain.reference_gradients(tokens, weights, state)
    rank = dist.get_rank()
    expected = {"output": output[rank], "input": input_gradient[rank]}
    expected.update({name: plain.local_part(name, value, state) for name, value in by_name.items()})
    block = plain.build_block(plain.make_config(state, torch.float64), state, weights)
    worst = 0.0
    for chunks, block.recompute_experts in ((2, False), (3, True), (4, False), (8, True), (50, False)):
        block.num_chunks = chunks
        found = results(block, tokens, lambda b: plain.reduced_gradients(b, state))
        worst = max(worst, *differences(found, expected).values())
    assert worst < 1e-12, worst
    return worst


for _layout in plain.LAYOUTS:
    cases.add(f"reference_{_layout}", lambda layout=_layout: against_reference(layout))


def interleaved(order: str) -> dict[str, float]:
    """Two micro-batches in flight, with different numbers of chunks; the gradients add up."""
    state = plain.start("tp2_folded_ep4")
    weights = random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH)
    batches = [plain.global_batch("even", weights, torch.float64)]
    batches.append(batches[0].flip(0) * 0.7)
    block = plain.build_block(plain.make_config(state, torch.float64), state, weights)

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: parameter.grad for name, parameter in plain.block_parameters(block).items()}
        for parameter in block.parameters():
            parameter.grad = None
        return found

    for batch in batches:
        block(plain.input_of(batch))[0].square().sum().backward()
    expected = gradients()
    losses = []
    for chunks, recompute, batch in ((3, False, batches[0]), (4, True, batches[1])):
        block.num_chunks, block.recompute_experts = chunks, recompute
        losses.append(block(plain.input_of(batch))[0].square().sum())
    for loss in losses if order == "first_first" else losses[::-1]:
        loss.backward()
    errors = differences(gradients(), expected)
    assert max(errors.values()) < 1e-12, errors
    return errors


for _order in ("first_first", "last_first"):
    cases.add(f"interleaved_{_order}", lambda o=_order: interleaved(o))


@cases.case
def second_backward_is_refused() -> str:
    """The first one overwrites what was kept."""
    state = plain.start("ep4")
    weights = random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH)
    tokens = plain.global_batch("even", weights, torch.float64)
    block = plain.build_block(plain.make_config(state, torch.float64), state, weights)
    loss = block(plain.input_of(tokens))[0].sum()
    loss.backward()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a second backward over overwritten buffers went through")


def main_gradients(layout: str) -> dict[str, float]:
    """Under Megatron-Core's DDP with distributed optimizer and overlapped reduction, two micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    state = plain.start(layout)
    weights = random_weights(plain.EXPERTS, plain.HIDDEN, plain.WIDTH, bias=True)
    tokens = plain.global_batch("even", weights, torch.float32)
    batches = (tokens, tokens.flip(0) * 0.7)
    config = plain.make_config(state, torch.float32, calculate_per_token_loss=True)
    block = plain.build_block(config, state, weights)
    for batch in batches:
        plain.run_block(block, batch)
    # Sums over the data-parallel ranks alone: what Megatron-Core's reduction makes of them.
    expected = {}
    for name, parameter in plain.block_parameters(block).items():
        expected[name] = parameter.grad.clone()
        dist.all_reduce(expected[name], group=state.dp_cp_group if name == "router" else state.edp_group)
    worst: dict[str, float] = {}
    for chunks in (1, 4):
        block = plain.build_block(config, state, weights)
        block.num_chunks = chunks
        ddp = DistributedDataParallel(
            config=config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True, bucket_size=500
            ),
            module=block,
            pg_collection=state.process_groups,
        )
        with ddp.no_sync():
            plain.run_block(ddp, batches[0])
        plain.run_block(ddp, batches[1])
        ddp.finish_grad_sync()
        names = {parameter: name for name, parameter in plain.block_parameters(block).items()}
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            rank, size = (
                group.intra_distributed_optimizer_instance_rank,
                group.intra_distributed_optimizer_instance_size,
            )
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(size)[rank]
                wanted = torch.zeros_like(bucket.grad_data)
                for parameter, (start, stop) in bucket.param_to_index.items():
                    wanted[start:stop] = expected[names[parameter]].flatten()
                error = relative_error(shard, wanted.chunk(size)[rank])
                for parameter in bucket.param_to_index:
                    worst[names[parameter]] = max(error, worst.get(names[parameter], 0.0))
    assert set(worst) == set(expected) and max(worst.values()) < BOUND, worst
    return worst


for _layout in ("dp4", "ep2", "tp2_folded_ep2"):
    cases.add(f"main_grad_{_layout}", lambda layout=_layout: main_gradients(layout))


if __name__ == "__main__":
    cases.main()

"""The block in many layouts against the dense reference and against Megatron-Core's own layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_telechat import parallel
from megatron_telechat.backend import get_backend
from megatron_telechat.config.schema import ParallelConfig, RunConfig
from megatron_telechat.moe.choices import gap_to_runner_up
from tests.harness import Cases
from tests.moe.reference import random_weights, reference_aux_loss, reference_block, relative_error

cases = Cases()
EXPERTS, TOPK, HIDDEN, WIDTH, SEQUENCE = 8, 2, 16, 24, 12
AUX = 0.05
CLEAR = 1e-4
"""What parts the logit of the last expert chosen from the next one, at least; fp32 moves a logit by 1e-6 at most."""
WORLD = 4
ROUTES = ("even", "skewed", "one_rank")
LAYOUTS = {
    "dp4": dict(expert_model_parallel_size=1),
    "ep2": dict(expert_model_parallel_size=2),
    "ep4": dict(expert_model_parallel_size=4),
    "tp2_folded_ep2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    "tp2_folded_ep4": dict(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1),
    "tp2_ep2_etp2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=2),
    "tp2_ep1_etp2": dict(tensor_model_parallel_size=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
}


def start(layout: str) -> parallel.ParallelState:
    run = RunConfig(parallel=ParallelConfig(world_size=WORLD, **LAYOUTS[layout]))
    return parallel.initialize(run, get_backend("cpu"))


def make_config(state: parallel.ParallelState, dtype: torch.dtype, **changes: Any):
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        params_dtype=dtype,
        tensor_model_parallel_size=state.tp_size,
        sequence_parallel=state.tp_size > 1,
        expert_model_parallel_size=state.ep_size,
        expert_tensor_parallel_size=state.etp_size,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        moe_router_topk=TOPK,
        moe_router_dtype="fp64" if dtype is torch.float64 else "fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=AUX,
        moe_token_dispatcher_type="alltoall",
    )
    return TransformerConfig(**{**fields, **changes})


def local_experts(state: parallel.ParallelState) -> tuple[slice, slice]:
    """Experts of this rank and its slice of their width."""
    experts, width = EXPERTS // state.ep_size, WIDTH // state.etp_size
    return (
        slice(state.ep_rank * experts, (state.ep_rank + 1) * experts),
        slice(state.etp_rank * width, (state.etp_rank + 1) * width),
    )


def local_part(name: str, value: torch.Tensor, state: parallel.ParallelState) -> torch.Tensor:
    experts, width = local_experts(state)
    if name == "router":
        return value
    value = value[experts]
    return {"fc1": lambda: value[:, :, width], "fc2": lambda: value[:, :, width], "bias": lambda: value}[name]()


def build_block(config, state, weights, bias: bool = True):
    from megatron_telechat.moe import MoEBlock

    block = MoEBlock(config, pg_collection=state.process_groups, output_bias=bias)
    block.set_layer_number(1)
    with torch.no_grad():
        for name, parameter in block_parameters(block).items():
            parameter.copy_(local_part(name, weights[name], state))
    return block


def block_parameters(block) -> dict[str, torch.nn.Parameter]:
    experts = block.experts
    found = {"router": block.router.weight, "fc1": experts.linear_fc1.weight, "fc2": experts.linear_fc2.weight}
    if experts.linear_fc2.bias is not None:
        found["bias"] = experts.linear_fc2.bias
    return found


def global_batch(route: str, weights, dtype: torch.dtype) -> torch.Tensor:
    """[dp rank, tp rank, tokens, hidden] flattened to [world, tokens, hidden]; bends the router for uneven routes."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(WORLD, SEQUENCE, HIDDEN, generator=generator, dtype=torch.float64)
    if route != "even":
        # A common component of all tokens that the first experts' router rows answer to.
        tokens[..., 0] = 4.0
        weights["router"][:, 0] = 0.0
        # Moderate where one expert wins alone: a saturated softmax has no digits left in its gradient.
        favoured, pull = (1, 1.0) if route == "skewed" else (TOPK, 4.0)
        weights["router"][:favoured, 0] = pull
    tokens = tokens.to(dtype)
    require_clear_choices(tokens, weights["router"])
    return tokens


def require_clear_choices(tokens: torch.Tensor, router: torch.Tensor) -> None:
    """Fixed inputs of one forward need no replay, if rounding cannot choose their experts."""
    logits = tokens.double().flatten(0, -2) @ router.t()
    clear = float(gap_to_runner_up(logits, logits.topk(TOPK).indices).min())
    assert clear > CLEAR, f"the inputs hold a near tie: {clear:.1e}"


def input_of(tokens: torch.Tensor) -> torch.Tensor:
    """This rank's [s, b, h] leaf."""
    mine = tokens[dist.get_rank()]
    return mine.view(SEQUENCE // 2, 2, HIDDEN).clone().requires_grad_()


def reduced_gradients(block, state) -> dict[str, torch.Tensor]:
    """Gradients summed over all tokens, as the data-parallel reduction and sequence parallelism would."""
    gradients = {}
    for name, parameter in block_parameters(block).items():
        total = parameter.grad.clone()
        dist.all_reduce(total, group=None if name == "router" else state.edp_group)
        gradients[name] = total
    return gradients


def reference_gradients(tokens, weights, state, per_token: bool = False):
    """Output, input gradient and weight gradients of the whole batch, in fp64 on one rank."""
    inputs = tokens.double().clone().requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    output = reference_block(inputs.view(-1, HIDDEN), leaves, TOPK)
    loss = (output * loss_direction(output.shape)).sum()
    # Ranks of one tensor group share sequences: the auxiliary loss is one of their tokens together.
    for part in inputs.view(WORLD // state.tp_size, -1, HIDDEN):
        aux = AUX * reference_aux_loss(part, leaves["router"], TOPK)
        loss = loss + (aux * part.shape[0] if per_token else aux)
    loss.backward()
    return output.detach().view_as(tokens), inputs.grad, {name: leaf.grad for name, leaf in leaves.items()}


def loss_direction(shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def run_block(block, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = input_of(tokens)
    output, bias = block(inputs)
    assert bias is None
    direction = loss_direction((WORLD * SEQUENCE, HIDDEN)).view(WORLD, SEQUENCE, HIDDEN)[dist.get_rank()]
    (output.view(SEQUENCE, HIDDEN) * direction.to(output.dtype)).sum().backward()
    return output.detach().view(SEQUENCE, HIDDEN), inputs.grad.view(SEQUENCE, HIDDEN)


def against_reference(layout: str, route: str, per_token: bool = False) -> dict[str, float]:
    state = start(layout)
    weights = random_weights(EXPERTS, HIDDEN, WIDTH)
    tokens = global_batch(route, weights, torch.float64)
    block = build_block(make_config(state, torch.float64, calculate_per_token_loss=per_token), state, weights)
    output, input_gradient = run_block(block, tokens)
    expected, expected_input, expected_weights = reference_gradients(tokens, weights, state, per_token)
    rank = dist.get_rank()
    errors = {
        "output": relative_error(output, expected[rank]),
        "input": relative_error(input_gradient, expected_input[rank]),
    }
    for name, gradient in reduced_gradients(block, state).items():
        errors[name] = relative_error(gradient, local_part(name, expected_weights[name], state))
    if route == "one_rank":
        rows = sum(block.router.statistics.tokens_per_expert[TOPK:].tolist())
        assert rows == 0, "the route was meant to leave all experts but the first without a token"
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-12, errors
    return errors


for _layout in LAYOUTS:
    for _route in ROUTES:
        cases.add(
            f"reference_{_layout}_{_route}", lambda layout=_layout, route=_route: against_reference(layout, route)
        )
for _layout in ("dp4", "tp2_folded_ep4", "tp2_ep2_etp2"):
    cases.add(f"per_token_{_layout}", lambda layout=_layout: against_reference(layout, "even", per_token=True))


def core_layer(config, state, weights):
    """Megatron-Core's MoELayer with SequentialMLP, holding the same weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    layer = spec(config=config, pg_collection=state.process_groups)
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        fc1, fc2 = local_part("fc1", weights["fc1"], state), local_part("fc2", weights["fc2"], state)
        for index, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(fc1[index].flatten(0, 1))
            expert.linear_fc2.weight.copy_(fc2[index])
    return layer


def core_gradients(layer) -> dict[str, torch.Tensor]:
    experts = layer.experts.local_experts
    fc1 = torch.stack([e.linear_fc1.weight.grad for e in experts])
    return {
        "router": layer.router.weight.grad,
        "fc1": fc1.view(len(experts), 2, -1, HIDDEN),
        "fc2": torch.stack([e.linear_fc2.weight.grad for e in experts]),
    }


def against_core(layout: str, shared: int | None = None) -> dict[str, float]:
    """fp32, no bias (Megatron-Core has none on the experts alone)."""
    state = start(layout)
    weights = random_weights(EXPERTS, HIDDEN, WIDTH, bias=False)
    tokens = global_batch("even", weights, torch.float32)
    config = make_config(state, torch.float32, moe_shared_expert_intermediate_size=shared, moe_z_loss_coeff=0.02)
    if state.tp_size > 1:
        # Megatron-Core's z-loss is its own only on one tensor rank; see Router._add_auxiliary_losses.
        config = dataclasses.replace(config, moe_z_loss_coeff=None)
    block, layer = build_block(config, state, weights, bias=False), core_layer(config, state, weights)
    if shared:
        with torch.no_grad():
            for ours, theirs in zip(block.shared_experts.parameters(), layer.shared_experts.parameters(), strict=True):
                ours.copy_(torch.randn(ours.shape, generator=torch.Generator().manual_seed(state.tp_rank)) / 4)
                theirs.copy_(ours)
    output, input_gradient = run_block(block, tokens)
    expected, expected_input = run_block(layer, tokens)
    errors = {"output": relative_error(output, expected), "input": relative_error(input_gradient, expected_input)}
    for name, gradient in core_gradients(layer).items():
        errors[name] = relative_error(block_parameters(block)[name].grad, gradient)
    if shared:
        for (name, ours), theirs in zip(
            block.shared_experts.named_parameters(), layer.shared_experts.parameters(), strict=True
        ):
            errors[name] = relative_error(ours.grad, theirs.grad)
    assert max(errors.values()) < 3e-6, errors
    return errors


for _layout in LAYOUTS:
    cases.add(f"core_{_layout}", lambda layout=_layout: against_core(layout))
cases.add("core_shared_tp2_folded_ep4", lambda: against_core("tp2_folded_ep4", shared=20))


@cases.case
def recompute_and_interleaved_calls() -> dict[str, float]:
    """Two micro-batches in flight, the second's backward first, one of them checkpointed: gradients add up."""
    from megatron.core import tensor_parallel

    state = start("tp2_ep2_etp2")
    weights = random_weights(EXPERTS, HIDDEN, WIDTH)
    tokens = global_batch("even", weights, torch.float64)
    other = tokens.flip(0) * 0.7

    def gradients(run) -> dict[str, torch.Tensor]:
        block = build_block(make_config(state, torch.float64), state, weights)
        run(block)
        counts = block.router.statistics.tokens_per_expert.sum()
        return {"counts": counts, **{name: p.grad for name, p in block_parameters(block).items()}}

    def one_by_one(block) -> None:
        for batch in (tokens, other):
            block(input_of(batch))[0].square().sum().backward()

    def interleaved(block) -> None:
        first = block(input_of(tokens))[0]
        second = tensor_parallel.checkpoint(lambda x: block(x)[0], False, input_of(other))
        second.square().sum().backward()
        first.square().sum().backward()

    expected, found = gradients(one_by_one), gradients(interleaved)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-12, errors
    return errors


@cases.case
def expert_load() -> dict[str, Any]:
    """Counts of all ranks, read once and begun anew."""
    from megatron_telechat.moe import collect_expert_load

    state = start("tp2_folded_ep4")
    weights = random_weights(EXPERTS, HIDDEN, WIDTH)
    tokens = global_batch("skewed", weights, torch.float64)
    block = build_block(make_config(state, torch.float64), state, weights)
    for _ in range(3):
        block(input_of(tokens))[0].sum().backward()
    with torch.no_grad():
        block(input_of(tokens))  # evaluation does not count
    load = collect_expert_load([block], state)
    flat = tokens.view(-1, HIDDEN)
    expected = torch.bincount((flat @ weights["router"].t()).topk(TOPK).indices.flatten(), minlength=EXPERTS)
    assert load.layers == (0,) and torch.equal(load.tokens_per_expert[0], 3 * expected)
    assert abs(float(load.max_over_mean[0]) - float(expected.max() / expected.double().mean())) < 1e-6
    parts = tokens.view(WORLD // state.tp_size, -1, HIDDEN)
    aux = sum(float(reference_aux_loss(part, weights["router"], TOPK)) for part in parts) / len(parts)
    assert abs(load.aux_loss - aux) < 1e-5 * aux
    assert collect_expert_load([block], state) is None, "begun anew, and nothing routed since"
    return {"aux_loss": load.aux_loss}


@cases.case
def expert_parameters_are_marked() -> dict[str, Any]:
    """The gradient norm counts every element of the experts exactly once over the ranks of their own tensor group."""
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    counted = {}
    for layout in ("tp2_folded_ep2", "tp2_ep2_etp2", "dp4"):
        state = start(layout)
        block = build_block(make_config(state, torch.float32), state, random_weights(EXPERTS, HIDDEN, WIDTH))
        assert all(p.allreduce is False for p in block.experts.parameters())
        elements = torch.zeros(2)
        for index, parameter in enumerate((block.experts.linear_fc1.weight, block.experts.linear_fc2.bias)):
            if param_is_not_tensor_parallel_duplicate(parameter, state.process_groups.expt_tp):
                elements[index] = parameter.numel() / state.edp_size
        dist.all_reduce(elements)
        counted[layout] = elements.tolist()
        assert counted[layout] == [EXPERTS * 2 * WIDTH * HIDDEN, EXPERTS * HIDDEN], counted
        parallel.destroy(keep_world=True)
    return counted


if __name__ == "__main__":
    cases.main()

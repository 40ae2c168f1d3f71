"""Cases on four gloo ranks: layouts against one another, golden logits, recompute, the tiling check."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.harness import Cases

WORLD = 4
SEQ, MICRO_BATCH, MICRO_BATCHES = 32, 2, 4
GOLDEN = Path(__file__).resolve().parents[1] / "golden"

DENSE = dict(
    num_layers=5,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=128,
    rotary_training_seqlen=16,
    rotary_base_seqlen=16,
    init_method_std=0.1,
)
MOE = dict(
    DENSE,
    num_experts=4,
    moe_ffn_hidden_size=48,
    moe_layer_freq=2,
    moe_aux_loss_coeff=0.01,
    moe_shared_expert_intermediate_size=32,
)
MIXTRAL = dict(
    DENSE,
    architecture="mixtral",
    attention_output_bias=False,
    mlp_output_bias=False,
    num_experts=4,
    moe_ffn_hidden_size=48,
    rotary_training_seqlen=None,
    rotary_base_seqlen=None,
)

# name -> (model, parallel fields); the first of each model is the reference of the others
LAYOUTS: dict[str, tuple[dict, dict]] = {
    "dense_dp4": (DENSE, {}),
    "dense_tp2": (DENSE, dict(tensor_model_parallel_size=2)),
    "dense_tp4_without_sp": (DENSE, dict(tensor_model_parallel_size=4, sequence_parallel=False)),
    "dense_pp2": (DENSE, dict(pipeline_model_parallel_size=2)),
    "dense_pp4_uneven": (DENSE, dict(pipeline_model_parallel_size=4, pipeline_model_parallel_layout="E|tt|tt|tL")),
    "dense_pp2_interleaved": (
        DENSE,
        dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, tensor_model_parallel_size=2),
    ),
    "moe_dp4": (MOE, {}),
    "moe_ep4": (MOE, dict(expert_model_parallel_size=4)),
    "moe_tp2_folded": (MOE, dict(tensor_model_parallel_size=2, fold_tensor_into_experts=True)),
    "moe_tp2_folded_ep4": (
        MOE,
        dict(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1),
    ),
    "moe_etp2_ep2": (MOE, dict(tensor_model_parallel_size=2, expert_model_parallel_size=2)),
    "moe_tp2_pp2": (
        MOE,
        dict(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            fold_tensor_into_experts=True,
            num_virtual_stages_per_pipeline_rank=2,
        ),
    ),
    "mixtral_dp4": (MIXTRAL, {}),
    "mixtral_ep2_pp2": (MIXTRAL, dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
RECOMPUTE: dict[str, dict] = {
    "full": dict(recompute_granularity="full"),
    "core_attn": dict(recompute_granularity="selective"),
    "mlp_moe": dict(recompute_granularity="selective", recompute_modules=("mlp", "moe")),
    "layernorm": dict(recompute_granularity="selective", recompute_modules=("layernorm",)),
    "mixed": dict(recompute_layout="full,layernorm+moe,none,core_attn+mlp,layernorm+mlp+moe+core_attn"),
}
LIGHTER = ("full", "core_attn", "mlp_moe")
"""Modes that keep fewer tensors in the autograd graph (the norms' outputs are freed later, by hand)."""

cases = Cases()
references: dict[str, Any] = {}
choices: dict[str, dict[int, list]] = {}
"""Of the reference of each model: layer -> the experts of every micro-batch."""


def run_of(model: dict, parallel: dict | None = None, **training):
    from megatron_telechat.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig

    fields = dict(device="cpu", precision="fp32", seq_length=SEQ, micro_batch_size=MICRO_BATCH)
    return RunConfig(
        model=ModelConfig(**model),
        parallel=ParallelConfig(world_size=WORLD, **(parallel or {})),
        training=TrainingConfig(**{**fields, **training}),
    )


def build(run):
    from megatron_telechat.backend import get_backend
    from megatron_telechat.model import build_model, parameter_shards, verify_tiling
    from megatron_telechat.parallel import initialize

    backend = get_backend("cpu")
    state = initialize(run, backend)
    virtual_stages = build_model(run, state, backend)
    shards = parameter_shards(virtual_stages, run, state)
    verify_tiling(shards, run, state)
    return state, virtual_stages, shards


def forward_backward(run, virtual_stages) -> float:
    """One batch, the same on every data-parallel rank, through megatron-core's schedules; the loss sum
    (of the last stage; zero elsewhere). Gradients are left on the parameters."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    generator = torch.Generator().manual_seed(7)
    shape = (MICRO_BATCHES, MICRO_BATCH, SEQ)
    tokens, labels = (torch.randint(run.model.vocab_size, shape, generator=generator) for _ in range(2))
    losses = []

    def step(iterator, model):
        batch = next(iterator)
        out = model(tokens[batch], None, labels=labels[batch])

        def loss(per_token):
            total = per_token.sum()
            losses.append(total.item())
            return total, torch.tensor(per_token.numel(), dtype=torch.int), {}

        return out, loss

    several = len(virtual_stages) > 1
    iterators = [iter(range(MICRO_BATCHES)) for _ in virtual_stages]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=virtual_stages if several else virtual_stages[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQ,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    return sum(losses)


def reduced_gradient(shard, state):
    """Gradient of one copy of the batch, as megatron-core's reductions would make it."""
    import torch.distributed as dist

    grad = shard.parameter.grad.clone()
    if getattr(shard.parameter, "sequence_parallel", False):
        dist.all_reduce(grad, group=state.tp_group)
    if shard.piece.spec.expert:
        # the experts of all replicas together have seen every data-parallel copy of the batch
        dist.all_reduce(grad, group=state.edp_group)
        grad /= state.dp_size
    return grad


class one_routing:
    """Routes as the first run with this dictionary did, and counts what the routers would have done otherwise."""

    def __init__(self, chosen: dict, virtual_stages, state):
        from megatron_telechat.moe import moe_blocks

        self.chosen, self.state, self.unlike, self.clearest = chosen, state, 0, 0.0
        self.routers = {block.layer_number: block.router for block in moe_blocks(virtual_stages)}
        self.first = not chosen

    def part(self, choices):
        """[s * b, k] of the whole sequence -> those of this tensor-parallel rank."""
        positions = choices.view(self.state.tp_size, -1, choices.shape[-1])
        return positions[self.state.tp_rank]

    def __enter__(self) -> one_routing:
        from megatron_telechat.moe.choices import RoutingTape

        for layer, router in self.routers.items():
            router.tape = RoutingTape(
                None if self.first else [self.part(one) for one in self.chosen[layer]], notes=True
            )
        return self

    def __exit__(self, *_) -> None:
        for layer, router in self.routers.items():
            if self.first:
                self.chosen[layer] = [noted.experts for noted in router.tape.noted]
                continue
            for wanted, noted in zip(self.chosen[layer], router.tape.noted, strict=True):
                unlike = (self.part(wanted).sort().values != noted.experts.sort().values).any(-1)
                self.unlike += int(unlike.sum())
                self.clearest = max([self.clearest, *noted.gap[unlike].tolist()])


def compare(name: str) -> dict[str, Any]:
    """Build a layout; weights bitwise and gradients closely equal to the reference's, under the reference's routing."""
    import torch

    model, parallel = LAYOUTS[name]
    kind = name.split("_")[0]
    run = run_of(model, parallel)
    state, virtual_stages, shards = build(run)
    with one_routing(choices.setdefault(kind, {}), virtual_stages, state) as routing:
        loss = forward_backward(run, virtual_stages)
    grads = {id(shard): reduced_gradient(shard, state) for shard in shards}
    if kind not in references:
        references[kind] = {
            "loss": loss,
            **{
                s.piece.key: (
                    s.parameter.detach().view(s.piece.box.shape).clone(),
                    grads[id(s)].view(s.piece.box.shape),
                )
                for s in shards
            },
        }
    reference = references[kind]
    worst, at = 0.0, ""
    for shard in shards:
        piece, shape = shard.piece, shard.piece.box.shape
        weight, grad = (tensor[piece.box.slices()] for tensor in reference[piece.key])
        assert torch.equal(shard.parameter.detach().view(shape), weight), f"{piece.key}: other initial weights"
        ours = grads[id(shard)].view(shape)
        assert torch.isfinite(ours).all()
        error = ((ours - grad).norm() / reference[piece.key][1].norm()).item()
        if error > worst:
            worst, at = error, piece.key
    loss_error = abs(loss / reference["loss"] - 1) if state.is_last_stage() else 0.0
    return {"loss": loss_error, "gradient": worst, "at": at, "unlike": routing.unlike, "clearest": routing.clearest}


for _name in LAYOUTS:
    cases.add(_name, partial(compare, _name))


def trained(run) -> tuple[float, dict, int]:
    """Loss and gradients of a batch with dropout; then the bytes that autograd keeps of one forward."""
    import torch

    _, virtual_stages, shards = build(run)
    loss = forward_backward(run, virtual_stages)
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(MICRO_BATCH, SEQ, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = virtual_stages[0](tokens, None, labels=tokens)
    del output
    return loss, {s.piece.key: s.parameter.grad for s in shards}, sum(kept.values())


def recompute(name: str) -> dict[str, Any]:
    import torch

    model = dict(MOE, hidden_dropout=0.1, attention_dropout=0.1)
    if "recompute" not in references:
        references["recompute"] = trained(run_of(model))
        from megatron_telechat import parallel

        parallel.destroy(keep_world=True)
    loss, grads, kept = trained(run_of(model, **RECOMPUTE[name]))
    reference_loss, reference_grads, reference_kept = references["recompute"]
    return {
        "loss_equal": loss == reference_loss,
        "different": [key for key, grad in grads.items() if not torch.equal(grad, reference_grads[key])],
        "kept": kept / reference_kept,
    }


for _name in RECOMPUTE:
    cases.add(f"recompute_{_name}", partial(recompute, _name))


# name -> (parallel fields, precision, rows of a chunk; a micro-batch has 64)
CHUNKED_LOSS: dict[str, tuple[dict, str, int]] = {
    "tp1": ({}, "fp32", 24),
    "tp2": (dict(tensor_model_parallel_size=2), "fp32", 24),
    "tp4_chunks_below_tp": (dict(tensor_model_parallel_size=4), "fp32", 3),
    "tp4_without_sp": (dict(tensor_model_parallel_size=4, sequence_parallel=False), "fp32", 7),
    "tp2_bf16": (dict(tensor_model_parallel_size=2), "bf16", 24),
    "tp2_fp16_without_sp": (dict(tensor_model_parallel_size=2, sequence_parallel=False), "fp16", 24),
}


def chunked_loss(name: str) -> dict[str, Any]:
    """Losses of tokens, and gradients of those that count, against those of the logits of all rows at once."""
    import torch

    from megatron_telechat import parallel as ranks

    parallel, precision, rows = CHUNKED_LOSS[name]
    generator = torch.Generator().manual_seed(9)
    tokens, labels = (torch.randint(DENSE["vocab_size"], (2, SEQ), generator=generator) for _ in range(2))
    counted = torch.rand(2, SEQ, generator=generator).round()
    counted[:, SEQ // 4 : SEQ // 4 * 3] = 0.0  # whole chunks
    found = []
    for chunk_rows in (0, rows):
        _, (model,), shards = build(run_of(DENSE, parallel, precision=precision, loss_chunk_rows=chunk_rows))
        assert model.output_layer.chunk_rows(labels) == chunk_rows
        loss = model(tokens, None, labels=labels)
        (loss * counted * (64.0 if precision == "fp16" else 1.0)).sum().backward()
        found.append((loss.detach(), {s.piece.key: s.parameter.grad.double() for s in shards}))
        ranks.destroy(keep_world=True)
    (expected, whole), (loss, chunked) = found
    errors = {key: ((chunked[key] - grad).norm() / grad.norm()).item() for key, grad in whole.items()}
    return {"loss": (loss - expected).abs().max().item(), "gradient": max(errors.values()), "errors": errors}


for _name in CHUNKED_LOSS:
    cases.add(f"chunked_loss_{_name}", partial(chunked_loss, _name))


class near_ties:
    """Two experts of every router are equal in the forward, and differ by 1e-6 in the pass that repeats it."""

    def __init__(self):
        self.flipped = 0

    def __enter__(self) -> near_ties:
        import torch
        from megatron.core.tensor_parallel.random import is_checkpointing

        from megatron_telechat.moe import Router

        self.router, self.real = Router, Router.gating

        def gating(router, hidden):
            logits = self.real(router, hidden)
            logits = torch.cat((logits[..., :-1], logits[..., -2:-1]), -1)
            if not (is_checkpointing() and torch.is_grad_enabled()):
                return logits
            flat = logits.detach().view(-1, logits.shape[-1])
            nudge = torch.zeros_like(flat)
            nudge[::2, -1], nudge[1::2, -2] = 1e-6, 1e-6
            before, after = (x.topk(router.topk).indices.sort().values for x in (flat, flat + nudge))
            self.flipped += int((before != after).sum())
            return logits + nudge.view_as(logits)

        Router.gating = gating
        return self

    def __exit__(self, *_) -> None:
        self.router.gating = self.real


def repeated_choices(parallel: dict) -> dict[str, Any]:
    """Full recompute whose second pass rounds otherwise, several micro-batches in flight and evaluations between them;
    against a run without recompute."""
    import torch

    from megatron_telechat import parallel as ranks

    def gradients(**training):
        run = run_of(dict(MOE, moe_layer_freq=1, moe_z_loss_coeff=0.01), parallel, **training)
        state, virtual_stages, shards = build(run)
        with near_ties() as ties:
            if len(virtual_stages) == 1 and state.pp_size == 1:
                virtual_stages[0].register_forward_pre_hook(evaluate_first)
            forward_backward(run, virtual_stages)
        found = {s.piece.key: s.parameter.grad for s in shards}
        ranks.destroy(keep_world=True)
        return found, ties.flipped

    def evaluate_first(model, inputs):
        if model.training:
            model.eval()
            with torch.no_grad():
                model(torch.zeros_like(inputs[0]), None)
            model.train()

    expected, flips = gradients()
    assert flips == 0
    found, flips = gradients(recompute_granularity="full")
    errors = {key: ((found[key] - grad).norm() / (grad.norm() + 1e-12)).item() for key, grad in expected.items()}
    return {"flipped": flips, "worst": max(errors.values()), "at": max(errors, key=errors.get)}


for _name in ("moe_dp4", "moe_tp2_pp2"):
    cases.add(f"repeated_choices_{_name}", partial(repeated_choices, LAYOUTS[_name][1]))


def fill_from_hf(shards, weights: dict, model) -> None:
    """Copy a published checkpoint into a one-rank model, packing query, key and value as Megatron does."""
    import torch

    groups, hidden = model.query_groups, model.hidden_size
    tensors = {
        "embedding.word_embeddings.weight": weights["transformer.word_embeddings.weight"],
        "decoder.final_layernorm.weight": weights["transformer.ln_f.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        query, key_value = (weights[f"{theirs}self_attention.{name}.weight"] for name in ("query", "key_value"))
        packed = torch.cat([query.view(groups, -1, hidden), key_value.view(groups, -1, hidden)], dim=1)
        tensors[f"{ours}self_attention.linear_qkv.weight"] = packed
        tensors[f"{ours}mlp.linear_fc1.weight"] = torch.stack(
            [weights[f"{theirs}mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        )
        for mine, other in (
            ("input_layernorm.weight", "input_layernorm.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
            ("self_attention.linear_proj.weight", "self_attention.dense.weight"),
            ("self_attention.linear_proj.bias", "self_attention.dense.bias"),
            ("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
            ("mlp.linear_fc2.bias", "mlp.down_proj.bias"),
        ):
            tensors[ours + mine] = weights[theirs + other]
    for shard in shards:
        shard.parameter.data.copy_(tensors.pop(shard.piece.key).reshape(shard.parameter.shape))
    assert not tensors


def golden(folder: Path, table_dtype: str) -> dict[str, float]:
    """Largest logit error by length."""
    import torch
    from safetensors.torch import load_file

    hf = json.loads((folder / "config.json").read_text())
    run = run_of(
        dict(
            num_layers=hf["n_layer"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["ffn_hidden_size"],
            num_attention_heads=hf["n_head"],
            num_query_groups=hf["num_key_value_heads"],
            vocab_size=hf["vocab_size"],
            norm_epsilon=hf["layer_norm_epsilon"],
            rotary_training_seqlen=hf["training_seqlen"],
            rotary_base_seqlen=hf["base_seqlen"],
            rotary_table_dtype=table_dtype,
        )
    )
    _, (model,), shards = build(run)
    fill_from_hf(shards, load_file(folder / "model.safetensors"), run.model)
    expected = load_file(folder / "golden.safetensors")
    errors = {}
    for name, tokens in expected.items():
        if name.startswith("input_ids_"):
            length = name.removeprefix("input_ids_")
            with torch.no_grad():
                logits = model(tokens, None, gather_logits=True)
            errors[length] = (logits - expected[f"logits_{length}"]).abs().max().item()
    return errors


for _folder in sorted(path.name for path in GOLDEN.glob("telechat2_*")):
    for _dtype in ("fp16", "fp32"):
        cases.add(f"golden_{_folder}_{_dtype}", partial(golden, GOLDEN / _folder, _dtype))


def preset(name: str) -> dict[str, int]:
    """Built against counted parameters of a preset, over TP2 x PP2."""
    import torch.distributed as dist

    from megatron_telechat.config import load_run_config
    from megatron_telechat.costs import count_parameters

    loaded = load_run_config(["--preset", name, "--mock-data"], os.environ).run
    parallel = replace(
        loaded.parallel,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2 if loaded.model.is_moe else None,
        sequence_parallel=True,
    )
    _, _, shards = build(replace(loaded, parallel=parallel))
    mine = sum(shard.piece.numel for shard in shards if shard.writer)
    built: list[Any] = [None] * WORLD
    dist.all_gather_object(built, mine)
    return {"built": sum(built), "counted": count_parameters(loaded.model).total}


for _name in ("telechat2-tiny", "telechat2-tiny-moe"):
    cases.add(f"preset_{_name}", partial(preset, _name))


@cases.case
def low_precision() -> dict[str, Any]:
    """bf16 and fp16 with TP2 x PP2: dtypes of parameters, finite loss near fp32's."""
    from megatron_telechat import parallel

    out = {}
    for precision in ("fp32", "bf16", "fp16"):
        run = run_of(MOE, LAYOUTS["moe_tp2_pp2"][1], precision=precision)
        state, virtual_stages, shards = build(run)
        loss = forward_backward(run, virtual_stages)
        out[precision] = loss if state.is_last_stage() else None
        out[f"{precision}_types"] = sorted({str(s.parameter.dtype) for s in shards})
        parallel.destroy(keep_world=True)
    return out


@cases.case
def missing_layer_is_an_error_on_every_rank() -> str:
    from megatron_telechat.errors import ConfigError
    from megatron_telechat.model import verify_tiling

    run = run_of(DENSE, dict(pipeline_model_parallel_size=4))
    state, _, shards = build(run)
    shards = [shard for shard in shards if "layers.1." not in shard.piece.key]
    try:
        verify_tiling(shards, run, state)
    except ConfigError as error:
        return str(error)
    return "no error"


@cases.case
def weight_decay_follows_the_table() -> dict[str, Any]:
    """Every parameter is in one group of the optimizer, and decays as its row says; megatron-core's own rule agrees."""
    from megatron_telechat.model import parameter_shards
    from megatron_telechat.training.optimizer import build_optimizer, wrap_data_parallel

    run = run_of(MOE, LAYOUTS["moe_etp2_ep2"][1])
    state, virtual_stages, _ = build(run)
    wrapped = wrap_data_parallel(virtual_stages, run, state)
    optimizer = build_optimizer(wrapped, run, state)
    factors = {id(p): group["wd_mult"] for group in optimizer.param_groups for p in group["params"]}
    shards = parameter_shards(wrapped, run, state)
    for shard in shards:
        spec, decays = shard.piece.spec, bool(factors.pop(id(shard.parameter)))
        assert decays == spec.decays, spec.key
        assert decays == (not shard.name.endswith(".bias") and shard.parameter.dim() > 1), spec.key
    return {"unknown": len(factors), "decay": sum(shard.piece.spec.decays for shard in shards), "all": len(shards)}


@cases.case
def unknown_parameter_is_an_error_on_every_rank() -> str:
    """A norm that somebody adds to the attention without a row in the table of tensors."""
    from megatron_telechat.backend import get_backend
    from megatron_telechat.errors import ConfigError
    from megatron_telechat.model import build_model, spec
    from megatron_telechat.model.attention import SelfAttention
    from megatron_telechat.model.norm import RMSNorm
    from megatron_telechat.parallel import initialize

    class WithNorm(SelfAttention):
        def __init__(self, config, **rest):
            super().__init__(config, **rest)
            self.q_norm = RMSNorm(config, config.kv_channels, config.layernorm_epsilon)

    run = run_of(DENSE)
    backend = get_backend("cpu")
    state = initialize(run, backend)
    kept, spec.SelfAttention = spec.SelfAttention, WithNorm
    try:
        build_model(run, state, backend)
    except ConfigError as error:
        return str(error)
    finally:
        spec.SelfAttention = kept
    return "no error"


if __name__ == "__main__":
    cases.main()

"""The three implementations that train_step.py compares, behind one small interface.

Each is built with the same weights at the same shapes, no biases, no dropout, no auxiliary loss,
so that the losses of a step agree. Run as a program, this file is a step server: one JSON line for
each line "step SEED" on stdin.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ARMS = ("ours", "megatron-core", "transformers")
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Shapes and precision of one comparison."""

    name: str
    moe: bool
    precision: Literal["fp32", "bf16"]
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    sequence: int = 1024
    vocabulary: int = 8192
    dense_width: int = 1408
    experts: int = 16
    topk: int = 4
    expert_width: int = 512

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


def weights(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Named fp32 weights, one after the other and always the same: (name, tensor)."""
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02)

    h = case.hidden
    yield "embedding", normal(case.vocabulary, h)
    for layer in range(case.layers):
        for name in ("query", "key", "value", "output"):
            yield f"{layer}.{name}", normal(h, h)
        if not case.moe:
            yield f"{layer}.fc1", normal(2, case.dense_width, h)
            yield f"{layer}.fc2", normal(h, case.dense_width)
            continue
        yield f"{layer}.router", normal(case.experts, h) * 5
        yield f"{layer}.fc1", normal(case.experts, 2, case.expert_width, h)
        yield f"{layer}.fc2", normal(case.experts, h, case.expert_width)
    yield "head", normal(case.vocabulary, h)


def fused_qkv(parts: dict[str, Tensor], layer: int, heads: int) -> Tensor:
    """Megatron's order: of each head its query, key and value rows."""
    split = [parts[f"{layer}.{name}"].unflatten(0, (heads, -1)) for name in ("query", "key", "value")]
    return torch.cat(split, dim=1).flatten(0, 1)


def build_ours(case: Case) -> tuple[torch.nn.Module, Step]:
    """Our specification, by the doors that training uses."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import ModelConfig, RunConfig, TrainingConfig

    backend = get_backend("cpu")
    backend.install()
    from megatron_telechat.model import build_model

    moe: dict[str, Any] = dict(
        num_experts=case.experts, moe_ffn_hidden_size=case.expert_width, moe_router_topk=case.topk
    )
    run = RunConfig(
        model=ModelConfig(
            architecture="mixtral",
            num_layers=case.layers,
            hidden_size=case.hidden,
            ffn_hidden_size=case.dense_width,
            num_attention_heads=case.heads,
            vocab_size=case.vocabulary,
            attention_output_bias=False,
            mlp_output_bias=False,
            **(moe if case.moe else {}),
        ),
        training=TrainingConfig(precision=case.precision, seq_length=case.sequence),
    )
    state = parallel.initialize(run, backend)
    model: Any
    (model,) = build_model(run, state, backend, initialize=False)
    parts = dict(weights(case))
    with torch.no_grad():
        model.embedding.word_embeddings.weight.copy_(parts["embedding"])
        model.output_layer.weight.copy_(parts["head"])
        model.decoder.final_layernorm.weight.fill_(1)
        for index, layer in enumerate(model.decoder.layers):
            layer.input_layernorm.weight.fill_(1)
            layer.pre_mlp_layernorm.weight.fill_(1)
            layer.self_attention.linear_qkv.weight.copy_(fused_qkv(parts, index, case.heads))
            layer.self_attention.linear_proj.weight.copy_(parts[f"{index}.output"])
            fc1, fc2 = parts[f"{index}.fc1"], parts[f"{index}.fc2"]
            if case.moe:
                layer.mlp.router.weight.copy_(parts[f"{index}.router"])
                layer.mlp.experts.linear_fc1.weight.copy_(fc1)
                layer.mlp.experts.linear_fc2.weight.copy_(fc2)
            else:
                layer.mlp.linear_fc1.weight.copy_(fc1.flatten(0, 1))
                layer.mlp.linear_fc2.weight.copy_(fc2)
    positions = torch.arange(case.sequence).unsqueeze(0)
    return model, lambda tokens, labels: model(tokens, positions, labels=labels).float().mean()


def build_core(case: Case) -> tuple[torch.nn.Module, Step]:
    """megatron-core's GPTModel with its own local specification: DotProductAttention, SequentialMLP, alltoall."""
    from megatron_telechat import parallel
    from megatron_telechat.backend import get_backend
    from megatron_telechat.config.schema import RunConfig

    backend = get_backend("cpu")
    backend.install()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel.initialize(RunConfig(), backend)
    experts = case.experts if case.moe else None
    moe: dict[str, Any] = dict(
        num_moe_experts=experts,
        moe_ffn_hidden_size=case.expert_width,
        moe_router_topk=case.topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden,
        ffn_hidden_size=case.dense_width,
        num_attention_heads=case.heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=case.dtype,
        bf16=case.precision == "bf16",
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        **(moe if case.moe else {}),
    )
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm")
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=case.vocabulary,
        max_sequence_length=case.sequence,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).to(case.dtype)
    parts = dict(weights(case))
    with torch.no_grad():
        model.embedding.word_embeddings.weight.copy_(parts["embedding"])
        model.output_layer.weight.copy_(parts["head"])
        for index, layer in enumerate(model.decoder.layers):
            layer.self_attention.linear_qkv.weight.copy_(fused_qkv(parts, index, case.heads))
            layer.self_attention.linear_proj.weight.copy_(parts[f"{index}.output"])
            fc1, fc2 = parts[f"{index}.fc1"], parts[f"{index}.fc2"]
            if not case.moe:
                layer.mlp.linear_fc1.weight.copy_(fc1.flatten(0, 1))
                layer.mlp.linear_fc2.weight.copy_(fc2)
                continue
            layer.mlp.router.weight.copy_(parts[f"{index}.router"])
            for number, expert in enumerate(layer.mlp.experts.local_experts):
                expert.linear_fc1.weight.copy_(fc1[number].flatten(0, 1))
                expert.linear_fc2.weight.copy_(fc2[number])
    positions = torch.arange(case.sequence).unsqueeze(0)
    # A boolean mask, True where attention is forbidden: what megatron-core's own data loader hands in.
    mask = torch.ones(1, 1, case.sequence, case.sequence).triu(1).bool()
    return model, lambda tokens, labels: model(tokens, positions, mask, labels=labels).float().mean()


def build_transformers(case: Case) -> tuple[torch.nn.Module, Step]:
    """Hugging Face transformers: sdpa attention, grouped_mm experts."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

    common: dict[str, Any] = dict(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.sequence,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    options: dict[str, Any] = dict(attn_implementation="sdpa", dtype=case.dtype)
    config: Any
    if case.moe:
        moe: dict[str, Any] = dict(
            num_local_experts=case.experts, num_experts_per_tok=case.topk, intermediate_size=case.expert_width
        )
        config = MixtralConfig(**common, **moe, sliding_window=None, output_router_logits=False)
        config._experts_implementation = "grouped_mm"
    else:
        config = LlamaConfig(**common, intermediate_size=case.dense_width)
    model: Any = AutoModelForCausalLM.from_config(config, **options)
    if case.moe:
        assert model.config._experts_implementation == "grouped_mm"
    parts = dict(weights(case))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(parts["embedding"])
        model.lm_head.weight.copy_(parts["head"])
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for name, linear in zip(
                ("query", "key", "value", "output"),
                (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                strict=True,
            ):
                linear.weight.copy_(parts[f"{index}.{name}"])
            fc1, fc2 = parts[f"{index}.fc1"], parts[f"{index}.fc2"]
            if case.moe:
                layer.mlp.gate.weight.copy_(parts[f"{index}.router"])
                layer.mlp.experts.gate_up_proj.copy_(fc1.flatten(1, 2))
                layer.mlp.experts.down_proj.copy_(fc2)
            else:
                layer.mlp.gate_proj.weight.copy_(fc1[0])
                layer.mlp.up_proj.weight.copy_(fc1[1])
                layer.mlp.down_proj.weight.copy_(fc2)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        # shift_labels: the labels are shifted already, as for the other two.
        return model(input_ids=tokens, labels=labels, shift_labels=labels).loss

    return model, loss


BUILDERS = {"ours": build_ours, "megatron-core": build_core, "transformers": build_transformers}


class Trainer:
    """A model, AdamW, and one step on a batch that depends on its number alone."""

    def __init__(self, arm: str, case: Case):
        self.case = case
        self.model, self.loss = BUILDERS[arm](case)
        self.model.train()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, number: int) -> dict[str, float]:
        """Forward, backward, AdamW; wall and CPU seconds, loss, page faults."""
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(self.case.vocabulary, (1, self.case.sequence + 1), generator=generator)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.loss(text[:, :-1], text[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "loss": float(loss),
            "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        }


def serve(arm: str, case: Case) -> None:
    """Answer requests on stdin until it closes."""
    torch.set_num_threads(1)
    trainer = Trainer(arm, case)
    print(json.dumps({"parameters": trainer.parameters, "case": asdict(case)}), flush=True)
    for line in sys.stdin:
        command, number = line.split()
        if command == "profile":
            profile(trainer, int(number))
        else:
            print(json.dumps(trainer.step(int(number))), flush=True)


def profile(trainer: Trainer, number: int) -> None:
    """torch.profiler's table of one step, on stderr."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        result = trainer.step(number)
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
    print(table, file=sys.stderr, flush=True)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Case(**json.loads(sys.argv[2])))

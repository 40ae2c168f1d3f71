"""Published training runs from a JSON file, as questions to `planner.estimate`.

The file has a list `rows`. Of a row are read: id, source, grade, split, gpus, hardware, device (name of a device file,
or null), device_overrides, framework, precision (bf16, fp16, fp32, fp8), model, layout, recompute, flash_attention,
distributed_optimizer, fsdp (false, full_shard, shard_grad_op), overlap, imbalance, measured, peak_memory_gb, ran.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_telechat.config import load_run_config
from megatron_telechat.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from megatron_telechat.costs.devices import DeviceSpec, device_spec
from megatron_telechat.costs.software import EXPERT_OVERLAP, TENSOR_OVERLAP, Software
from megatron_telechat.errors import ConfigError

Question = tuple[ModelConfig, ParallelConfig, TrainingConfig, DeviceSpec, Software]

HARDWARE = (
    ("GB300", "gb300"), ("GB200", "gb200"), ("B300", "b300"), ("B200", "b200"), ("H200", "h200-141g"),
    ("H100", "h100-80g"), ("A100 40", "a100-40g"), ("A100", "a100-80g"), ("MI355X", "mi355x"), ("MI325X", "mi325x"),
    ("MI300X", "mi300x"), ("910C", "ascend-910c"), ("910B2", "ascend-910b2"), ("910B", "ascend-910b-64g"),
)  # fmt: skip
"""What a text on hardware names, where a row names no device file."""

POSITIONS: dict[str, Literal["rope", "learned_absolute"]] = {"rope": "rope", "learned": "learned_absolute"}
TENSOR_OVERLAPS = (("mc2", 0.8), ("interleave", 0.27))
"""Share of the tensor-parallel exchange that two programs on Ascend hide, fitted: ModelLink's fused kernels (MC2), and
MindSpore's two halves of a micro-batch (fine_grain_interleave 2)."""
PROGRAMS: tuple[tuple[str, dict[str, Any]], ...] = (
    # fp16 runs of Megatron-LM before 2023 keep gradients in fp16 (--accumulate-allreduce-grads-in-fp32 is not given);
    # hidden states go to the next stage in pieces (arXiv 2104.04473, section 4.1)
    (r"Megatron-LM 202[0-2]", {"gradient_bytes": 2, "message_pieces": True}),
    # its BF16 optimizer reduces gradients in 16 bits
    (r"Megatron-DeepSpeed", {"all_reduces": True, "message_pieces": True}),
    # hybrid ZeRO: gradients in the type of the parameters, reduced over all ranks and stepped within eight
    (r"InternEvo", {"gradient_bytes": 2, "all_reduces": True}),
    # its recipes set tp_comm_overlap
    (r"Megatron-Bridge|NeMo", {"tensor_overlap": TENSOR_OVERLAP}),
    # MindSpore's parallel optimizer shards the weights, too, and gathers them for a layer; in a pipeline once a step
    (r"MindFormers|TeleChat2", {"sharding": "full"}),
    # mixed_precision PURE: FSDP reduces in bf16
    (r"llm-foundry", {"gradient_bytes": 2, "plain_kernels": True, "attention": "flash2"}),
    (r"AA-Scaling", {"plain_kernels": True, "all_reduces": True, "reduction_share": 0.28}),
)
"""What is known of programs, by a pattern of their names."""


@dataclass(frozen=True)
class Row:
    """One published run.

    Attributes:
        entry: as the file has it.
        tokens_per_s: published, a device; 0 where the run ran out of memory.
    """

    entry: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.entry["id"]

    @property
    def source(self) -> str:
        return self.entry["source"]

    @property
    def grade(self) -> str:
        return self.entry.get("grade") or "C"

    @property
    def program(self) -> str:
        return self.entry.get("framework") or "unknown"

    @property
    def ran(self) -> bool:
        return bool(self.entry["ran"])

    @property
    def tokens_per_s(self) -> float:
        measured = self.entry["measured"]
        return measured.get("tokens_per_s_per_gpu") or measured.get("tokens_per_s_per_gpu_derived") or 0.0

    @property
    def peak_gb(self) -> float | None:
        return self.entry.get("peak_memory_gb")

    @property
    def device_name(self) -> str:
        """Name of the device file, in lower case."""
        known = self.entry.get("device")
        if known:
            spec = device_spec(known)
            return spec.name if spec else known.lower()
        text = (self.entry.get("hardware") or "").upper()
        return next((name for word, name in HARDWARE if word in text), "unknown")

    @property
    def moe(self) -> bool:
        return bool(self.entry["model"].get("experts")) or "39b-a12b" in str(self.entry["model"].get("preset"))

    @property
    def gated(self) -> bool:
        return self.entry["model"].get("gated_mlp", True) is not False

    @property
    def flash(self) -> bool:
        return self.entry.get("flash_attention", True) is not False

    @property
    def fsdp(self) -> bool:
        return bool(self.entry.get("fsdp"))

    @property
    def fp8(self) -> bool:
        return self.entry["precision"] == "fp8"

    @property
    def ranks(self) -> int:
        return int(self.entry["gpus"])

    @property
    def recompute(self) -> str | None:
        return (self.entry.get("recompute") or {}).get("granularity")

    @property
    def tp(self) -> int:
        return self._size("tp")

    @property
    def pp(self) -> int:
        return self._size("pp")

    @property
    def vpp(self) -> int:
        return self._size("vpp")

    @property
    def cp(self) -> int:
        return self._size("cp")

    @property
    def ep(self) -> int:
        return self._size("ep")

    @property
    def etp(self) -> int:
        return self._size("etp")

    @property
    def family(self) -> str:
        """What layouts are compared within."""
        model = self.entry["model"]
        name = model.get("preset") or " ".join(
            f"{key[0]}{model[key]}" for key in ("layers", "hidden", "seq", "experts", "expert_ffn") if model.get(key)
        )
        return f"{self.source}: {name}, {self.ranks} x {self.device_name}, {self.entry['precision']}"

    def _size(self, name: str) -> int:
        return int(self.entry["layout"].get(name) or 1)

    def question(self) -> Question:
        """Model, layout, device and program of the row.

        Raises:
            ConfigError: nothing is known of its device, or it names no batch.
        """
        device = device_spec(self.device_name)
        if device is None:
            raise ConfigError(f"no device file for {self.entry.get('hardware')!r}", self.id, "a file in costs/devices/")
        device = replace(device, **(self.entry.get("device_overrides") or {}))
        if self.entry["model"].get("preset"):
            model, parallel, training = self._preset()
        else:
            model, parallel, training = self.model(), self.parallel(), self.training()
        software = self.software()
        if parallel.pipeline_model_parallel_size > 1 and not self.fsdp:
            software = replace(software, sharding="none")
        return model, parallel, training, device, software

    def _preset(self) -> tuple[ModelConfig, ParallelConfig, TrainingConfig]:
        """The YAMLs of MindFormers say nothing of overlaps, which the presets turn on for this program."""
        preset, ranks = self.entry["model"]["preset"], str(self.ranks)
        flags = ["--preset", preset, "--dry-run", "--world-size", ranks, "--no-overlap-grad-reduce"]
        run = load_run_config([*flags, "--no-overlap-param-gather"], {}).run
        return run.model, run.parallel, run.training

    def model(self) -> ModelConfig:
        """The architecture; models without a gate are taken for GPT's: LayerNorm, and biases unless the program is
        known to have none."""
        model, tp = self.entry["model"], self.tp
        gpt = not self.gated and "llm-foundry" not in self.program
        experts = model.get("experts")
        return ModelConfig(
            num_layers=model["layers"],
            hidden_size=model["hidden"],
            ffn_hidden_size=model["ffn"],
            activation="swiglu" if self.gated else "gelu",
            num_attention_heads=model["heads"],
            num_query_groups=model["groups"],
            kv_channels=model.get("head_dim"),
            vocab_size=-(-model["vocab"] // tp) * tp,
            untie_embeddings_and_output_weights=self.gated,
            normalization="RMSNorm" if self.gated else "LayerNorm",
            attention_output_bias=False,
            mlp_output_bias=False,
            add_bias_linear=gpt,
            position_embedding_type=POSITIONS.get(model["positions"], "none"),
            max_position_embeddings=model["seq"],
            attention_dropout=0.1 if re.match(r"Megatron-LM 202[0-2]", self.program) else 0.0,
            hidden_dropout=0.1 if re.match(r"Megatron-LM 202[0-2]", self.program) else 0.0,
            num_experts=experts,
            moe_ffn_hidden_size=model.get("expert_ffn") if experts else None,
            moe_router_topk=model.get("topk") or 2,
            moe_layer_pattern=model.get("moe_pattern"),
            moe_shared_expert_intermediate_size=model.get("shared_expert_ffn") or None,
            moe_aux_loss_coeff=0.01 if experts else 0.0,
        )

    def parallel(self) -> ParallelConfig:
        """Sizes, split and overlaps."""
        layout, overlap = self.entry["layout"], self.entry.get("overlap") or []
        stages = layout.get("stage_layers")
        text = None
        if stages:
            last = len(stages) - 1
            text = "|".join("E" * (at == 0) + f"t*{n}" + "L" * (at == last) for at, n in enumerate(stages))
        sharded = bool(self.entry.get("distributed_optimizer")) or self.fsdp
        return ParallelConfig(
            world_size=self.ranks,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            pipeline_model_parallel_layout=text,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=layout.get("sp") is not False,
            use_distributed_optimizer=sharded,
            overlap_grad_reduce="grad" in overlap,
            overlap_param_gather="param" in overlap and sharded,
        )

    def training(self) -> TrainingConfig:
        """Length, batch, precision, recompute."""
        layout, recompute = self.entry["layout"], self.entry.get("recompute") or {}
        if not layout.get("gbs"):
            raise ConfigError("the global batch is not published", self.id, "a row with one")
        granularity = self.recompute if self.recompute in ("full", "selective") else None
        return TrainingConfig(
            precision="bf16" if self.fp8 else self.entry["precision"],
            fp8_format="hybrid" if self.fp8 else None,
            seq_length=self.entry["model"]["seq"],
            micro_batch_size=layout["mbs"],
            global_batch_size=layout["gbs"],
            recompute_granularity=granularity,
            recompute_method=recompute.get("method") or "uniform",
            recompute_num_layers=recompute.get("num_layers"),
            recompute_modules=_modules(recompute.get("modules") or ()),
            loss_chunk_rows=0,
        )

    def software(self) -> Software:
        """What is known of its program, and what it overlaps."""
        overlap = " ".join(self.entry.get("overlap") or []).lower()
        known: dict[str, Any] = {}
        for pattern, facts in PROGRAMS:
            if re.search(pattern, self.program):
                known |= facts
        if re.search(r"\btp\b", overlap):
            known["tensor_overlap"] = next((s for word, s in TENSOR_OVERLAPS if word in overlap), TENSOR_OVERLAP)
        if re.search(r"\b(ep|moe|a2a)\b", overlap):
            known["expert_overlap"] = EXPERT_OVERLAP
        if re.search(r"deepep|flex|hybridep", overlap):
            known["expert_by_node"] = True
        fsdp = self.entry.get("fsdp")
        if fsdp:
            known["sharding"] = "gradients" if fsdp == "shard_grad_op" else "full"
        if not self.entry.get("distributed_optimizer") and not fsdp:
            known.pop("sharding", None)
        if not self.flash:
            known["attention"] = "unfused"
        return Software(
            moe_imbalance=self.entry.get("imbalance") or 1.0,
            experts_in_fp8=self.fp8,
            **known,
        )


def _modules(names: Any) -> tuple[Any, ...]:
    """Those that the cost model knows: what a module of another name (moe_act, shared_experts) saves is small."""
    known = tuple(name for name in names if name in ("core_attn", "mlp", "moe", "layernorm"))
    return known or ("layernorm",)


def read_rows(path: Path, split: str | None = None, only: str | None = None) -> list[Row]:
    """The rows of a file, those of a split alone, and of an expression that id, source or program match.

    Raises:
        ConfigError: the file is not there, or not of this format.
    """
    try:
        found = [Row(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        rows = [row for row in found if split is None or row.entry.get("split") == split]
        return [row for row in rows if not only or re.search(only, f"{row.id} {row.source} {row.program}")]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "--json", "the file of published runs") from None
    except (ValueError, KeyError, TypeError, re.error) as error:
        raise ConfigError(f"{path}: {error!r}", "--json", "an object with a list of rows") from None

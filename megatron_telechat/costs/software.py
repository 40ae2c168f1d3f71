"""What a training program does beyond the shapes: which kernels it has, what it overlaps, what it shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_telechat.config.schema import RunConfig

AUTO_CHUNKS = 4
"""Pieces of a MoE layer's input where the run chooses their number itself, by trying."""

Attention = Literal["fused", "flash2", "ordered", "unfused"]
Sharding = Literal["none", "gradients", "full"]


@dataclass(frozen=True)
class Software:
    """What the training program does beyond the shapes.

    Attributes:
        tensor_overlap: share of the tensor-parallel communication of the layers that compute hides; 0 for plain
            Megatron-Core.
        moe_chunks: pieces of a micro-batch whose dispatch, experts and way back overlap; 1: one after the other.
        moe_imbalance: rows of the busiest rank's experts over the mean.
        expert_overlap: share of the expert exchange that the compute of another micro-batch hides.
        expert_by_node: rows of experts cross to another node once (`expert_exchange_seconds`).
        shared_overlap: a shared expert is computed beside the exchange of the routed ones.
        attention: kernel of the core attention. fused: the fastest there is for the device; flash2: FlashAttention-2;
            ordered: that with a backward whose sums have a fixed order (`--deterministic`); unfused: the matrix of
            scores is written to memory.
        sharding: of the parameters over the data-parallel ranks, as in PyTorch's FSDP. full: gathered for a forward and
            again for a backward; gradients: gathered once for both (shard_grad_op).
        gradient_bytes: of an element of the gradients, as they are accumulated and reduced.
        message_pieces: where the sequence is not split, each tensor-parallel rank sends its part of the hidden states
            to the next stage, and they are gathered there (Megatron-LM before 2023).
        experts_in_fp8: the experts' products are in FP8 too, where others are.
        plain_kernels: PyTorch's own, one for each operation, where Megatron-Core has fused ones.
        all_reduces: every rank gets all gradients, also where it steps a part of the parameters (DeepSpeed's ZeRO-1).
        reduction_share: of the links' speed that its exchange of gradients and parameters after a step reaches.
    """

    tensor_overlap: float = 0.0
    moe_chunks: int = 1
    moe_imbalance: float = 1.0
    expert_overlap: float = 0.0
    expert_by_node: bool = False
    shared_overlap: bool = False
    attention: Attention = "fused"
    sharding: Sharding = "none"
    gradient_bytes: int = 4
    message_pieces: bool = False
    experts_in_fp8: bool = False
    plain_kernels: bool = False
    all_reduces: bool = False
    reduction_share: float = 1.0

    @classmethod
    def of(cls, run: RunConfig) -> Software:
        """Our own training of this run; `moe_input_chunks` auto counts as AUTO_CHUNKS."""
        chunks = run.parallel.moe_input_chunks
        return cls(
            moe_chunks=AUTO_CHUNKS if chunks == "auto" else int(chunks),
            attention="ordered" if run.training.deterministic else "fused",
        )


TENSOR_OVERLAP = 0.6
"""Share of the tensor-parallel exchange hidden by --tp-comm-overlap: 0.3 to 0.5 stays exposed in published runs that
overlap it (TransformerEngine's user buffers, Ascend's MC2)."""
EXPERT_OVERLAP = 0.65
"""Share of the expert exchange hidden by --overlap-moe-expert-parallel-comm, which computes one micro-batch beside the
exchange of another: 0.2 to 0.35 stays exposed."""
EXPERT_OVERLAP_LATE_WEIGHTS = 0.8
"""The same with --delay-wgrad-compute, whose weight gradients fill gaps of the exchange."""


def megatron_software(
    run: RunConfig, flags: Mapping[str, tuple[str, ...]], own: bool = True
) -> tuple[Software, tuple[str, ...]]:
    """The program, and what of it matters to this run, for people. The program is that of any parallel sizes.

    Args:
        flags: Megatron-LM's flags that are not ours, without hyphens before and with hyphens inside, and their values.
        own: the run is of our training; else a command of Megatron-LM, with Transformer Engine's kernels.
    """
    software, said = Software.of(run), []
    if not own:
        software, said = _of_command(run, flags, replace(software, attention="fused"))
    moe, tensor = run.model.is_moe, run.parallel.tensor_model_parallel_size > 1
    if "tp-comm-overlap" in flags and (hidden := TENSOR_OVERLAP * _pieces(flags)):
        software = replace(software, tensor_overlap=hidden)
        said += [f"--tp-comm-overlap hides {hidden:.0%} of the tensor-parallel exchange of a layer"] * tensor
    if "overlap-moe-expert-parallel-comm" in flags:
        late = "delay-wgrad-compute" in flags
        software = replace(software, expert_overlap=EXPERT_OVERLAP_LATE_WEIGHTS if late else EXPERT_OVERLAP)
        names = "--overlap-moe-expert-parallel-comm" + " --delay-wgrad-compute" * late
        said += [f"{names} hides {software.expert_overlap:.0%} of the expert exchange"] * moe
    if flags.get("moe-token-dispatcher-type", ())[-1:] == ("flex",):
        software = replace(software, expert_by_node=True)
        said += ["--moe-token-dispatcher-type flex sends a token to another node once"] * moe
    if "moe-shared-expert-overlap" in flags:
        software = replace(software, shared_overlap=True)
        shared = moe and bool(run.model.moe_shared_expert_intermediate_size)
        said += ["--moe-shared-expert-overlap computes the shared expert beside the expert exchange"] * shared
    return software, tuple(said)


def _of_command(run: RunConfig, flags: Mapping[str, tuple[str, ...]], software: Software) -> tuple[Software, list[str]]:
    """What a command of Megatron-LM says of kernels, of the type of gradients and of sharded parameters."""
    said = []
    if flags.get("attention-backend", ())[-1:] in (("unfused",), ("local",)):
        software = replace(software, attention="unfused")
        said.append("--attention-backend: the scores of the attention are written to memory")
    elif "deterministic-mode" in flags:
        software = replace(software, attention="ordered")
        said.append("--deterministic-mode: the backward of the attention adds in a fixed order")
    half = run.training.precision == "fp16" and "accumulate-allreduce-grads-in-fp32" not in flags
    if "grad-reduce-in-bf16" in flags or half:
        software = replace(software, gradient_bytes=2)
        said.append("gradients are accumulated and reduced in 16 bits")
    strategy = flags.get("data-parallel-sharding-strategy", ("no_shard",))[-1:]
    if "use-torch-fsdp2" in flags or strategy == ("optim_grads_params",):
        software = replace(software, sharding="full")
        said.append("parameters are sharded: each micro-batch gathers them twice and reduces its gradients")
    elif strategy == ("optim_grads",):
        software = replace(software, sharding="gradients")
        said.append("gradients are sharded: each micro-batch reduces its own")
    return software, said


def _pieces(flags: Mapping[str, tuple[str, ...]]) -> float:
    """Share of the exchange that is overlapped at all: gathers are half of it, scatters the other."""
    off = (
        any(f"{no}-tp-comm-{kind}-{piece}" in flags for no in ("disable", "no") for kind in ("overlap", "split"))
        for piece in ("ag", "rs")
    )
    return 1 - sum(off) / 2

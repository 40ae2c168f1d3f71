"""What the flags of Megatron-LM say of the training program that a pasted command starts, beyond shapes and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.costs.time import Software

TENSOR_OVERLAP = 0.6
"""Share of the tensor-parallel exchange hidden by --tp-comm-overlap: 0.3 to 0.5 stays exposed in published runs that
overlap it (TransformerEngine's user buffers, Ascend's MC2)."""
EXPERT_OVERLAP = 0.65
"""Share of the expert exchange hidden by --overlap-moe-expert-parallel-comm, which computes one micro-batch beside the
exchange of another: 0.2 to 0.35 stays exposed."""
EXPERT_OVERLAP_LATE_WEIGHTS = 0.8
"""The same with --delay-wgrad-compute, whose weight gradients fill gaps of the exchange."""


def megatron_software(run: RunConfig, flags: Mapping[str, tuple[str, ...]]) -> tuple[Software, tuple[str, ...]]:
    """The program, and what of it matters to this run, for people. The program is that of any parallel sizes.

    Args:
        flags: Megatron-LM's flags that are not ours, without hyphens before and with hyphens inside, and their values.
    """
    software, said = Software.of(run), []
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


def _pieces(flags: Mapping[str, tuple[str, ...]]) -> float:
    """Share of the exchange that is overlapped at all: gathers are half of it, scatters the other."""
    off = (
        any(f"{no}-tp-comm-{kind}-{piece}" in flags for no in ("disable", "no") for kind in ("overlap", "split"))
        for piece in ("ag", "rs")
    )
    return 1 - sum(off) / 2

"""The fp16 loss scale in a checkpoint: one for the whole model, and what releases that kept two of them wrote.

Those moved the scale of the dense and of the expert parameters each by its own overflows, but multiplied the loss by
the dense one alone. Once the two parted, the experts' gradients were off by their ratio, and so are Adam's moments.
What a manifest says of them is read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_telechat.errors import CheckpointError, Problem
from megatron_telechat.locations import Location

SCALE = "scale"


def scaler_state(optimizer: Any) -> dict[str, Any]:
    """The loss scale with its trackers; empty for bf16 and fp32."""
    import torch

    scaler = getattr(optimizer, "grad_scaler", None)
    state = {} if scaler is None else scaler.state_dict()
    return {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def load_scaler_state(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Set the loss scale and its trackers to what :func:`one_scale` made of a checkpoint's; nothing where one of them
    has none."""
    import torch

    scaler = getattr(optimizer, "grad_scaler", None)
    if scaler is None or not saved:
        return
    scaler.load_state_dict(
        {
            name: torch.full_like(value, saved[name]) if isinstance(value, torch.Tensor) else saved[name]
            for name, value in scaler.state_dict().items()
        }
    )


def one_scale(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state to go on with, from ``optimizer.grad_scaler`` of a manifest.

    Of a pair that agrees on the scale, the trackers that let it grow last and fall first; :func:`diverged_scales` has
    refused any other.
    """
    if not saved or SCALE in saved:
        return dict(saved or {})
    pair = list(saved.values())
    return {name: min(one[name] for one in pair) for name in pair[0]}


def diverged_scales(optimizer: Mapping[str, Any] | None) -> Problem | None:
    """What is wrong with the ``optimizer`` entry of a manifest whose loss scales have parted; None where they have
    not."""
    saved = (optimizer or {}).get("grad_scaler") or {}
    if SCALE in saved or len({one[SCALE] for one in saved.values()}) < 2:
        return None
    dense, expert = saved["dense"][SCALE], saved["expert"][SCALE]
    times, direction = max(dense, expert) / min(dense, expert), "small" if expert > dense else "large"
    return Problem(
        f"it holds two loss scales, {dense:g} of the dense and {expert:g} of the expert parameters: an older release "
        f"let them part, so the experts have been trained with gradients too {direction}, last by {times:g} times, "
        "and Adam's moments are of these",
        fix="--load-step N, a step from before they parted; or --no-load-optim, to continue from these weights with "
        "fresh moments",
    )


def require_one_scale(optimizer: Mapping[str, Any] | None, folder: Location) -> None:
    """Refuse to resume with the optimizer state of a checkpoint whose loss scales have parted.

    Args:
        optimizer: that entry of its manifest.
        folder: the checkpoint.

    Raises:
        CheckpointError: they have.
    """
    parted = diverged_scales(optimizer)
    if parted is not None:
        raise CheckpointError(replace(parted, where=str(folder)))

"""Numbers that are not finite end a run on every rank, with the names of the tensors they are in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
import torch.distributed as dist

from megatron_telechat.errors import NumericsError, UserError
from megatron_telechat.model.shards import LocalParameter
from megatron_telechat.parallel.agreement import gather_objects

FIX = "resume from the last checkpoint; lower lr, look at the data of this step, or train in fp32 to compare"


def step_error(found: str, step: int, shards: Sequence[LocalParameter], fix: str = FIX) -> UserError:
    """The error of a step that was not taken; collective, since it names the gradients of all ranks.

    Args:
        found: what is not finite.
        step: completed steps.
        shards: whose gradients it names.
        fix: what to do.
    """
    gradients = ((shard, getattr(shard.parameter, "main_grad", None)) for shard in shards)
    where = culprits(gradients) or "no single gradient is non-finite"
    return NumericsError(f"step {step + 1}: {found}; the optimizer step was not taken", where, fix).on_every_rank()


def finite_everywhere(value: float, device: torch.device) -> bool:
    """Whether a number is finite on every rank. Collective: the gradient norm may differ between model replicas, so it
    is agreed on.

    Args:
        device: of the agreement.
    """
    bad = torch.tensor([float(not math.isfinite(value))], device=device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()


def require_finite_weights(step: int, shards: Sequence[LocalParameter]) -> None:
    """Check what is about to be saved; collective. The parameters have been gathered.

    The step that a loss and its gradients allowed can still carry a weight out of the range of its type: fp16 ends at
    65,504.

    Raises:
        NumericsError: on every rank, naming ranks and parameters.
    """
    where = culprits((shard, shard.parameter) for shard in shards)
    if where:
        raise NumericsError(
            f"step {step} left weights that are not finite; they were not saved", where, FIX
        ).on_every_rank()


def require_finite_validation(loss: float) -> None:
    """Check a validation loss, which is the same on every rank.

    Raises:
        NumericsError: on every rank.
    """
    if not math.isfinite(loss):
        raise NumericsError(f"validation loss {loss}", "evaluation", FIX).on_every_rank()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. One pass over them: a sum is finite only then; one that overflows is looked at
    again."""
    total = tensor.detach().sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def culprits(tensors: Iterable[tuple[LocalParameter, torch.Tensor | None]]) -> str:
    """Where the tensors of all ranks are not finite, four ranks and three tensors of each; "" where all are.
    Collective."""
    bad = (shard.piece.key for shard, tensor in tensors if tensor is not None and not is_finite(tensor))
    everyone = gather_objects(list(islice(bad, 3)))
    return "; ".join([f"rank {rank}: {', '.join(keys)}" for rank, keys in enumerate(everyone) if keys][:4])

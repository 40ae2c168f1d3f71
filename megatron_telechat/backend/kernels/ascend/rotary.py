"""The fused projection split into query, key and value, the first two rotated by ``npu_rotary_mul``; and the same back.

The rotation is computed in fp32: the kernel wants tables of the type of the rows, and 16-bit tables would round the
angles. Its backward is the rotation by the opposite angle, so that nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor


def _whole(table: Tensor) -> Tensor:
    """[s, b or 1, 1, 1, d / 2] → [s, b or 1, 1, d]: for both halves of a head."""
    return torch.cat((table, table), -1).squeeze(2).contiguous()


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[s, b, heads, d] in fp32.

    Args:
        heads: [s, b, heads, d] of any type.
        cos, sin: [s, b or 1, 1, d] fp32.
    """
    return torch_npu.npu_rotary_mul(heads.float().contiguous(), cos, sin, rotary_mode="half")


def split_and_rotate(mixed: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, contiguous: [b, heads, s, d] if `heads_first`, else [s, b, heads, d].

    Args:
        mixed: [s, b, groups, rep + 2, d]; of each group its query heads, its key, its value.
        cos, sin: fp32 [s, b or 1, 1, 1, d / 2].
    """
    cos, sin = _whole(cos), _whole(sin)
    query, key, value = (part.flatten(2, 3) for part in mixed.split((mixed.shape[3] - 2, 1, 1), dim=3))
    heads = (_rotated(query, cos, sin).to(mixed.dtype), _rotated(key, cos, sin).to(mixed.dtype), value)
    if heads_first:
        heads = tuple(part.permute(1, 2, 0, 3) for part in heads)
    return heads[0].contiguous(), heads[1].contiguous(), heads[2].contiguous()


def mixed_gradient(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, heads_first: bool) -> Tensor:
    """[s, b, groups, rep + 2, d], the gradient of `mixed`, from those of query, key and value in any strides."""
    cos, back = _whole(cos), _whole(-sin)
    query, key, value = (grad.permute(2, 0, 1, 3) if heads_first else grad for grad in grads)
    groups = key.shape[2]
    turned = (_rotated(query, cos, back), _rotated(key, cos, back), value)
    return torch.cat([part.to(value.dtype).unflatten(2, (groups, -1)) for part in turned], dim=3)


def check(device: torch.device) -> None:
    """Against complex numbers on the host, forward and back, with tables beyond 1 too. Raises ArithmeticError.

    The interface names [-1, 1] as the range of the tables; a model that scales its attention by its length goes beyond.
    """
    from megatron_telechat.backend.kernels import require_close

    s, b, groups, rep, dim = 5, 2, 3, 2, 64
    angles = torch.arange(s * b * dim // 2, dtype=torch.float32).view(s, b, 1, 1, dim // 2)
    for dtype, scale in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float32, 1.5)):
        numbers = torch.arange(s * b * groups * (rep + 2) * dim, dtype=torch.float32).mul_(0.7).cos_()
        mixed = numbers.view(s, b, groups, rep + 2, dim).to(dtype)
        for table in (angles, angles[:, :1]):
            pairs = torch.complex(*mixed.float().chunk(2, -1))
            turned = torch.view_as_real(pairs * torch.polar(torch.full_like(table, scale), table))
            turned = torch.cat(turned.unbind(-1), -1)
            expected = (turned[..., :rep, :], turned[..., rep : rep + 1, :], mixed[..., rep + 1 :, :].float())
            cos, sin = (scale * table.cos()).to(device), (scale * table.sin()).to(device)
            for heads_first in (True, False):
                found = split_and_rotate(mixed.to(device), cos, sin, heads_first)
                for one, wanted in zip(found, expected, strict=True):
                    wanted = wanted.flatten(2, 3)
                    wanted = wanted.permute(1, 2, 0, 3) if heads_first else wanted
                    require_close(one.cpu(), wanted, "rotary")
                again = mixed_gradient(found, cos, sin, heads_first).float().cpu()
                back = mixed.float() * torch.tensor([scale**2] * (rep + 1) + [1.0]).unsqueeze(1)
                require_close(again.to(dtype), back, "rotary, back")

"""Products of all groups of rows at once, such as the rows of each expert with its weights.

``npu_grouped_matmul`` cuts along the rows of the result (``group_type`` 0) or along the sum (2). The group sizes are a
tensor of the device, as running sums (``group_list_type`` 0): a list of counts may not have a single entry. At most
1024 groups; the last axis of an operand, and of what a transposed one lies in, must be below 65536.
"""

from __future__ import annotations

# torch_npu is installed on Ascend machines only.
# pyright: reportMissingImports=false
import torch
import torch_npu
from torch import Tensor

ROWS, SUM = 0, 2
"""``group_type``: the axis of the products that is cut into groups."""
ONE_TENSOR = 3
"""``split_item``: the result is one tensor."""
RUNNING_SUMS = 0
"""``group_list_type``: where each group ends."""


def product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[N, q]: the rows of every group times its own matrix.

    Args:
        a: [N, p], rows by group.
        b: [groups, p, q], contiguous or a view with the last two axes exchanged.
        offsets: [groups], where the rows of each group end; the last is N.
    """
    (out,) = torch_npu.npu_grouped_matmul(
        [a.contiguous()],
        [b],
        group_list=offsets.long(),
        split_item=ONE_TENSOR,
        group_type=ROWS,
        group_list_type=RUNNING_SUMS,
    )
    return out


def sum_product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[groups, p, q]: ``a_g^T b_g`` of every group.

    Args:
        a: [N, p], rows by group; every group has some, since the interface does not say what a sum over none writes.
        b: [N, q].
        offsets: [groups], where the rows of each group end.
    """
    (out,) = torch_npu.npu_grouped_matmul(
        [a.contiguous().t()],  # must be a transposed view
        [b.contiguous()],
        group_list=offsets.long(),
        split_item=ONE_TENSOR,
        group_type=SUM,
        group_list_type=RUNNING_SUMS,
    )
    return out.view(len(offsets), a.shape[1], b.shape[1])


def accumulates(buffer: Tensor, a: Tensor) -> bool:
    """Whether :func:`accumulate` takes these types: 16-bit rows into an fp32 buffer."""
    return buffer.dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16) and buffer.is_contiguous()


def accumulate(buffer: Tensor, a: Tensor, b: Tensor, offsets: Tensor, fresh: bool) -> None:
    """``buffer[g] += a_g^T b_g`` for every group.

    Args:
        buffer: [groups, p, q] fp32, contiguous; replaced if `fresh`.
        a: [N, p], rows by group; bf16 or fp16.
        b: [N, q] of the same type.
        offsets: [groups], where the rows of each group end.
        fresh: the buffer holds nothing yet.
    """
    if fresh:
        buffer.zero_()
    torch_npu.npu_grouped_matmul_add_(
        buffer, a.contiguous(), b.contiguous(), offsets.long(), transpose_x=True, group_type=SUM
    )


def check(device: torch.device) -> None:
    """Groups, some of them without rows; both forms of weights. Raises ArithmeticError."""
    from megatron_telechat.backend.kernels import require_close

    p, q = 48, 32
    for counts in ((5, 0, 7), (12, 3, 0), (5, 3, 7), (9,)):
        rows, groups = sum(counts), len(counts)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        numbers = torch.arange(rows * (p + q) + groups * p * q, dtype=torch.float32).mul_(0.7).sin_()
        a, b, weights = numbers.split((rows * p, rows * q, groups * p * q))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y, w = (
                t.view(shape).to(dtype) for t, shape in ((a, (rows, p)), (b, (rows, q)), (weights, (groups, p, q)))
            )
            parts = list(zip(x.float().split(counts), y.float().split(counts), w.float(), strict=True))
            expected = torch.cat([part @ weight for part, _, weight in parts])
            sums = torch.stack([part.t() @ other for part, other, _ in parts])
            on_device = [t.to(device) for t in (x, y, w, ends)]
            for plain in (True, False):
                weight = on_device[2] if plain else on_device[2].transpose(1, 2).contiguous().transpose(1, 2)
                require_close(product(on_device[0], weight, on_device[3]).cpu(), expected, "a grouped product")
            if all(counts):
                found = sum_product(on_device[0], on_device[1], on_device[3])
                require_close(found.cpu(), sums, "a grouped sum")
            buffer = torch.ones(sums.shape, device=device)
            if accumulates(buffer, on_device[0]):
                for fresh, wanted in ((False, sums + 1), (True, sums)):
                    accumulate(buffer, on_device[0], on_device[1], on_device[3], fresh)
                    require_close(buffer.to(dtype).cpu(), wanted, "a grouped sum into fp32")

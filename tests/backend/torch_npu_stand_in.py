"""The functions of torch_npu that the package calls, in plain torch on the CPU.

Written from what torch_npu 2.13.0 documents of each, with the documented demands on the arguments as assertions. It
shows whether *we* call them rightly: transposed operands, running sums, masks, layouts. It is no evidence of what the
kernels of an Ascend device compute.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import types
from collections import Counter

import torch
from torch import Tensor

from tests.backend.torch_npu_signatures import SIGNATURES

TYPES = (torch.float32, torch.bfloat16, torch.float16)

calls: Counter[str] = Counter()
"""How often each function was called, with what tells its uses apart."""


def _is_transposed(x: Tensor) -> bool:
    return x.stride(-2) == 1 and x.stride(-1) == x.shape[-2]


def _groups(group_list: Tensor, group_list_type: int, rows: int) -> list[int]:
    """Rows of every group."""
    assert isinstance(group_list, Tensor) and group_list.dtype == torch.int64 and group_list.dim() == 1
    assert group_list_type == 0 and len(group_list) <= 1024
    ends = group_list.tolist()
    assert ends == sorted(ends) and ends[-1] == rows, "running sums, the last of them the number of rows"
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def npu_grouped_matmul(x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None,
                       per_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None,
                       activation_quant_offset=None, split_item=0, group_type=None, group_list_type=0, act_type=0,
                       output_dtype=None, tuning_config=None):  # fmt: skip
    (left,), (right,) = x, weight
    assert split_item in (2, 3) and act_type == 0
    assert left.dim() == 2 and left.dtype == right.dtype and left.dtype in TYPES
    assert max(left.shape[-1], right.shape[-1]) < 65536
    calls[f"npu_grouped_matmul {group_type}"] += 1
    if group_type == 0:
        counts = _groups(group_list, group_list_type, left.shape[0])
        assert left.is_contiguous(), "x cannot be transposed where rows are grouped"
        assert right.dim() == 3 and len(right) == len(counts)
        assert right.is_contiguous() or _is_transposed(right)
        parts = [rows.float() @ matrix.float() for rows, matrix in zip(left.split(counts), right, strict=True)]
        return [torch.cat(parts).to(left.dtype)]
    assert group_type == 2
    counts = _groups(group_list, group_list_type, left.shape[1])
    assert _is_transposed(left) and right.dim() == 2 and right.is_contiguous()
    assert left.shape[1] == right.shape[0]
    out = left.new_full((len(counts), left.shape[0], right.shape[1]), float("nan"))  # no rows: nothing is written
    for group, (a, b) in enumerate(zip(left.split(counts, dim=1), right.split(counts), strict=True)):
        if counts[group]:
            out[group] = a.float() @ b.float()
    return [out]


def npu_grouped_matmul_add_(y, x1, x2, group_list, *, transpose_x=True, transpose_weight=False, group_type=2,
                            group_list_type=0):  # fmt: skip
    assert transpose_x and not transpose_weight and group_type == 2
    assert y.dtype == torch.float32 and y.dim() == 3 and y.is_contiguous()
    assert x1.dtype == x2.dtype and x1.dtype in (torch.bfloat16, torch.float16)
    assert x1.numel() and x2.numel(), "empty tensors are not taken"
    counts = _groups(group_list, group_list_type, x1.shape[0])
    assert len(counts) == len(y)
    calls["npu_grouped_matmul_add_"] += 1
    for group, (a, b) in enumerate(zip(x1.split(counts), x2.split(counts), strict=True)):
        y[group] += a.float().t() @ b.float()
    return y


def npu_fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None,
                         scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0,
                         prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
                         gen_mask_parallel=True, sync=False, softmax_layout=""):  # fmt: skip
    assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
    assert 0 < keep_prob <= 1
    _check_mask(atten_mask, sparse_mode)
    calls[f"npu_fusion_attention {input_layout}"] += 1
    if input_layout == "SBH":
        assert actual_seq_qlen is None and actual_seq_kvlen is None
        width = query.shape[2] // head_num
        samples = [[part[:, sample].unflatten(1, (-1, width)) for part in (query, key, value)]
                   for sample in range(query.shape[1])]  # fmt: skip
        found = [_attend(*sample, head_num, scale, keep_prob, sparse_mode)[0].flatten(1) for sample in samples]
        statistics = query.new_zeros(0, dtype=torch.float32)
        return torch.stack(found, 1), statistics, statistics, query.new_zeros(0), 0, 0, 0
    assert input_layout == "TND"
    parts = _sequences(query, key, value, actual_seq_qlen, actual_seq_kvlen)
    found = [_attend(*part, head_num, scale, keep_prob, sparse_mode) for part in parts]
    out, largest, summed = (torch.cat(part) for part in zip(*found, strict=True))
    largest, summed = (part.unsqueeze(-1).expand(-1, -1, 8).contiguous() for part in (largest, summed))
    return out, largest, summed, query.new_zeros(0), 0, 0, 0


def npu_fusion_attention_grad(query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None,
                              atten_mask=None, softmax_max=None, softmax_sum=None, softmax_in=None, attention_in=None,
                              scale_value=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647,
                              inner_precise=0, seed=0, offset=0, numels=0, prefix=None, actual_seq_qlen=None,
                              actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False,
                              softmax_layout="", sink=None):  # fmt: skip
    assert input_layout == "TND" and query.dtype == key.dtype == value.dtype == dy.dtype == attention_in.dtype
    assert softmax_max.shape == softmax_sum.shape == (*query.shape[:2], 8)
    assert softmax_max.dtype == softmax_sum.dtype == torch.float32 and softmax_max.is_contiguous()
    _check_mask(atten_mask, sparse_mode)
    calls["npu_fusion_attention_grad"] += 1
    sizes = [end - start for start, end in zip([0, *actual_seq_qlen], actual_seq_qlen, strict=False)]
    others = zip(*(part.split(sizes) for part in (dy, softmax_max, softmax_sum, attention_in)), strict=True)
    parts = _sequences(query, key, value, actual_seq_qlen, actual_seq_kvlen)
    rep, found = head_num // key.shape[1], []
    for (q, k, v), (grad, largest, summed, out) in zip(parts, others, strict=True):
        scores = _scores(q, k, head_num, scale_value, sparse_mode)
        largest, summed = (part[..., 0].t().unsqueeze(-1) for part in (largest, summed))
        weights = (scores - largest).exp() / summed
        q, grad, out, k, v = (part.transpose(0, 1).float() for part in (q, grad, out, k, v))
        inner = weights * (grad @ v.repeat_interleave(rep, 0).transpose(1, 2) - (grad * out).sum(-1, keepdim=True))
        inner = inner * scale_value
        of_heads = (inner.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
        dk, dv = (part.unflatten(0, (-1, rep)).sum(1) for part in of_heads)
        found.append([part.transpose(0, 1) for part in (inner @ k.repeat_interleave(rep, 0), dk, dv)])
    dq, dk, dv = (torch.cat(part).to(query.dtype) for part in zip(*found, strict=True))
    return dq, dk, dv, None, query.new_zeros(0)


def _check_mask(atten_mask, sparse_mode):
    assert sparse_mode in (0, 2, 3), "all keys, or the modes of a compressed causal mask"
    if sparse_mode == 0:
        assert atten_mask is None
        return
    assert atten_mask is not None and atten_mask.dtype in (torch.bool, torch.uint8)
    assert torch.equal(atten_mask.bool(), torch.ones(2048, 2048).triu(1).bool()), "True hides a key"


def _sequences(query, key, value, query_ends, key_ends):
    """The sequences of a call in the layout TND."""
    assert query.dim() == key.dim() == 3 and len(query_ends) == len(key_ends) <= 1024
    assert all(type(end) is int for end in (*query_ends, *key_ends))
    assert query_ends[-1] == query.shape[0] and key_ends[-1] == key.shape[0]
    sizes = [[end - start for start, end in zip([0, *ends], ends, strict=False)] for ends in (query_ends, key_ends)]
    return list(zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True))


def _scores(query, key, head_num, scale, sparse_mode):
    """[heads, queries, keys]; a hidden key is at minus infinity."""
    assert query.shape[1] == head_num and head_num % key.shape[1] == 0
    q, k = (part.transpose(0, 1).float() for part in (query, key))
    scores = q @ k.repeat_interleave(head_num // key.shape[1], 0).transpose(1, 2) * scale
    if sparse_mode == 0:
        return scores
    shift = scores.shape[2] - scores.shape[1] if sparse_mode == 3 else 0
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1 + shift).bool(), float("-inf"))


def _attend(query, key, value, head_num, scale, keep_prob, sparse_mode):
    """One sequence: [s, heads, d], keys and values [n, groups, d] → [s, heads, d], maxima and sums [s, heads]."""
    scores = _scores(query, key, head_num, scale, sparse_mode)
    v = value.transpose(0, 1).float().repeat_interleave(head_num // key.shape[1], 0)
    largest = scores.amax(-1)
    summed = (scores - largest.unsqueeze(-1)).exp().sum(-1)
    weights = torch.nn.functional.dropout(scores.softmax(-1), 1 - keep_prob)
    return (weights @ v).transpose(0, 1).to(query.dtype), largest.t(), summed.t()


def npu_rms_norm(self, gamma, epsilon=1e-06):
    assert self.dtype == gamma.dtype and self.dtype in TYPES and 2 <= self.dim() <= 8
    assert gamma.shape == self.shape[-1:]
    calls["npu_rms_norm"] += 1
    rstd = torch.rsqrt(self.float().square().mean(-1, keepdim=True) + epsilon)
    return (self.float() * rstd * gamma.float()).to(self.dtype), rstd


def npu_rms_norm_backward(dy, self, gamma, rstd):
    assert dy.dtype == self.dtype == gamma.dtype and rstd.dtype == torch.float32
    assert rstd.shape == (*self.shape[:-1], 1)
    calls["npu_rms_norm_backward"] += 1
    normalised, scaled = self.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    return dx.to(self.dtype), (dy.float() * normalised).flatten(0, -2).sum(0)


def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    assert rotary_mode == "half" and rotate is None
    assert input.dtype == r1.dtype == r2.dtype and input.dim() == r1.dim() == r2.dim() == 4
    assert input.shape[3] % 2 == 0 and input.shape[3] < 896 and max(input.shape[1:3]) < 1000
    s, b, _, d = input.shape  # S11D or SB1D beside SBND
    assert r1.shape == r2.shape and r1.shape in ((s, 1, 1, d), (s, b, 1, d))
    calls["npu_rotary_mul"] += 1
    x1, x2 = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-x2, x1), -1)


def npu_swiglu(self, dim=-1):
    assert self.dtype in TYPES and dim == -1
    calls["npu_swiglu"] += 1
    gate, up = self.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(self.dtype)


def npu_swiglu_backward(y, x, dim=-1):
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], x.shape[-1] // 2) and dim == -1
    calls["npu_swiglu_backward"] += 1
    gate, up = x.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    grad_gate = y.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, y.float() * gate * sigmoid), -1).to(x.dtype)


def module() -> types.ModuleType:
    """A module that can be imported as torch_npu."""
    made = types.ModuleType("torch_npu")
    made.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    for name, function in functions().items():
        setattr(made, name, function)
    calls.clear()
    return made


def functions() -> dict:
    """The functions by name; their signatures are those of the table."""
    found = {name: value for name, value in globals().items() if name.startswith("npu_")}
    assert all(inspect.signature(function) == SIGNATURES[name] for name, function in found.items())
    return found

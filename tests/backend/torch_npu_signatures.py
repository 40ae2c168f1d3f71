"""Signatures of the torch_npu functions that the package calls, typed from torch_npu 2.13.0.

Of the functions that its wheel documents (``torch_npu/_op_plugin_docs.py``) the documented parameters; of the four
that it does not, those of the functions that it registers for the meta device
(``torch_npu/op_plugin/meta/_meta_registrations.py``). `test_ascend_calls.py` holds the calls to this table, and the
table to a wheel where there is one.
"""

from __future__ import annotations

import inspect

VERSION = "2.13.0"

_FAR = 2147483647

_DOCUMENTED = {
    "npu_grouped_matmul": "x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, "
    "antiquant_offset=None, per_token_scale=None, group_list=None, activation_input=None, "
    "activation_quant_scale=None, activation_quant_offset=None, split_item=0, group_type=None, group_list_type=0, "
    "act_type=0, output_dtype=None, tuning_config=None",
    "npu_grouped_matmul_add": "self, x, weight, group_list, *, transpose_x=True, transpose_weight=False, group_type=2, "
    "group_list_type=0",
    "npu_fusion_attention": "query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, "
    f"scale=1.0, keep_prob=1.0, pre_tockens={_FAR}, next_tockens={_FAR}, inner_precise=0, prefix=None, "
    "actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, "
    "softmax_layout=''",
    "npu_rms_norm": "self, gamma, epsilon=1e-06",
    "npu_rotary_mul": "input, r1, r2, rotary_mode='half', rotate=None",
    "npu_swiglu": "self, dim=-1",
}
_REGISTERED = {
    "npu_fusion_attention_grad": "query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None, "
    "atten_mask=None, softmax_max=None, softmax_sum=None, softmax_in=None, attention_in=None, scale_value=1.0, "
    f"keep_prob=1.0, pre_tockens={_FAR}, next_tockens={_FAR}, inner_precise=0, seed=0, offset=0, numels=0, "
    "prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, "
    "softmax_layout='', sink=None",
    "npu_grouped_matmul_add_": "y, x1, x2, group_list, *, transpose_x=True, transpose_weight=False, group_type=2, "
    "group_list_type=0",
    "npu_rms_norm_backward": "dy, self, gamma, rstd",
    "npu_swiglu_backward": "y, x, dim=-1",
}


def signature(parameters: str) -> inspect.Signature:
    """The signature of a function with these parameters, as Python writes them."""
    scope: dict = {}
    exec(f"def function({parameters}): pass", scope)
    return inspect.signature(scope["function"])


DOCUMENTED = {name: signature(text) for name, text in _DOCUMENTED.items()}
REGISTERED = {name: signature(text) for name, text in _REGISTERED.items()}
SIGNATURES = DOCUMENTED | REGISTERED

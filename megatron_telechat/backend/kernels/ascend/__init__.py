"""torch_npu's fused kernels, with the functions of the Triton modules of the same name.

Written against the interface that torch_npu 2.13.0 documents (``_op_plugin_docs.py`` of its wheel), and never run on an
Ascend device: ``docs/ascend.md`` says what was checked, and how.

The checks compare on the host: a device that computes wrong is no judge of itself.
"""

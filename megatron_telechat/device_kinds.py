"""The kinds of device and what is true of each: one row a kind, read without torch and without a device at hand.

Nobody asks for the name of a device. Code asks one of the questions below; with a live device it asks the `Backend`,
whose ``traits`` are a row of this table. A new kind of device is a row here and a class in ``backend/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

DeviceChoice = Literal["auto", "cuda", "npu", "cpu"]
"""What a person may ask for. ``auto`` takes the first kind that is present, in this order."""
DEVICE_CHOICES: tuple[str, ...] = get_args(DeviceChoice)

HOST: Final = "cpu"
"""torch's name for the memory of the host: a place to put tensors, whatever device the ranks run on."""


@dataclass(frozen=True)
class CommunicatorBuffer:
    """Device memory that a communication library takes for every communicator, beside the allocator of torch.

    Attributes:
        variable: environment variable with the size of one buffer, in MiB.
        mib: size where the variable is not set.
        count: buffers of a communicator.
    """

    variable: str
    mib: int
    count: int


@dataclass(frozen=True, kw_only=True)
class DeviceTraits:
    """What is true of every device of one kind. No answer has a default: a new kind answers every question."""

    name: str
    """torch's name of the kind, which is also its value of ``--device``."""
    backend: str
    """The `Backend` class of a live device, as module:class. Loaded when a run starts."""
    torch_cuda: Literal["native", "redirected", "absent"]
    """What ``torch.cuda`` is in a process of such a rank: the device's own interface, redirected to the device by its
    package, or without a device behind it. Megatron-Core is written for ``torch.cuda``."""
    device_file: str | None
    """Name in ``costs/devices/`` that stands for all devices of the kind; None: the product name tells the file."""

    # ---- numbers and kernels
    widest_float: Literal["float64", "float32"]
    """Widest type that the device adds up in; sums of losses and tokens are taken in it."""
    generation_precision: Literal["fp32", "bf16"]
    """Type that the generation of text takes unless a person names one."""
    transformer_engine: bool
    """Transformer Engine has kernels for it."""
    fuses_weight_gradients: bool
    """apex has a kernel that adds the gradient of a weight straight into the fp32 sum."""
    fused_kernels: Literal["triton", "torch_npu"] | None
    """What kernels of our own choice are written in (``backend/kernels/``), which take the place of chains of torch's;
    None: torch's alone."""
    needs_deterministic_mode: bool
    """Megatron-Core's deterministic mode is needed for gradients of the embedding that are the same in every run. It
    selects a slower kernel."""
    fused_rms_norm: bool
    """RMSNorm by torch's fused kernel, which keeps only its input. Otherwise by single operations, which also keep one
    fp32 number a row."""
    heads_first_attention: bool
    """Attention is given its heads one after another in memory; otherwise token by token, as the projections around it
    have them, so that its output needs no copy."""
    copies_attention_output: bool
    """Attention returns its output head by head: the projection reads a copy, and both are kept for the backward."""
    varlen_attention: bool
    """torch's varlen_attn is there: attention within many documents in one call."""
    widens_attention: bool
    """Attention of 16-bit operands may be faster in fp32; the machine tells (`backend.cpu_types`)."""
    block_attention: str
    """The kernel of attention over ranks (``backend/block_attention``) beside `fused_kernels`, as module:class."""
    attention_statistics_bytes: int
    """What the attention keeps of the softmax for its backward, for each head of a token."""
    byte_dropout_masks: bool
    """Dropout keeps one byte an element; otherwise one number of the compute type."""

    # ---- experts
    expert_engine: Literal["loop", "grouped"]
    """The experts: one after another (``loop``), or all of them step by step (``grouped``)."""
    grouped_mm_types: frozenset[str]
    """Types that torch's ``grouped_mm`` multiplies in one kernel. For the others it copies the group sizes to the host
    in every product; the grouped engine then takes one product an expert, by the sizes that the host has already."""
    grouped_alignment_bytes: int
    """Every row of an operand of the experts' products must be a multiple of this."""
    min_rows_per_expert_chunk: int
    """Below so many rows of an expert in one chunk, its products get slow."""
    sums_by_embedding_bag: bool
    """``embedding_bag`` is there and adds each output row in order: sums of rows are the same in every run."""

    # ---- ranks and transfers
    host_waits_for_transfers: bool
    """A wait for other ranks stops the host. Otherwise it stops a queue of the device: the host goes on, and only
    events on that queue can time the wait."""
    pins_uploads: bool
    """A copy from pinned host memory is one more entry of the device's queue, so that the host need not wait for it."""
    frees_sent_outputs: bool
    """The output of a pipeline stage may be freed as soon as its send was issued, because sends and kernels are ordered
    on the device. Otherwise the host may still be reading that memory."""
    binds_communicators: bool
    """The group of all ranks is told the device of the rank: its communicator opens at once, and torch then splits that
    of every other group off it, in which all ranks take part. Otherwise a communicator opens among its own ranks when
    it is first used."""
    communicator_buffer: CommunicatorBuffer | None
    """Buffers of every communicator of this rank; None: not modelled."""
    pair_buffer: CommunicatorBuffer | None
    """Buffers of every pair of ranks that sends point to point; None: not modelled."""
    high_priority_streams: bool
    """The exchange of the experts can have a stream of high priority, so that it does not queue behind kernels."""
    ranks_share_cores: bool
    """Ranks of one machine compete for its cores: a rank that waits makes the others faster."""
    memory_is_of_process: bool
    """Memory in use is that of the whole process, Python and libraries included."""


_CUDA = DeviceTraits(
    name="cuda",
    backend="megatron_telechat.backend.cuda:CudaBackend",
    torch_cuda="native",
    device_file=None,
    widest_float="float64",
    generation_precision="bf16",
    transformer_engine=True,
    fuses_weight_gradients=True,
    fused_kernels="triton",
    needs_deterministic_mode=True,
    fused_rms_norm=True,
    heads_first_attention=False,  # FlashAttention's own order
    copies_attention_output=False,
    varlen_attention=True,
    widens_attention=False,
    block_attention="megatron_telechat.backend.block_attention.flash:FlashBlocks",
    attention_statistics_bytes=4,  # the log-sum-exp, fp32
    byte_dropout_masks=True,
    expert_engine="grouped",
    grouped_mm_types=frozenset({"bfloat16"}),
    grouped_alignment_bytes=16,  # the row strides that torch's grouped_mm takes
    min_rows_per_expert_chunk=128,
    sums_by_embedding_bag=True,
    host_waits_for_transfers=False,
    pins_uploads=True,
    frees_sent_outputs=True,
    binds_communicators=False,  # 1,024 ranks would split that of all ranks some thousands of times
    communicator_buffer=None,
    pair_buffer=None,
    high_priority_streams=True,
    ranks_share_cores=False,
    memory_is_of_process=False,
)

_NPU = DeviceTraits(
    name="npu",
    backend="megatron_telechat.backend.npu:NpuBackend",
    torch_cuda="redirected",  # by torch_npu.contrib.transfer_to_npu
    device_file=None,
    widest_float="float32",  # HCCL does not reduce float64
    generation_precision="bf16",
    transformer_engine=False,
    fuses_weight_gradients=False,
    fused_kernels="torch_npu",
    needs_deterministic_mode=False,
    fused_rms_norm=True,
    heads_first_attention=True,  # as the kernels of scaled_dot_product_attention have them
    copies_attention_output=False,
    varlen_attention=False,
    widens_attention=False,
    block_attention="megatron_telechat.backend.block_attention.plain:PlainBlocks",
    attention_statistics_bytes=64,  # maximum and sum of the softmax, 8 fp32 numbers each
    byte_dropout_masks=True,
    expert_engine="grouped",
    grouped_mm_types=frozenset(),  # torch_npu has no aten::_grouped_mm of its own; see backend/kernels/ascend
    grouped_alignment_bytes=16,
    min_rows_per_expert_chunk=128,
    sums_by_embedding_bag=False,  # its order of additions is not documented
    host_waits_for_transfers=False,
    pins_uploads=True,
    frees_sent_outputs=True,
    binds_communicators=True,
    # One buffer to send from and one to receive in: HCCL_BUFFSIZE in the manual of CANN's environment variables, and
    # P2P_HCCL_BUFFSIZE in that of torch_npu (docs/ascend.md).
    communicator_buffer=CommunicatorBuffer("HCCL_BUFFSIZE", 200, 2),
    pair_buffer=CommunicatorBuffer("P2P_HCCL_BUFFSIZE", 20, 2),
    high_priority_streams=False,  # an option of ProcessGroupNCCL
    ranks_share_cores=False,
    memory_is_of_process=False,
)

_CPU = DeviceTraits(
    name="cpu",
    backend="megatron_telechat.backend.cpu:CpuBackend",
    torch_cuda="absent",
    device_file="cpu",
    widest_float="float64",
    generation_precision="fp32",
    transformer_engine=False,
    fuses_weight_gradients=False,
    fused_kernels=None,
    needs_deterministic_mode=False,  # the plain kernel is deterministic here, and faster
    fused_rms_norm=False,
    heads_first_attention=True,
    copies_attention_output=True,
    varlen_attention=False,
    widens_attention=True,
    block_attention="megatron_telechat.backend.block_attention.cpu:CpuBlocks",
    attention_statistics_bytes=4,
    byte_dropout_masks=False,
    expert_engine="loop",
    grouped_mm_types=frozenset({"float32", "bfloat16", "float16"}),
    grouped_alignment_bytes=1,  # products one by one take any width
    min_rows_per_expert_chunk=16,
    sums_by_embedding_bag=True,
    host_waits_for_transfers=True,
    pins_uploads=False,
    frees_sent_outputs=False,  # an asynchronous gloo send reads the tensor after it was issued
    binds_communicators=False,
    communicator_buffer=None,
    pair_buffer=None,
    high_priority_streams=False,
    ranks_share_cores=True,
    memory_is_of_process=True,
)

DEVICE_KINDS: Mapping[str, DeviceTraits] = {traits.name: traits for traits in (_CUDA, _NPU, _CPU)}
"""Name → answers, in the order in which ``auto`` looks for them."""


def planned_device(choice: str) -> DeviceTraits:
    """The kind that an estimate is made for; ``auto``, which nobody has looked up yet, counts as an accelerator.

    Args:
        choice: a value of ``--device``.
    """
    return next(iter(DEVICE_KINDS.values())) if choice == "auto" else DEVICE_KINDS[choice]

"""What the machine and its Python offer."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from accelerator.section import Options, Results

PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine", "apex", "flash-attn", "numpy")


def run(options: Options) -> Results:
    import torch

    from megatron_telechat.backend import get_backend
    from megatron_telechat.costs.devices import device_spec

    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, None
    yield "cores", os.cpu_count()
    backend = get_backend(options.device)
    yield "fixes of megatron-core", list(backend.install())
    spec = device_spec(backend.device_name())
    yield "device", backend.device_name()
    yield "device file", spec.name if spec is not None else None
    yield "memory, GiB", round(backend.memory().total_bytes / 2**30, 2)
    if options.device != "cuda":
        return
    import torch.backends.cuda as cuda
    from torch.cuda import nccl

    properties = torch.cuda.get_device_properties(0)
    yield "CUDA of torch", torch.version.cuda
    yield "NCCL", ".".join(map(str, nccl.version()))
    yield "capability", f"{properties.major}.{properties.minor}"
    yield "multiprocessors", properties.multi_processor_count
    yield "tf32 in products", cuda.matmul.allow_tf32
    yield (
        "attention kernels",
        {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        },
    )

"""What a model costs: parameters, FLOPs, bytes. Plain Python; torch is never imported here."""

from megatron_telechat.costs.devices import DeviceSpec, device_spec, device_spec_names
from megatron_telechat.costs.flops import (
    forward_flops_per_token,
    model_tflops_per_device,
    training_flops_per_token,
)
from megatron_telechat.costs.parameters import ParameterCount, count_parameters

__all__ = [
    "DeviceSpec",
    "ParameterCount",
    "count_parameters",
    "device_spec",
    "device_spec_names",
    "forward_flops_per_token",
    "model_tflops_per_device",
    "training_flops_per_token",
]

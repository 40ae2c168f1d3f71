"""What a model costs: parameters, FLOPs, bytes. Plain Python; torch is never imported here."""

from megatron_telechat.costs.parameters import ParameterCount, count_parameters, parameter_table

__all__ = ["ParameterCount", "count_parameters", "parameter_table"]

"""Megatron's indexed datasets: format, reading, merging, verification."""

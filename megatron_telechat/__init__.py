"""Megatron-style 3D + expert-parallel pretraining for the TeleChat2 models."""

__version__ = "0.1.0"

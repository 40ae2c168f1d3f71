"""The tensors of a model: one row each, the boxes they are cut into, and which box a rank holds. No torch."""

from megatron_telechat.tensors.boxes import Box, Shape
from megatron_telechat.tensors.pieces import Piece, is_writer, piece_at
from megatron_telechat.tensors.table import Table, TensorSpec, tensor_table

__all__ = ["Box", "Piece", "Shape", "Table", "TensorSpec", "is_writer", "piece_at", "tensor_table"]

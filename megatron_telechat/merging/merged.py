"""The merged weights as a source of global tensors: computed box by box when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from megatron_telechat.checkpoint.averages import KINDS
from megatron_telechat.errors import CheckpointError, NumericsError
from megatron_telechat.merging.inputs import MODEL, Input, values_key
from megatron_telechat.merging.methods import Method, Rule
from megatron_telechat.merging.sums import chunks, flat_start, pieces
from megatron_telechat.tensors.boxes import Box
from megatron_telechat.tensors.table import tensor_table

_MAPPED_BYTES = 128 << 20
"""Pages of the inputs' files that may stay mapped; what was read counts to the resident set until they are closed."""


class Merged:
    """What a method makes of some inputs.

    Reads one tensor of all inputs at a time, in pieces; holds no more of it than a piece, the box that was asked for,
    and what the operating system keeps of the mapped files.

    Args:
        inputs: alike (`alike.require_alike`); of methods on task vectors the base is the last.
        method: of the weights.
        values: of each input, what takes part: weights, master (where it has them), or the kind of an average.
        counting: numbers of the inputs that weigh anything.
        dtype: of the merged weights; None: the narrowest that holds those of every input that counts.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        method: Method,
        values: Sequence[str],
        counting: Sequence[int],
        dtype: torch.dtype | None = None,
    ):
        self.inputs, self.method = inputs, method
        self._values, self._dtype = values, dtype
        self._counting = [inputs[number] for number in counting]
        self.table = tensor_table(inputs[0].run.model)
        self._mapped = 0
        self._rule = functools.lru_cache(maxsize=1)(self._make_rule)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the merged ``model/…`` or ``optimizer/…`` tensor."""
        if self._dtype is not None and key.startswith(MODEL):
            return self._dtype
        return functools.reduce(torch.promote_types, (one.dtype(key) for one in self._counting))

    def hf_dtype(self, key: str, name: str) -> torch.dtype:
        """The dtype of the merged Hugging Face tensor ``name``."""
        if self._dtype is not None:
            return self._dtype
        return functools.reduce(torch.promote_types, (one.hf_dtype(key, name) for one in self._counting))

    def shape(self, key: str) -> tuple[int, ...]:
        """The global shape of a stored key."""
        return self.table[_bare(key)].shape

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A box of the merged ``model/…`` or ``optimizer/…`` tensor, contiguous in it.

        Raises:
            NumericsError: a value of an input is not finite, or the merged one is not in the dtype of the result.
        """
        box = Box(tuple(offset), tuple(shape))
        rule, dtype = self._rule(_bare(key)), self.dtype(key)
        out = torch.empty(box.shape, dtype=dtype)
        at, flat = 0, out.view(-1)
        for piece in pieces(box.shape):
            place = piece.shifted(box.offset)
            part = flat[at : at + piece.numel]
            if rule.copied is not None:
                part.copy_(self._checked(rule.copied, self._copied_from(rule.copied, key, dtype), place))
            else:
                values = [self._checked(number, self._key(number, key), place) for number in rule.inputs]
                first = flat_start(place.offset, self.shape(key))
                for chunk in chunks(piece.numel):
                    part[chunk].copy_(rule.combine([each[chunk].double() for each in values], first + chunk.start))
                self._require_finite(part, key, dtype)
            at += piece.numel
        return out

    def release(self) -> None:
        """Let go of what reads have mapped."""
        self._mapped = 0
        for one in self.inputs:
            one.release()

    def _make_rule(self, key: str) -> Rule:
        return self.method.rule(key, _Pieces(self))

    def _key(self, number: int, key: str) -> str:
        """Where an input keeps the values that take part."""
        one, values = self.inputs[number], self._values[number]
        return values_key(one, key, values) if key.startswith(MODEL) else key

    def _copied_from(self, number: int, key: str, dtype: torch.dtype) -> str:
        """A copy of weights in the stored dtype is the stored tensor; in another one it is of the most exact values."""
        as_stored = self.inputs[number].dtype(key) == dtype and self._values[number] not in KINDS
        return key if as_stored else self._key(number, key)

    def _checked(self, number: int, key: str, box: Box) -> torch.Tensor:
        values = self.inputs[number].read(key, box.offset, box.shape).reshape(-1)
        self._mapped += values.nbytes
        if self._mapped > _MAPPED_BYTES:
            self.release()
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(
                f"{key} holds values that are not finite", str(self.inputs[number].path), "leave this input out"
            )
        return values

    def _require_finite(self, values: torch.Tensor, key: str, dtype: torch.dtype) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(
                f"{key} is not finite in {str(dtype).removeprefix('torch.')} after merging",
                "merge",
                "weights or a scale of smaller size, or --dtype fp32",
            )


class _Pieces:
    """The weights of all inputs as a method reads them before it merges (`methods.Tensors`)."""

    def __init__(self, merged: Merged):
        self._merged = merged

    def keys(self) -> Sequence[str]:
        return list(self._merged.table)

    def pieces(self, key: str, numbers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        merged, stored = self._merged, MODEL + key
        for box in pieces(merged.shape(stored)):
            values = [merged._checked(number, merged._key(number, stored), box) for number in numbers]
            for chunk in chunks(box.numel):
                yield [each[chunk] for each in values]


def _bare(key: str) -> str:
    """Key of the model's tensor that a stored key is of."""
    return key.removeprefix(MODEL) if key.startswith(MODEL) else key.split("/", 2)[2]


def optimizer_keys(inputs: Sequence[Input]) -> list[str]:
    """Keys of the optimizer's state, where all inputs hold the same.

    Raises:
        CheckpointError: an input holds none, or another one's.
    """
    found: Mapping[str, None] = {}
    for number, one in enumerate(inputs):
        keys = dict.fromkeys(sorted(key for key in one.keys if key.startswith("optimizer/")))
        if not keys:
            raise CheckpointError(
                "it holds no optimizer state", str(one.path), "leave --optimizer average out, or this input"
            )
        if number and keys != found:
            odd = sorted(set(keys) ^ set(found))[0]
            raise CheckpointError(
                f"its optimizer state and that of {inputs[0].path} differ: {odd} is in one of them",
                str(one.path),
                "inputs of one precision, or leave --optimizer average out",
            )
        found = keys
    return list(found)

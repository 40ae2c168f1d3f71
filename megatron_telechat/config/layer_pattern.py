"""Megatron-LM's list of MoE layers: [0]*3+[1]*27, ([1]*3+[0]*2)*2."""

from __future__ import annotations

import ast
from functools import cache

MOST_LAYERS = 10_000
_Value = int | list[int]


@cache
def moe_layers(text: str) -> tuple[int, ...]:
    """1 for a MoE layer, 0 for a dense one, from the first layer on.

    Raises:
        ValueError: the text is no such list.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not a list of 0 and 1 such as [0]*3+[1]*27") from None
    if not isinstance(value, list) or not set(value) <= {0, 1}:
        raise ValueError(f"{text!r} is not a list of 0 and 1 such as [0]*3+[1]*27")
    return tuple(value)


def _value(node: ast.expr) -> _Value:
    """The value of a number, a list, a sum or a product; nothing else is evaluated."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_number(_value(item)) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            if isinstance(left, list) and isinstance(right, list):
                return left + right
            return _number(left) + _number(right)
        listed, times = (left, right) if isinstance(left, list) else (right, left)
        if _number(times) * (len(listed) if isinstance(listed, list) else 1) > MOST_LAYERS:
            raise TypeError("too long")
        return listed * _number(times)  # type: ignore[return-value]
    raise TypeError(type(node).__name__)


def _number(value: _Value) -> int:
    if not isinstance(value, int):
        raise TypeError("a list is given where a number is expected")
    return value

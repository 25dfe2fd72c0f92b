"""Compute what needs no shell: expressions with whole numbers, and the commands expr, seq, basename, dirname."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping, Sequence

LONGEST = 200  # items of a range


def compute(expression: str) -> str | None:
    """Compute a sum or product of whole numbers, as C does. None if it is not such an expression."""
    try:
        return str(_number(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return int(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            result = _ARITHMETIC[type(op)](_number(left), _number(right))
            if abs(result) < 2**63:
                return result
    raise ValueError("no expression with whole numbers")


def _divide(left: int, right: int) -> int:
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: _divide,
    ast.Mod: lambda left, right: left - right * _divide(left, right),
}


def _expr(words: Sequence[str]) -> str | None:
    return compute(" ".join(words))


def _seq(words: Sequence[str]) -> str | None:
    numbers = [int(word) for word in words if word.lstrip("-").isdigit()]
    if len(numbers) != len(words) or not 1 <= len(numbers) <= 3:
        return None
    first, step, last = {1: (1, 1, numbers[-1]), 2: (numbers[0], 1, numbers[-1])}.get(len(numbers)) or numbers
    if not step or (last - first) // step >= LONGEST:
        return None
    return " ".join(map(str, range(first, last + (1 if step > 0 else -1), step)))


#: Command -> its output for its words; None if that is not known.
COMPUTED: Mapping[str, Callable[[Sequence[str]], str | None]] = {
    "expr": _expr,
    "seq": _seq,
    "basename": lambda words: (
        os.path.basename(words[0].rstrip("/")).removesuffix(words[1] if len(words) > 1 else "") if words else None
    ),
    "dirname": lambda words: (os.path.dirname(words[0]) or ".") if len(words) == 1 else None,
}

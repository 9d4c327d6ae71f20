"""Exact evaluation of small integer expressions from untrusted text, by a whitelist over the syntax tree.

At most 64 characters of digits, ``+ - * /`` and brackets are accepted, so the run time is bounded.
"""

import ast
import re
from dataclasses import dataclass
from fractions import Fraction

_ALLOWED = re.compile(r"[0-9+\-*/() ]{1,64}")
_MAX_DEPTH = 32


class _RefusedError(Exception):
    """The text is not an allowed expression."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Exact value of an expression, and its integers in order."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Evaluated | None:
    """Evaluate ``text``; None unless it consists of ``+ - * /``, non-negative integers and brackets."""
    if not _ALLOWED.fullmatch(text.strip()):
        return None
    numbers: list[int] = []
    try:
        value = _walk(ast.parse(text.strip(), mode="eval").body, numbers, _MAX_DEPTH)
    except (_RefusedError, SyntaxError, ZeroDivisionError):
        return None
    return Evaluated(value, tuple(numbers))


def _walk(node: ast.expr, numbers: list[int], depth: int) -> Fraction:
    if depth == 0:
        raise _RefusedError
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise _RefusedError
    left = _walk(node.left, numbers, depth - 1)
    right = _walk(node.right, numbers, depth - 1)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case _:
            raise _RefusedError

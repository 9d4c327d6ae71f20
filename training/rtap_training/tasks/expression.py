"""Exact evaluation of small integer expressions from untrusted text. Never ``eval``: a whitelist over the syntax tree.

Bounded by construction: at most 64 characters of digits, ``+ - * /`` and brackets, so no input can be slow.
"""

import ast
import re
from dataclasses import dataclass
from fractions import Fraction

_ALLOWED = re.compile(r"[0-9+\-*/() ]{1,64}")
_MAX_DEPTH = 32


class _RefusedError(Exception):
    """The text is not an expression that is allowed here."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The exact value of an expression and the integers written in it, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Evaluated | None:
    """Evaluate ``text``; None when it is anything but ``+ - * /`` over non-negative integers and brackets."""
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

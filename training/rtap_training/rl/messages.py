"""Helpers for TRL's conversations and processor fields."""

from collections.abc import Sequence
from typing import Any, cast

Messages = list[dict[str, Any]]


def last_text(messages: Messages) -> str:
    """Text of the last message, without images."""
    content: Any = messages[-1]["content"]
    if isinstance(content, str):
        return content
    parts = cast(list[dict[str, Any]], content)
    return " ".join(str(p["text"]) for p in parts if p.get("text"))


def extend(value: Any, ids: Sequence[Sequence[int]]) -> Any:
    """Pad per-token processor fields with 0 (text) to the lengths of ``ids``."""
    rows: list[Any] = cast(list[Any], value) if isinstance(value, list) else []
    if not rows or not isinstance(rows[0], list):
        return value
    return [[*row, *[0] * (len(i) - len(row))] for row, i in zip(rows, ids, strict=True)]

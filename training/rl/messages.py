"""Conversations and the fields that a processor makes of them, as TRL passes them around."""

from collections.abc import Sequence
from typing import Any, cast

Messages = list[dict[str, Any]]


def last_user_text(messages: Messages) -> str:
    """The question of a conversation: text of its last user message."""
    content: Any = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    if isinstance(content, str):
        return content
    parts = cast(list[dict[str, Any]], content)
    return "".join(cast(str, part["text"]) for part in parts if part["type"] == "text")


def extend(value: Any, ids: Sequence[Sequence[int]]) -> Any:
    """Per-token fields of a processor, lengthened with 0 (text) over what has been written since."""
    rows: list[Any] = cast(list[Any], value) if isinstance(value, list) else []
    if not rows or not isinstance(rows[0], list):
        return cast(Any, value)
    return [[*row, *[0] * (len(i) - len(row))] for row, i in zip(rows, ids, strict=True)]

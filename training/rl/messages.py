"""Conversations and the fields that a processor makes of them, as TRL passes them around."""

from collections.abc import Sequence
from typing import Any, cast

Messages = list[dict[str, Any]]


def extend(value: Any, ids: Sequence[Sequence[int]]) -> Any:
    """Per-token fields of a processor, lengthened with 0 (text) over what has been written since."""
    rows: list[Any] = cast(list[Any], value) if isinstance(value, list) else []
    if not rows or not isinstance(rows[0], list):
        return cast(Any, value)
    return [[*row, *[0] * (len(i) - len(row))] for row, i in zip(rows, ids, strict=True)]

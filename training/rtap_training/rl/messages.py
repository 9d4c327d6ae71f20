"""Helpers for conversations, and for TRL's processor fields."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
) -> str:
    """Prompt of a conversation in the chat template, up to where the model writes."""
    text = tokenizer.apply_chat_template(
        cast(Any, messages), tokenize=False, add_generation_prompt=True, **template_kwargs
    )
    return cast(str, text)


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

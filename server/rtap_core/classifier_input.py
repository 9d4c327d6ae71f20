"""What a classifier reads of an answer, the same in training and serving."""

from collections.abc import Sequence
from typing import Any, cast


def without_padding(token_ids: Sequence[int], pad_token_id: int | None) -> list[int]:
    """Token ids without pad tokens at the end. transformers takes the score before them, so a chat template that ends
    with this token is scored before it."""
    kept = list(token_ids)
    while len(kept) > 1 and kept[-1] == pad_token_id:
        kept.pop()
    return kept


def chat_token_ids(tokenizer: Any, question: str, answer: str, pad_token_id: int | None) -> list[int]:
    """Question and answer as a chat of two messages in a Hugging Face tokenizer's own template."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    return without_padding(cast(list[int], tokenizer.encode(text, add_special_tokens=False)), pad_token_id)

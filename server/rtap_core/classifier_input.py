"""Token ids that a classifier reads of an answer, for training and serving."""

from collections.abc import Mapping, Sequence
from typing import Any, cast


def without_padding(token_ids: Sequence[int], pad_token_id: int | None) -> list[int]:
    """Token ids without pad tokens at the end. transformers takes the score before them, so a chat template that ends
    with this token is scored before it."""
    kept = list(token_ids)
    while len(kept) > 1 and kept[-1] == pad_token_id:
        kept.pop()
    return kept


def answer_ids(tokenizer: Any, question: str, answer: str, pad_token_id: int | None) -> tuple[int, ...]:
    """Token ids of a question and its answer as a chat."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tuple(chat_token_ids(tokenizer, chat, pad_token_id))


def chat_token_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], pad_token_id: int | None) -> list[int]:
    """Messages, the answer last, in a Hugging Face tokenizer's own chat template. Raises what the template raises."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return without_padding(cast(list[int], tokenizer.encode(text, add_special_tokens=False)), pad_token_id)

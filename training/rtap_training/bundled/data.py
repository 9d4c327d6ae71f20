"""Tokenisation, loss masks and length-bucketed batches of training conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rtap_training.bundled.streams import Stream
from rtap_training.bundled.tokenizer import render_prompt
from rtap_training.huggingface import pad_id
from rtap_training.tasks import TASKS
from rtap_training.tasks.trajectory import Conversation, sample_conversation

POOL_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and completion. is_trained: per token, True if it counts in the loss."""

    ids: list[int]
    is_trained: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded ids (B, T) and the loss mask (B, T) over the same positions."""

    ids: Tensor
    mask: Tensor


def conversation_text(conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """Text of a conversation, and the character spans that are trained."""
    text = render_prompt(conversation.messages)
    spans: list[tuple[int, int]] = []
    for segment in conversation.turn:
        if segment.is_trained:
            spans.append((len(text), len(text) + len(segment.text)))
        text += segment.text
    return text, spans


def encode(tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Conversation]) -> list[Encoded]:
    """Tokenise whole texts, as an engine does. A token is trained only if all its characters are."""
    rendered = [conversation_text(c) for c in conversations]
    encodings = tokenizer.backend_tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
    result: list[Encoded] = []
    for (text, spans), encoding in zip(rendered, encodings, strict=True):
        trained = bytearray(len(text))
        for start, end in spans:
            trained[start:end] = b"\x01" * (end - start)
        offsets: list[tuple[int, int]] = encoding.offsets
        result.append(Encoded(encoding.ids, [all(trained[a:b]) and b > a for a, b in offsets]))
    return result


def pad(rows: Sequence[Encoded], padding: int) -> Batch:
    """Right-pad to the longest row."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = torch.tensor(row.is_trained)
    return Batch(ids, mask)


def batches(
    tokenizer: PreTrainedTokenizerFast, weights: Mapping[str, float], *, seed: int, batch_tokens: int
) -> Stream[Batch]:
    """Endless batches of rows of similar length, at most ``batch_tokens`` padded tokens each."""
    padding = pad_id(tokenizer)

    def draw(rng: Random) -> list[Batch]:
        pool: list[Encoded] = []
        num_tokens = 0
        while num_tokens < POOL_BATCHES * batch_tokens:
            fresh = encode(tokenizer, [sample_conversation(TASKS, weights, rng) for _ in range(256)])
            pool += fresh
            num_tokens += sum(len(e.ids) for e in fresh)
        groups = bucket(pool, batch_tokens)
        rng.shuffle(groups)
        return [pad(group, padding) for group in groups]

    return Stream(draw, seed=seed)


def bucket(rows: Sequence[Encoded], batch_tokens: int) -> list[list[Encoded]]:
    """Sort rows by length and split them so that each padded batch has at most ``batch_tokens`` tokens."""
    groups: list[list[Encoded]] = [[]]
    for row in sorted(rows, key=lambda r: len(r.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(row.ids) > batch_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups

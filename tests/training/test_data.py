"""Token-level loss masks cover exactly the trained characters; batches are bounded and reproducible."""

from itertools import islice
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rtap_training.bundled.data import batches, bucket, conversation_text, encode
from rtap_training.bundled.tokenizer import TAGS, build_tokenizer, render_prompt
from rtap_training.huggingface import pad_id, token_id
from rtap_training.tasks import TASKS
from rtap_training.tasks.trajectory import sample_conversation

WEIGHTS = {"countdown": 0.4, "arithmetic": 0.2, "knights": 0.4}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rng = Random(0)
    corpus = (conversation_text(sample_conversation(TASKS, WEIGHTS, rng))[0] for _ in range(3000))
    return build_tokenizer(corpus, vocab_size=448, max_length=1024)


def test_the_mask_covers_exactly_the_trained_segments(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(5)
    conversations = [sample_conversation(TASKS, WEIGHTS, rng) for _ in range(300)]
    for conversation, row in zip(conversations, encode(tokenizer, conversations), strict=True):
        trained = "".join(tokenizer.decode([i]) for i, on in zip(row.ids, row.is_trained, strict=True) if on)
        assert trained == "".join(s.text for s in conversation.turn if s.is_trained)


def test_the_prompt_is_never_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = sample_conversation(TASKS, WEIGHTS, Random(5))
    (row,) = encode(tokenizer, [conversation])
    length = len(tokenizer.encode(render_prompt(conversation.messages)))
    assert not any(row.is_trained[:length])
    assert row.is_trained[length]


def test_a_false_result_is_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(0)
    masked = 0
    for _ in range(300):
        conversation = sample_conversation({"arithmetic": TASKS["arithmetic"]}, {"arithmetic": 1.0}, rng)
        (row,) = encode(tokenizer, [conversation])
        false = [s.text for s in conversation.turn if not s.is_trained and s.text != "<think>"]
        text = tokenizer.decode([i for i, on in zip(row.ids, row.is_trained, strict=True) if not on])
        assert text.endswith("".join(false) or "assistant\n") or "<think>" in text
        masked += bool(false)
    assert masked > 20


def test_batches_stay_within_their_budget_and_repeat(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (list(islice(batches(tokenizer, WEIGHTS, seed=3, batch_tokens=1024), 12)) for _ in range(2))
    assert all(b.ids.numel() <= 1024 for b in first)
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.mask, b.mask) for a, b in zip(first, second, strict=True))
    assert not any((b.mask & (b.ids == pad_id(tokenizer))).any() for b in first)


def test_bucketing_keeps_every_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(1)
    rows = encode(tokenizer, [sample_conversation(TASKS, WEIGHTS, rng) for _ in range(200)])
    groups = bucket(rows, 512)
    assert sorted(map(id, rows)) == sorted(id(r) for g in groups for r in g)


def test_tags_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(tokenizer.encode(tag) == [token_id(tokenizer, tag)] for tag in TAGS)

"""The tokenizer round-trips any text, keeps digits apart, and renders chats as training does."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rtap_training.bundled.start import split_text
from rtap_training.bundled.tokenizer import TAGS, build_tokenizer, render_prompt
from rtap_training.tasks import TASKS
from rtap_training.tasks.trajectory import Message, sample_conversation

MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "make 82 from 3, 7, 25"},
    {"role": "assistant", "content": "25*3+7"},
    {"role": "user", "content": "<think> What is 12 × 9?"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    rng = Random(0)
    weights = {"countdown": 0.4, "arithmetic": 0.2, "knights": 0.4}
    corpus = ("".join(split_text(sample_conversation(TASKS, weights, rng))) for _ in range(3000))
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(corpus, vocab_size=448, max_length=1024).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(max_size=60))
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet="0123456789+-*/=(), .?", min_size=1, max_size=60))
def test_digits_and_punctuation_are_single_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert len(tokenizer.encode(text)) == len(text)


def test_tags_survive_skipping_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(TAGS)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("<|im_start|>a<|im_end|>"), skip_special_tokens=True) == "a"


def test_size_and_special_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 448
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_the_chat_template_equals_the_training_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == render_prompt([Message(m["role"], m["content"]) for m in MESSAGES])
    assert rendered.endswith("<|im_start|>assistant\n")


def test_a_final_message_can_be_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "12*9"}, {"role": "assistant", "content": "<think>10*9=90"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert rendered == "<|im_start|>user\n12*9<|im_end|>\n<|im_start|>assistant\n<think>10*9=90"

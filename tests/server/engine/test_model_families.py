"""Trajectory formats of public model families, from their own chat templates."""

import pytest

from rtap_core.draft import thought_is_closed, thought_is_open
from rtap_core.format import TEXT, THINK, detect_format
from tests.other_checkpoints import FAMILIES, family_tokenizer

MESSAGES = [{"role": "user", "content": "3+4?"}]


class Encoder:
    """The part of an engine that reads tags."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("family", "kwargs", "fmt", "is_open", "is_closed"),
    [
        ("qwen3", {}, THINK, False, False),
        ("qwen3", {"enable_thinking": True}, THINK, False, False),
        ("qwen3", {"enable_thinking": False}, THINK, False, True),
        ("deepseek-r1", {}, THINK, True, False),
        ("llama-3", {}, TEXT, False, False),
    ],
)
def test_the_template_shows_the_format_and_where_the_thought_stands(family, kwargs, fmt, is_open, is_closed):
    tokenizer = family_tokenizer(FAMILIES[family])
    template, vocabulary = tokenizer.chat_template, tokenizer.get_vocab()
    assert detect_format(None, template=template, vocabulary=vocabulary)[0] is fmt
    assert detect_format(None, template="", vocabulary=vocabulary)[0] is fmt
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **kwargs)
    ids, engine = tokenizer.encode(prompt, add_special_tokens=False), Encoder(tokenizer)
    assert (thought_is_open(ids, engine, fmt), thought_is_closed(ids, engine, fmt)) == (is_open, is_closed)

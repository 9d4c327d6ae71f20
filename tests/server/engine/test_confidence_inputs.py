"""Chats for a classifier with its own tokenizer and template; tests/e2e/test_reward_models.py has a real one."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import ConfidenceError
from rtap_core.types import Judged
from rtap_server.engine.confidence import probability
from rtap_server.engine.confidence.inputs import ChatInput, LocalChatTokenizer
from rtap_server.engine.confidence.pooling import PoolingConfidence
from rtap_server.engine.request_state import RequestState, begin_request
from tests.other_checkpoints import CHATML, small_tokenizer

STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate between user and assistant') }}{% endif %}{% endfor %}" + CHATML
)
tokenizer_with = functools.cache(small_tokenizer)
POLICY = tokenizer_with("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}


def judged(answer: str | None = "4", *, cycle: str = "<think>sum</think>4", question: str = "2+2?") -> Judged:
    ids = POLICY.encode(question)
    return Judged(ids, POLICY.encode(cycle), ids, answer=answer)


def chat_input(template: str | None = CHATML, max_model_len: int = 4096, **options: Any) -> ChatInput:
    chat = LocalChatTokenizer(tokenizer_with(template), None)
    return ChatInput(chat, POLICY.decode, max_model_len, **options)


async def text_of(read: ChatInput, pair: Judged | None = None, *messages: Any, prefix: str = "") -> str:
    """What a classifier reads."""
    begin_request(RequestState(messages=messages, prefix=prefix))
    return tokenizer_with(CHATML).decode(await read(pair or judged()))


def turns(*messages: tuple[str, str]) -> str:
    return "".join(f"<|start|>{role}\n{content}<|stop|>\n" for role, content in messages)


CALL = {"id": "1", "type": "function", "function": {"arguments": {"a": 2}, "name": "add"}}
TOOLS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "4"},
]
CALL_TEXT = '{"name": "add", "arguments": {"a": 2}}'
PARTS = [{"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]}]
DIALOGUE = [USER, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Sure?"}]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, [USER], turns(("user", "2+2?"), ("assistant", "4"))),
        (CHATML, [SYSTEM, USER], turns(("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"))),
        (CHATML, [{**SYSTEM, "role": "developer"}], turns(("system", "Be brief."), ("assistant", "4"))),
        (CHATML, PARTS, turns(("user", "2\n+2?"), ("assistant", "4"))),
        (CHATML, TOOLS, turns(("user", "2+2?"), ("assistant", CALL_TEXT), ("user", "4"), ("assistant", "4"))),
        (STRICT, DIALOGUE, turns(("user", "2+2?"), ("assistant", "5"), ("user", "Sure?"), ("assistant", "4"))),
        (STRICT, [SYSTEM, USER], turns(("user", "Be brief.\n\n2+2?"), ("assistant", "4"))),
        (STRICT, [USER, USER], turns(("user", "2+2?\n\n2+2?"), ("assistant", "4"))),
        (STRICT, [{"role": "assistant", "content": "Hi"}, USER], "Hi\n\n2+2?\n\n4"),
        (None, [SYSTEM, USER], "Be brief.\n\n2+2?\n\n4"),
        (CHATML, [], turns(("user", "2+2?"), ("assistant", "4"))),
    ],
    ids=[
        "question", "system", "developer", "parts", "tools", "dialogue", "no system allowed", "two of the user",
        "assistant first", "no template", "prompt of a completion",
    ],
)  # fmt: skip
async def test_the_template_of_the_generator_renders_messages_and_answer(template, messages, expected):
    assert await text_of(chat_input(template), None, *messages) == expected


async def test_our_own_generators_judge_the_thought_too():
    assert await text_of(chat_input(reads_thought=True), None, USER) == turns(
        ("user", "2+2?"), ("assistant", "<think>sum</think>4")
    )


async def test_a_continued_message_and_its_continuation_are_one():
    begun = {"role": "assistant", "content": "It is "}
    expected = turns(("user", "2+2?"), ("assistant", "It is 4"))
    assert await text_of(chat_input(), None, USER, begun, prefix="It is ") == expected


async def test_a_long_question_loses_its_beginning_and_an_answer_nothing():
    long = {"role": "user", "content": "x" * 300 + "2+2?"}
    begin_request(RequestState(messages=[long]))
    everything = await chat_input()(judged("4" * 20))
    shortened = await chat_input(CHATML, 64)(judged("4" * 20))
    assert len(shortened) == 64
    assert shortened == [everything[0], *everything[-63:]]
    assert tokenizer_with(CHATML).decode(shortened).endswith("2+2?<|stop|>\n" + turns(("assistant", "4" * 20)))
    with pytest.raises(ConfidenceError, match=r"an answer of \d+ tokens is above the generator's context of 64") as no:
        await chat_input(CHATML, 64)(judged("4" * 80))
    assert no.value.reason == "too_long"


async def test_padding_at_the_end_is_not_what_is_scored():
    """transformers takes the score at the last token that is no padding."""
    tokenizer = small_tokenizer("{% for m in messages %}{{ m.content }}<|pad|>{% endfor %}")
    chat = LocalChatTokenizer(tokenizer, tokenizer.pad_token_id)
    assert tokenizer.decode(await chat.chat([USER, USER])) == "2+2?<|pad|>2+2?"


async def test_whatever_fails_on_the_way_to_the_generator_is_no_score():
    async def broken(_: Judged) -> list[int]:
        raise OverflowError

    with pytest.raises(ConfidenceError, match="the generator failed: OverflowError"):
        await PoolingConfidence(SimpleNamespace(engine=None), 1.0, 100, broken).score(judged())  # type: ignore[arg-type]


_TEXT = st.text(st.sampled_from("ab 4é🙂\n\t\x00<{%"), max_size=20)
_PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}), st.just({"type": "refusal", "refusal": "no"})
)
_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "critic"]),
        "content": st.one_of(st.none(), _TEXT, st.lists(_PART, max_size=3)),
    },
    optional={"tool_calls": st.one_of(st.none(), st.just([CALL])), "name": st.just("x")},
)


@given(st.lists(_MESSAGE, max_size=6), st.sampled_from([CHATML, STRICT, None]))
async def test_any_chat_is_rendered_and_ends_with_the_answer(messages, template):
    text = await text_of(chat_input(template), judged("the answer"), *messages)
    assert text.removesuffix("<|stop|>\n").endswith("the answer")


@pytest.mark.parametrize(
    ("logits", "expected"),
    [([0.0], 0.5), ([2.0], 0.880797), ([-800.0], 0.0), ([800.0], 1.0), ([1.0, 3.0], 0.880797)],
)
def test_one_logit_is_right_and_of_two_the_second(logits, expected):
    assert probability(logits) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("logits", [[], [1.0, 2.0, 3.0], [float("nan")], [float("inf")]])
def test_other_numbers_of_logits_are_no_score(logits):
    with pytest.raises(ConfidenceError, match="instead of one or two logits"):
        probability(logits)

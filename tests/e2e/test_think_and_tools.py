"""The `think` format with an adapter and tool calls. The tests of test_chat.py on that format: test_think_format.py."""

import json

import httpx
import pytest

from tests.e2e.conftest import ADAPTER
from tests.e2e.test_chat import EAGER, _ask, _stream

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "strict": True,  # without it vLLM accepts any JSON as arguments
        "parameters": {"type": "object", "properties": {"x": {"enum": [7, 82]}}, "required": ["x"]},
    },
}
# A call in the hermes dialect. The bundled model never learnt it, so a grammar makes it.
CALL = r'<tool_call>\n\{"name": "look_up", "arguments": \{"x": (7|82)\}\}\n</tool_call>'


def test_rejected_answers_are_reasoning_and_the_best_is_content(operated):
    reply = _ask(operated, rtap=EAGER | {"return_cycles": True}, seed=7)
    rtap, message = reply.rtap, reply.choices[0].message
    assert (rtap["stop_reason"], len(rtap["cycles"])) == ("max_cycles", 3)
    best = max((c for c in rtap["cycles"] if c["answer"]), key=lambda c: (c["confidence"], c["index"]))
    assert message.content == best["answer"]
    for cycle in rtap["cycles"]:
        assert cycle["think"] in message.reasoning
        assert cycle["accepted"] or (cycle["answer"] or "") in message.reasoning
    assert "<think>" not in message.content


def test_streams_have_no_tags(operated):
    chunks = _stream(operated, rtap=EAGER, seed=9)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content
    assert "<" not in content


def test_every_cycle_of_an_adapter_is_written_by_it(operated):
    def written(model, question):
        reply = operated.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0,
            max_tokens=300, extra_body={"rtap": EAGER | {"return_cycles": True}},
        )  # fmt: skip
        assert reply.model == model
        return [(c["think"], c["answer"]) for c in reply.rtap["cycles"]]

    assert {m.id for m in operated.client.models.list().data} == {"rtap", ADAPTER}
    for question in ("(83-17)*29", "Make 72 from 2, 6 and 10", "make 61 from 4, 8, 29", "37*48+65"):
        base, adapted = written("rtap", question), written(ADAPTER, question)
        assert adapted == written(ADAPTER, question)
        differs = [a != b for a, b in zip(adapted, base, strict=False)]
        if len(differs) > 1 and all(differs):  # both models may agree on an easy question
            return
    pytest.fail("no question on which every cycle differs")


@pytest.fixture(scope="module")
def no_white_space(operated):
    """Biases against white space: JSON allows any amount of it, and an untrained model writes it without end."""

    def ids(text: str) -> list[int]:
        body, headers = {"prompt": text, "add_special_tokens": False}, {"x-api-key": operated.key}
        return httpx.post(f"{operated.url}/tokenize", json=body, headers=headers).json()["tokens"]

    return {i: -100 for text in (" ", "\n", "\r", "\t", "  ", "\n\n") for i in ids(text)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_tool_call_is_an_answer(operated, no_white_space, choice, stream):
    """Written in every cycle, scored, and returned as a call and not as content."""
    extra = {"rtap": EAGER, "logit_bias": no_white_space}
    if choice == "auto":
        extra |= {"structured_outputs": {"regex": CALL}}
    asked = {
        "model": "rtap", "messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}], "seed": 5,
        "max_tokens": 600, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "extra_body": extra,
    }  # fmt: skip
    if stream:
        chunks = list(operated.client.chat.completions.create(stream=True, **asked))
        rtap, deltas = chunks[-1].rtap, [c.choices[0].delta for c in chunks if c.choices]
        assert all(len(d.tool_calls or ()) <= 1 for d in deltas)  # SDKs read one entry for an index
        calls = [call.function for d in deltas for call in d.tool_calls or ()]
        name = "".join(call.name or "" for call in calls)
        arguments = "".join(call.arguments or "" for call in calls)
        content = "".join(d.content or "" for d in deltas)
        finish = next(c.choices[0].finish_reason for c in reversed(chunks) if c.choices)
    else:
        reply = operated.client.chat.completions.create(**asked)
        rtap, message = reply.rtap, reply.choices[0].message
        (call,) = message.tool_calls
        name, arguments, content = call.function.name, call.function.arguments, message.content or ""
        finish = reply.choices[0].finish_reason
    assert (name, finish) == ("look_up", "tool_calls" if isinstance(choice, str) else "stop")
    assert json.loads(arguments)["x"] in (7, 82)
    assert not content.strip()
    assert len(rtap["cycles"]) == EAGER["max_cycles"]
    answered = [c for c in rtap["cycles"] if c["answer"] is not None]
    assert answered
    assert all(c["confidence"] is not None for c in answered)


def test_a_conversation_continues_after_a_tool_result(operated):
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"x": 7}'}}
    reply = operated.client.chat.completions.create(
        model="rtap", tools=[TOOL],
        messages=[
            {"role": "user", "content": "12*9"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "108"},
        ],
    )  # fmt: skip
    assert reply.rtap["cycles"]

"""Replies that vLLM framed, rewritten: whatever the byte chunks, streams stay ordinary and the last chunk has rtap."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_server.engine.output_writer import ANSWER_MARK
from rtap_server.engine.request_state import RequestState
from rtap_server.http.response_rewriter import EventStream, ResponseRewriter, annotate_body
from rtap_server.telemetry.feedback import Feedback
from tests.error_shapes import error_of
from tests.server.http.test_recursion_fields import CYCLE, _trajectory

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def _chunk(delta, finish=None, index=0, **extra):
    return HEAD | {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]} | extra


def _sse(*chunks) -> bytes:
    events = [json.dumps(c, separators=(",", ":"), ensure_ascii=False) for c in chunks] + ["[DONE]"]
    return "".join(f"data: {e}\n\n" for e in events).encode()


def _read(data: bytes) -> list:
    events = data.decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    return [json.loads(e.removeprefix("data: ")) for e in events[:-1]]


def _state(fields=None, **trajectory) -> RequestState:
    state = RequestState("id-1", num_choices=1, fields=fields or {})
    state.trajectories[0] = _trajectory(**trajectory)
    return state


def _stream(path=CHAT, state=None) -> EventStream:
    return EventStream(path, state or _state(), Feedback())


STREAM = _sse(
    _chunk({"role": "assistant", "content": ""}),
    _chunk({"reasoning": "12*9=108 é", "reasoning_content": "12*9=108 é"}),
    _chunk({"content": "108"}, "stop"),
)


@given(st.sets(st.integers(1, len(STREAM) - 1), max_size=12))
def test_rewriting_does_not_depend_on_byte_chunks(cuts):
    stream = _stream()
    ordered = sorted(cuts)
    parts = [STREAM[a:b] for a, b in zip([0, *ordered], [*ordered, len(STREAM)], strict=True)]
    got = _read(b"".join(stream.feed(part) for part in parts))
    assert got == _read(_stream().feed(STREAM))


@pytest.mark.parametrize("said", ['say "x"', "a\\", '\\"', '"finish_reason":"x"', "\\u0022é\n", ""])
def test_what_is_said_is_left_alone(said):
    stream = _stream()
    events = _sse(_chunk({"reasoning": said}), _chunk({"content": said}))
    assert stream.feed(events) == events


def test_the_finish_chunk_has_the_whole_object():
    got = _read(_stream().feed(STREAM))
    assert [("rtap" in c) for c in got] == [False, False, True]
    assert got[2]["rtap"]["stop_reason"] == "threshold"


def test_the_usage_chunk_is_the_last_when_it_was_asked_for():
    data = _sse(
        _chunk({"content": "108"}, "stop"), HEAD | {"choices": [], "usage": {"completion_tokens": 30, "x": None}}
    )
    got = _read(_stream(state=_state({"stream_options": {"include_usage": True}})).feed(data))
    assert "rtap" not in got[0]
    assert got[1]["rtap"]["confidence"] == 0.75
    assert got[1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 25}


def test_a_cycle_is_told_before_the_next_event_with_an_empty_delta():
    state = _state()
    state.return_cycles = True
    stream = _stream(state=state)
    first = stream.feed(_sse(_chunk({"role": "assistant"})).removesuffix(b"data: [DONE]\n\n"))
    state.cycles.append((0, CYCLE))
    got = _read(first + stream.feed(_sse(_chunk({"reasoning": "Oops"}))))
    assert got[1] == HEAD | {
        "choices": [{"index": 0, "delta": {}, "finish_reason": None}],
        "rtap": {"event": "cycle", "cycle": got[1]["rtap"]["cycle"]},
    }
    assert got[1]["rtap"]["cycle"]["think"] == "12*9=108"
    assert not state.cycles


def test_a_draft_is_a_field_of_the_chunk_and_not_of_its_delta():
    draft = {"index": 1, "text": 'so "108"'}
    (got,) = _read(_stream().feed(_sse(_chunk({"draft": draft}, index=1, logprobs=None))))
    assert got == _chunk({}, index=1, logprobs=None) | {"rtap": {"event": "draft", "draft": draft}}


def test_several_choices_end_with_all_their_objects():
    state = RequestState(num_choices=2)
    state.trajectories |= {0: _trajectory(), 1: _trajectory(degraded="timeout")}
    got = _read(_stream(state=state).feed(_sse(_chunk({}, "stop", 1), _chunk({}, "stop", 0))))
    assert "rtap" not in got[0]
    assert [t.get("degraded") for t in got[1]["rtap_choices"]] == [None, "timeout"]
    choices = [{"index": index, "message": {}} for index in range(2)]
    whole = json.loads(annotate_body(json.dumps({"id": "r", "choices": choices}).encode(), CHAT, state, Feedback()))
    assert whole["rtap_choices"] == got[1]["rtap_choices"] == [choice["rtap"] for choice in whole["choices"]]


def test_a_chunk_has_one_entry_for_each_tool_call():
    """openai's stream helper, instructor and llama-index read only one entry for an index."""

    def call(index, **function):
        return {"index": index, "function": function} | ({"id": f"call-{index}"} if "name" in function else {})

    first = [call(0, name="f"), call(0, arguments='{"x"'), call(1, name="g"), call(0, arguments=":1}")]
    data = _sse(_chunk({"tool_calls": first}), _chunk({"tool_calls": [call(1, arguments="{}")]}))
    got = [chunk["choices"][0]["delta"]["tool_calls"] for chunk in _read(_stream().feed(data))]
    assert got == [
        [call(0, name="f", arguments='{"x":1}'), call(1, name="g")],
        [call(1, arguments="{}")],
    ]


def _entry(token: str) -> dict:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


# With return_tokens_as_token_ids the token is no text, but the bytes are.
OF_A_THOUGHT = [_entry(ANSWER_MARK), _entry(ANSWER_MARK) | {"token": "token_id:7"}]


def test_log_probabilities_are_those_of_the_content():
    choices = [{"index": 0, "message": {"content": "1"}, "logprobs": {"content": [*OF_A_THOUGHT, _entry("1")]}}]
    whole = json.loads(annotate_body(json.dumps({"id": "r", "choices": choices}).encode(), CHAT, _state(), Feedback()))
    assert whole["choices"][0]["logprobs"] == {"content": [_entry("1")]}
    data = _sse(*(
        _chunk({}) | {"choices": [{"index": 0, "delta": {}, "finish_reason": None, "logprobs": {"content": [e]}}]}
        for e in (*OF_A_THOUGHT, _entry("1"))
    ))  # fmt: skip
    got = [chunk["choices"][0]["logprobs"] for chunk in _read(_stream().feed(data))]
    assert got == [None, None, {"content": [_entry("1")]}]


def _event(name: str, **fields) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name} | fields, separators=(',', ':'))}\n\n".encode()


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_a_response_ends_as_its_status_says(status):
    """vLLM ends every stream with response.completed, and every item as completed."""
    items = [
        {"type": kind, "status": "completed", "content": [{"type": "output_text", "logprobs": logprobs}]}
        for kind, logprobs in (("reasoning", None), ("message", [*OF_A_THOUGHT, _entry("1")]))
    ]
    response = {"id": "r", "status": status, "output": items, "usage": {}}
    data = b"".join((
        _event("response.output_item.done", item=items[0]), _event("response.output_item.added", item=items[1]),
        _event("response.output_item.done", item=items[1]), _event("response.completed", response=response),
    ))  # fmt: skip
    stream = _stream("/v1/responses")
    parts = [stream.feed(data[at : at + 100]) for at in range(0, len(data), 100)]
    events = b"".join([*parts, stream.close()]).decode().removesuffix("\n\n").split("\n\n")
    read = [json.loads(event.partition("data: ")[2]) for event in events]
    assert [event.partition("\n")[0] for event in events] == [f"event: {one['type']}" for one in read]
    names = [one["type"].removeprefix("response.") for one in read]
    assert names == ["output_item.done", "output_item.added", "output_item.done", status]
    assert (read[0]["item"]["status"], read[2]["item"]["status"]) == ("completed", status)
    whole = json.loads(annotate_body(json.dumps(response).encode(), "/v1/responses", _state(), Feedback()))
    for shown in (read[3]["response"], whole):
        assert [item["status"] for item in shown["output"]] == ["completed", status]
        assert shown["output"][1]["content"][0]["logprobs"] == [_entry("1")]
        assert shown["rtap"]["confidence"] == 0.75


def test_an_item_that_is_the_last_event_is_not_lost():
    stream, done = _stream("/v1/responses"), _event("response.output_item.done", item={})
    assert stream.feed(done) + stream.close() == done


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (CHAT, {"message": {"tool_calls": []}, "finish_reason": "tool_calls"}, "stop"),
        (CHAT, {"message": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}, "tool_calls"),
        ("/v1/messages", {"content": [{"type": "text"}], "stop_reason": "tool_use"}, "end_turn"),
        ("/v1/messages", {"content": [{"type": "tool_use"}], "stop_reason": "tool_use"}, "tool_use"),
    ],
)  # fmt: skip
def test_no_reply_promises_a_call_that_it_has_not(path, fields, reason):
    body = json.dumps({"id": "r"} | ({"choices": [{"index": 0} | fields]} if path == CHAT else fields)).encode()
    got = json.loads(annotate_body(body, path, _state(), Feedback()))
    assert reason == (got["choices"][0]["finish_reason"] if path == CHAT else got["stop_reason"])


def test_events_without_a_marker_pass_as_bytes():
    data = b': keep-alive\n\ndata: {"choices": [ ] , "odd":1}\n\ndata: [DONE]\n\n'
    assert _stream().feed(data) == data


def test_responses_and_messages_get_the_object_in_their_last_event():
    response = b'{"id":"r","usage":{"output_tokens":30}}'
    done = b'event: response.completed\ndata: {"type":"response.completed","response":' + response + b"}\n\n"
    out = _stream("/v1/responses").feed(done)
    reply = json.loads(out.split(b"data: ")[1])["response"]
    assert out.startswith(b"event: response.completed\n")
    assert reply["rtap"]["confidence"] == 0.75
    assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] == 25


def test_a_whole_reply_is_annotated():
    body = {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "message": {"reasoning": "r", "content": "108"}}],
        "usage": {"completion_tokens": 30, "completion_tokens_details": {"reasoning_tokens": 0}},
    }
    got = json.loads(annotate_body(json.dumps(body).encode(), CHAT, _state(), Feedback()))
    assert got["choices"][0]["message"]["reasoning_content"] == "r"
    assert got["usage"]["completion_tokens_details"]["reasoning_tokens"] == 25
    assert got["rtap"]["policy"] == "confidence"


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]"])
def test_other_bodies_come_back_as_they_were(body):
    assert annotate_body(body, CHAT, _state(), Feedback()) == body
    assert annotate_body(b'{"a":1}', CHAT, RequestState(), Feedback()) == b'{"a":1}'


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (CHAT, [_chunk({"content": "108"}), _chunk({}, "stop")]),
        ("/v1/responses", [{"type": "response.completed", "response": {"id": "chatcmpl-1", "usage": {}}}]),
        (
            "/v1/messages",
            [{"type": "message_start", "message": {"id": "chatcmpl-1"}}, {"type": "message_delta", "usage": {}}],
        ),
    ],
)
def test_feedback_knows_the_id_that_the_client_knows(path, events):
    feedback = Feedback()
    EventStream(path, _state(), feedback).feed(_sse(*events))
    assert feedback.judge("chatcmpl-1", 0, correct=True) == 0.75
    assert list(feedback._answers) == [(b"", "chatcmpl-1")]


@pytest.mark.parametrize(
    ("path", "event"),
    [
        (CHAT, b'data: {"error":{"message":"%s","type":"InternalServerError","param":null,"code":500}}\n\n'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"%s"}}\n\n'),
    ],
)
def test_an_error_in_a_stream_tells_nothing_of_the_inside(path, event):
    said = b"2 validation errors for ChatCompletionStreamResponse [type=missing, input_value={'a': 1}] /usr/lib/x.py"
    out = _stream(path).feed(event % said)
    assert out.startswith(event[: event.index(b"{")])
    error = json.loads(out[out.index(b"{") :])
    assert (error.get("type") == "error") == (path == "/v1/messages")
    assert (
        error_of(path, error)["message"]
        == "the server failed on this request; its log has the cause under request id id-1"
    )


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/audio/transcriptions"])
async def test_of_a_request_that_does_not_recurse_only_error_events_change(path):
    sent = []

    async def send(message):
        sent.append(message)

    for content_type, parts in (
        (b"application/json", [b'{"id": "1", ', b'"usage": {}}']),
        (b"text/event-stream", [b'data: {"usage":{}, "finish_reason":"stop"}\n\n', b"data: [DONE]\n\n"]),
    ):
        sent.clear()
        rewriter = ResponseRewriter(send, path, RequestState("id-1"), Feedback())
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]}
        bodies = [{"type": "http.response.body", "body": part, "more_body": part is not parts[-1]} for part in parts]
        for message in (start, *bodies):
            await rewriter(message)
        assert sent == [start, *bodies]

    sent.clear()
    event = b'data: {"error": {"message": "lost /dev/gpu0", "type": "InternalServerError", "param": null, "code": 500}}'
    rewriter = ResponseRewriter(send, path, RequestState("id-1"), Feedback())
    await rewriter(start)
    await rewriter({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})
    error = json.loads(sent[1]["body"].removeprefix(b"data: "))["error"]
    assert error["message"] == "the server failed on this request; its log has the cause under request id id-1"

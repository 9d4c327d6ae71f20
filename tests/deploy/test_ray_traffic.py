"""What the gateway reads of requests and replies."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.traffic import EventReader, ForwardedRequest, conversation_key, merge_metrics, response_tokens

QUESTION = {"role": "user", "content": "make 82 from 3, 7, 25"}
CYCLE = {"index": 0, "tokens": 27, "prompt_tokens": 22, "cached_tokens": 0}
SECOND = {"index": 1, "tokens": 30, "prompt_tokens": 50, "cached_tokens": 32}
TRAJECTORY = {"stop_reason": "threshold", "cycles": [CYCLE, SECOND], "discarded_tokens": 5}
SPENT = 27 + 22 + 30 + 50 - 32 + 5


def chat(*messages: dict[str, Any], key: bytes = b"Bearer a", **more: Any) -> ForwardedRequest:
    body = {"model": "rtap", "messages": messages, **more}
    return ForwardedRequest(
        "POST", "/v1/chat/completions", headers=((b"authorization", key),), body=json.dumps(body).encode()
    )


FIRST = chat(QUESTION)


@pytest.mark.parametrize(
    "later",
    [
        chat(QUESTION, {"role": "assistant", "content": "25*3+7"}, {"role": "user", "content": "sure?"}),
        chat(QUESTION, temperature=0.1, stream=True),
    ],
    ids=["a later turn", "other sampling"],
)
def test_turns_of_one_conversation_go_together(later: ForwardedRequest) -> None:
    assert conversation_key(later) == conversation_key(FIRST) != ""


@pytest.mark.parametrize(
    "other",
    [
        chat({"role": "user", "content": "make 83 from 3, 7, 25"}),
        chat({"role": "system", "content": "Be brief."}, QUESTION),
        chat(QUESTION, model="adapter"),
        chat(QUESTION, key=b"Bearer b"),
    ],
    ids=["another question", "another system prompt", "another model", "another key"],
)
def test_what_shares_no_cache_need_not_go_together(other: ForwardedRequest) -> None:
    assert conversation_key(other) != conversation_key(FIRST)


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"input": "hi", "instructions": "x"}, {"input": "hi", "instructions": "x", "stream": True}),
        ({"input": [QUESTION]}, {"input": [QUESTION, {"type": "reasoning"}, {"role": "user", "content": "?"}]}),
        ({"system": "x", "messages": [QUESTION]}, {"system": "x", "messages": [QUESTION, {"role": "assistant"}]}),
        ({"prompt": [1, 2, 3]}, {"prompt": [1, 2, 3], "max_tokens": 9}),
    ],
    ids=["responses, text", "responses, items", "messages", "completions"],
)
def test_every_endpoint_has_a_beginning(first: dict[str, Any], later: dict[str, Any]) -> None:
    told = [conversation_key(ForwardedRequest("POST", "/", body=json.dumps(body).encode())) for body in (first, later)]
    assert told[0] == told[1] != ""
    assert told[0] != conversation_key(ForwardedRequest("POST", "/", body=b'{"prompt": [1, 2, 4]}'))


def test_what_the_client_says_wins() -> None:
    other = chat({"role": "user", "content": "else"}, prompt_cache_key="c1")
    assert conversation_key(other) == conversation_key(chat(QUESTION, prompt_cache_key="c1"))
    header = ForwardedRequest("POST", "/", headers=((b"x-session-id", b"s1"),), body=FIRST.body)
    assert conversation_key(header) == conversation_key(
        ForwardedRequest("POST", "/", headers=((b"x-session-id", b"s1"),))
    )
    assert conversation_key(header) != conversation_key(FIRST)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 5000, b'{"text": 1}', b"\xff"])
def test_without_a_beginning_any_replica_will_do(body: bytes) -> None:
    assert conversation_key(ForwardedRequest("POST", "/tokenize", body=body)) == ""
    assert conversation_key(ForwardedRequest("GET", "/v1/models")) == ""


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": [{"index": 0}], "rtap": TRAJECTORY},
        {
            "choices": [{"index": 0, "rtap": TRAJECTORY}, {"index": 1, "rtap": {**TRAJECTORY, "cycles": []}}],
            "rtap": TRAJECTORY,
        },
    ],
    ids=["one choice", "two"],
)
def test_a_reply_says_what_it_cost(reply: dict[str, Any]) -> None:
    expected = SPENT + 5 * (len(reply["choices"]) - 1)
    assert response_tokens(json.dumps(reply).encode()) == expected


def test_a_score_says_what_was_read_for_it() -> None:
    assert response_tokens(b'{"object": "rtap.score", "confidence": 0.9, "confidence_tokens": 70}') == 70


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"object": "list"}', b'{"error": {"message": "rtap"}}', b'{"rtap": null}']
)
def test_other_replies_cost_nothing(body: bytes) -> None:
    assert response_tokens(body) == 0


def event(body: dict[str, Any], name: str | None = None) -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


STREAM = b"".join(
    [
        event({"choices": [{"delta": {"reasoning": 'he said "rtap"\n\nand left'}}]}),
        event({"choices": [{"delta": {}}], "rtap": {"event": "cycle", "cycle": CYCLE}}),
        event({"choices": [{"delta": {}}], "rtap": {"event": "cycle", "cycle": SECOND}}),
        event({"choices": [{"finish_reason": "stop"}], "rtap": TRAJECTORY}),
        b"data: [DONE]\n\n",
    ]
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_passes_in_whole_events_however_it_was_cut(cuts: list[int]) -> None:
    reader, passed = EventReader(), b""
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        events = reader.feed(STREAM[start:end])
        assert events.endswith(b"\n\n") or not events
        passed += events
    assert passed + reader.rest() == STREAM
    assert reader.tokens == SPENT


def test_a_stream_that_breaks_off_costs_the_cycles_it_told_of() -> None:
    reader = EventReader()
    reader.feed(STREAM[: STREAM.index(b'"index": 1')])
    assert reader.tokens == 27 + 22


def test_the_last_event_of_responses_and_messages_counts() -> None:
    for last in (
        {"type": "response.completed", "response": {"rtap": TRAJECTORY}},
        {"type": "message_delta", "rtap": TRAJECTORY},
    ):
        reader = EventReader()
        reader.feed(event(last, name=str(last["type"])))
        assert reader.tokens == SPENT
    reader = EventReader()
    reader.feed(event({"choices": [], "rtap": TRAJECTORY, "rtap_choices": [TRAJECTORY, TRAJECTORY]}))
    assert reader.tokens == 2 * SPENT


def test_series_of_replicas_are_told_apart_and_stay_what_they_were() -> None:
    text = (
        "# HELP rtap_in_flight Now.\n# TYPE rtap_in_flight gauge\nrtap_in_flight 2.0\n"
        '# HELP vllm:x_total X.\n# TYPE vllm:x_total counter\nvllm:x_total{model_name="a"} 3.0\n'
    )
    lines = merge_metrics({"r1": text, "r2": text.replace("3.0", "4.0"), "gateway": ""}).splitlines()
    assert 'rtap_in_flight{replica="r1"} 2.0' in lines
    assert 'vllm:x_total{model_name="a",replica="r1"} 3.0' in lines
    assert 'vllm:x_total{model_name="a",replica="r2"} 4.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == 2

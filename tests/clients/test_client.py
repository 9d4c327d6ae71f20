"""RTAP and AsyncRTAP against prepared answers: request bodies, typed replies, streams, retries."""

import asyncio
import time

import openai
import pytest

from rtap_client import RTAP, AsyncRTAP, CycleEvent, IncompleteStream, Trajectory, events, trajectory
from rtap_client.client import api_url
from tests.clients.fake_server import (
    CONTENT,
    CYCLE,
    CYCLE_END,
    DRAFTS,
    LAST,
    REPLY,
    THOUGHT,
    Answer,
    error,
    fake_server,
    stream,
)

QUESTION = [{"role": "user", "content": "2+2"}]


def test_rtap_options_are_a_field_of_the_body():
    with fake_server(Answer(body=REPLY)) as fake, RTAP(fake.url) as client:
        client.chat.completions.create(
            model="rtap", messages=QUESTION, seed=3, rtap={"threshold": 0.8}, extra_body={"min_p": 0.1}
        )
        client.chat.completions.create(model="rtap", messages=QUESTION)
    paths, bodies = [r[0] for r in fake.requests], [r[2] for r in fake.requests]
    assert paths == ["/v1/chat/completions"] * 2
    assert bodies[0] == {
        "model": "rtap", "messages": QUESTION, "seed": 3, "rtap": {"threshold": 0.8}, "min_p": 0.1
    }  # fmt: skip
    assert "rtap" not in bodies[1]


def test_a_reply_is_typed():
    with fake_server(Answer(body=REPLY)) as fake, RTAP(fake.url) as client:
        reply = client.chat.completions.create(model="rtap", messages=QUESTION)
        raw = client.chat.completions.with_raw_response.create(model="rtap", messages=QUESTION)
    assert isinstance(reply, openai.types.chat.ChatCompletion)
    assert isinstance(reply.rtap, Trajectory)
    assert (reply.rtap.stop_reason, reply.rtap.accepted.answer, reply.rtap.degraded) == ("threshold", "4", None)
    assert reply.choices[0].message.reasoning == "2+2"
    assert raw.parse().rtap.cycles[0].confidence == 0.9


def test_an_older_client_reads_a_newer_servers_reply():
    newer = REPLY | {"rtap": REPLY["rtap"] | {"policy": "ask_a_friend", "moon": "full"}}
    with fake_server(Answer(body=newer)) as fake, RTAP(fake.url) as client:
        found = client.chat.completions.create(model="rtap", messages=QUESTION).rtap
    assert (found.policy, found.model_extra) == ("ask_a_friend", {"moon": "full"})


def test_trajectories_and_events_of_the_plain_sdk():
    with fake_server(Answer(body=REPLY), stream(THOUGHT, CYCLE_END, CONTENT, LAST)) as fake:
        client = openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none")
        reply = client.chat.completions.create(model="rtap", messages=QUESTION, extra_body={"rtap": {"max_cycles": 2}})
        assert trajectory(reply).accepted.tokens == 7
        received = list(events(client.chat.completions.create(model="rtap", messages=QUESTION, stream=True)))
    assert [event.type for event in received] == ["thinking", "cycle", "answer", "done"]
    assert received[1] == CycleEvent(received[1].cycle, 0)
    assert received[1].cycle.to_dict() == CYCLE
    assert (received[-1].text, received[-1].rtap.confidence, received[-1].id) == ("4", 0.9, "chatcmpl-1")


def test_drafts_are_events_of_both_clients():
    with fake_server(stream(*DRAFTS, CYCLE_END, CONTENT, LAST)) as fake:
        plain = openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none")
        rtap = {"rtap": {"drafts": True}}
        for client, options in ((plain, {"extra_body": rtap}), (RTAP(fake.url), rtap)):
            chunks = client.chat.completions.create(model="rtap", messages=QUESTION, stream=True, **options)
            received = list(events(chunks))
            assert [event.type for event in received] == ["draft", "draft", "cycle", "answer", "done"]
            assert [(event.draft.index, event.draft.text, event.draft.think) for event in received[:2]] == [
                (0, "so ", ""), (0, "4", ""),
            ]  # fmt: skip
            assert received[-1].text == "4"
        assert all(body["rtap"] == rtap["rtap"] for _, _, body in fake.requests)


def test_a_reply_without_trajectory_has_none():
    with fake_server(Answer(body={k: v for k, v in REPLY.items() if k != "rtap"})) as fake, RTAP(fake.url) as client:
        reply = client.chat.completions.create(model="rtap", messages=QUESTION)
    assert reply.rtap is None
    assert trajectory(reply) is None


async def test_the_async_client_has_options_replies_and_events():
    answers = (Answer(body=REPLY), stream(THOUGHT, CYCLE_END, CONTENT, LAST))
    with fake_server(*answers) as fake:
        async with AsyncRTAP(fake.url) as client:
            reply = await client.chat.completions.create(model="rtap", messages=QUESTION, rtap={"samples": 2})
            chunks = await client.chat.completions.create(model="rtap", messages=QUESTION, stream=True)
            kinds = [event.type async for event in events(chunks)]
    assert reply.rtap.accepted.answer == "4"
    assert fake.requests[0][2]["rtap"] == {"samples": 2}
    assert kinds == ["thinking", "cycle", "answer", "done"]


def test_an_incomplete_stream_is_an_error():
    with fake_server(stream(THOUGHT, CYCLE_END, CONTENT)) as fake, RTAP(fake.url) as client:
        received = events(client.chat.completions.create(model="rtap", messages=QUESTION, stream=True))
        with pytest.raises(IncompleteStream, match="send the request again"):
            list(received)


def test_an_error_inside_a_stream_raises_the_sdks_error():
    broken = {"error": {"message": "the engine died", "type": "internal_error", "code": 500}}
    with fake_server(stream(THOUGHT, broken)) as fake, RTAP(fake.url) as client:
        received = events(client.chat.completions.create(model="rtap", messages=QUESTION, stream=True))
        with pytest.raises(openai.APIError, match="the engine died"):
            list(received)


@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_honours_retry_after(status):
    with fake_server(error(status, "full", Retry_After="1"), Answer(body=REPLY)) as fake, RTAP(fake.url) as client:
        began = time.monotonic()
        client.chat.completions.create(model="rtap", messages=QUESTION)
        assert time.monotonic() - began >= 1
    assert len(fake.requests) == 2
    assert fake.sent("idempotency-key") == [None, None]  # the server refuses this header


def test_the_async_client_retries():
    async def ask(url: str) -> None:
        async with AsyncRTAP(url) as client:
            await client.chat.completions.create(model="rtap", messages=QUESTION)

    with fake_server(error(503, "full", Retry_After_Ms="10"), Answer(body=REPLY)) as fake:
        asyncio.run(ask(fake.url))
    assert fake.sent("idempotency-key") == [None, None]


def test_without_retries_an_error_is_raised_at_once():
    with fake_server(error(503, "full"), Answer(body=REPLY)) as fake:
        client = RTAP(fake.url, max_retries=0)
        with pytest.raises(openai.InternalServerError, match="full"):
            client.chat.completions.create(model="rtap", messages=QUESTION)
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://h/rtap/v1/", "https://h/rtap/v1"),
        (None, "http://127.0.0.1:8000/v1"),
    ],
)
def test_v1_is_optional_in_an_address(given, expected, monkeypatch):
    monkeypatch.delenv("RTAP_URL", raising=False)
    assert api_url(given) == expected


def test_address_and_key_come_from_the_environment_and_openais_key_is_not_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.delenv("RTAP_API_KEY", raising=False)
    with fake_server(Answer(body=REPLY)) as fake:
        monkeypatch.setenv("RTAP_URL", fake.url)
        RTAP().chat.completions.create(model="rtap", messages=QUESTION)
        monkeypatch.setenv("RTAP_API_KEY", "key-team")
        RTAP().chat.completions.create(model="rtap", messages=QUESTION)
    assert fake.sent("authorization") == ["Bearer none", "Bearer key-team"]

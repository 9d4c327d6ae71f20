"""Chunks as SDKs read them: vLLM's app on a scripted engine, which writes a token at a time."""

import json
from typing import Any

import httpx
import openai
import pytest

from rtap_server.settings import Settings
from tests.core.scripted import ScriptedConfidence
from tests.server.whole import Service, make_service

CALL = '<tool_call>\n{"name": "look_up", "arguments": {"x": 82, "y": [7, 25]}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
POLICIES = [
    {"policy": "single"}, {"policy": "model"}, {"policy": "vote", "samples": 2}, {"policy": "confidence"},
    {"policy": "confidence", "threshold": 1.0, "max_cycles": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Service:
    return make_service(
        None, Settings(confidence_model="http://generator"), "--enable-auto-tool-choice", "--tool-call-parser",
        "hermes", confidence=ScriptedConfidence(lambda _: 0.9),
    )  # fmt: skip


def write(service: Service, answer: str, *, size: int | None) -> None:
    service.engine.script = lambda _: f"<think>3+79=82</think><answer>{answer}</answer>"
    service.engine.size = size


def client(service: Service) -> openai.AsyncOpenAI:
    transport: Any = httpx.ASGITransport(service.app)
    return openai.AsyncOpenAI(
        base_url="http://rtap/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(transport=transport)
    )


@pytest.mark.parametrize("size", [1, 9, None], ids=["token", "merged", "at-once"])
@pytest.mark.parametrize("rtap", POLICIES)
async def test_a_streamed_tool_call_reaches_the_sdk_whole(service, rtap, size):
    write(service, CALL, size=size)
    entries = []
    async with client(service).chat.completions.stream(
        model="rtap", messages=[{"role": "user", "content": "82?"}], tools=[TOOL], extra_body={"rtap": rtap}
    ) as stream:
        async for event in stream:
            if event.type == "chunk":
                entries += [d.tool_calls for c in event.chunk.choices if (d := c.delta).tool_calls]
        (choice,) = (await stream.get_final_completion()).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason) == ("look_up", "tool_calls")
    assert call.function.arguments == '{"x": 82, "y": [7, 25]}'
    assert all(len(calls) == 1 for calls in entries)
    if size == 1:
        assert len(entries) > 5


@pytest.mark.parametrize("rtap", POLICIES)
async def test_content_and_its_log_probabilities_come_in_several_chunks(service, rtap):
    write(service, "82 is 3+79", size=1)
    asked = {
        "model": "rtap", "messages": [{"role": "user", "content": "82?"}], "logprobs": True,
        "extra_body": {"rtap": rtap},
    }  # fmt: skip
    stream = await client(service).chat.completions.create(**asked, stream=True)
    choices = [chunk.choices[0] async for chunk in stream if chunk.choices]
    texts = [choice.delta.content for choice in choices if choice.delta.content]
    tokens = [entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    (whole,) = (await client(service).chat.completions.create(**asked)).choices
    assert "".join(texts) == "".join(tokens) == whole.message.content == "82 is 3+79"
    assert [entry.token for entry in whole.logprobs.content] == tokens
    assert len(texts) > 5


@pytest.mark.parametrize("rtap", POLICIES)
async def test_drafts_are_further_chunks_that_a_client_may_pass_over(service, rtap):
    """The others are the same with and without them: content, log-probabilities, usage, token ids."""
    write(service, "82 is 3+79", size=1)

    async def chunks(**more: Any) -> list[dict[str, Any]]:
        body = {
            "model": "rtap", "messages": [{"role": "user", "content": "82?"}], "stream": True, "logprobs": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True, "rtap": rtap | more,
        }  # fmt: skip
        reply = await service.ask("/v1/chat/completions", json=body)
        return [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]

    def shown(chunk: dict[str, Any]) -> tuple[Any, ...]:
        return chunk["choices"], chunk.get("usage"), chunk.get("rtap", {}).get("event")

    got, plain = await chunks(drafts=True), await chunks()
    drafts = [chunk for chunk in got if chunk.get("rtap", {}).get("event") == "draft"]
    assert [shown(chunk) for chunk in got if chunk not in drafts] == [shown(chunk) for chunk in plain]
    for chunk in drafts:
        (choice,) = chunk["choices"]
        assert (choice["delta"], choice["logprobs"], choice["finish_reason"], choice.get("token_ids") or []) == (
            {}, None, None, [],
        )  # fmt: skip
    assert bool(drafts) == (rtap["policy"] != "single")
    texts = ["".join(c["rtap"]["draft"].get("text", "") for c in drafts if c["rtap"]["draft"]["index"] == 0)]
    assert texts == (["82 is 3+79"] if drafts else [""])


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "82?"}),
        ("/v1/responses", {"input": "82?"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "82?"}]}),
    ],
)
async def test_drafts_are_for_chat_and_change_no_other_stream(service, path, asked):
    write(service, "82 is 3+79", size=1)
    body = {"model": "rtap", "max_tokens": 100, "max_output_tokens": 100, "stream": True} | asked
    reply = await service.ask(path, json=body | {"rtap": {"drafts": True}})
    assert reply.status_code == 200
    assert '"rtap"' in reply.text
    assert '"draft"' not in reply.text


@pytest.mark.parametrize("rtap", POLICIES)
@pytest.mark.parametrize(("max_tokens", "is_cut"), [(9, True), (30, True), (300, False)])
async def test_a_cut_response_is_incomplete(service, rtap, max_tokens, is_cut):
    """In the first thought, in the first answer."""
    write(service, "82 is " + "7+" * 30, size=1)
    asked = {"model": "rtap", "input": "82?", "max_output_tokens": max_tokens, "extra_body": {"rtap": rtap}}
    whole = await client(service).responses.create(**asked)
    events = [event async for event in await client(service).responses.create(**asked, stream=True)]
    status = "incomplete" if is_cut else "completed"
    assert events[-1].type == f"response.{status}"
    ended = [event.item for event in events if event.type == "response.output_item.done"]
    assert ended[-1].status == status
    for response in (whole, events[-1].response):
        assert (response.status, response.output[-1].status) == (status, status)
        assert (response.incomplete_details is not None) == is_cut
        assert not is_cut or response.incomplete_details.reason == "max_output_tokens"
        assert [item.type for item in response.output] == [item.type for item in ended]
    message = {"model": "rtap", "max_tokens": max_tokens, "messages": [{"role": "user", "content": "82?"}]}
    reply = await service.ask("/v1/messages", json=message | {"rtap": rtap})
    assert reply.json()["stop_reason"] == ("max_tokens" if is_cut else "end_turn")

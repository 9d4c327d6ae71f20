"""A generator on another server, over a transport that answers by script; tests/e2e has a real one."""

import asyncio
import json

import httpx
import pytest
from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest

from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence.inputs import ChatInput
from rtap_server.engine.confidence.remote import PROBE, RemoteConfidence, RemoteTokenizer
from rtap_server.engine.request_state import RequestState, begin_request

JUDGED = Judged([1, 2], [3], [1, 2])


async def score(answer, timeout_seconds: float = 1.0) -> Score:
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        return await RemoteConfidence("http://generator/", timeout_seconds, client, 1000).score(JUDGED)


async def test_its_answer_is_waited_for_as_long_as_the_setting_says_and_no_less():
    """httpx would give up a read after five seconds by itself."""
    limits = []

    async def late(request: httpx.Request) -> httpx.Response:
        limits.append(request.extensions["timeout"])
        await asyncio.sleep(0.1)
        return httpx.Response(200, json={"data": [{"probs": [0.0]}]})

    assert await score(late) == Score(0.5, 3)
    assert set(limits[0].values()) == {None}
    with pytest.raises(ConfidenceError, match="timed out"):
        await score(late, 0.05)


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(500),
        httpx.Response(200, text="no JSON"),
        httpx.Response(200, json={"data": []}),
        httpx.Response(200, json={"data": [{"probs": [0.1, 0.2, 0.3]}]}),
    ],
    ids=["status", "text", "empty", "three labels"],
)
async def test_a_wrong_answer_is_no_score(reply):
    with pytest.raises(ConfidenceError):
        await score(lambda _: reply)


async def test_the_prefix_caches_of_keys_are_kept_apart_on_the_remote_server():
    salts = []

    async def answer(request: httpx.Request) -> httpx.Response:
        salts.append(ClassificationCompletionRequest.model_validate_json(request.content).cache_salt)
        return httpx.Response(200, json={"data": [{"probs": [0.9]}]})

    for owner in (b"", b"one", b"two", b"one"):
        begin_request(RequestState(owner=owner))
        await score(answer)
    assert salts[0] is None
    assert salts[1] == salts[3] != salts[2]


async def test_it_is_asked_for_logits_because_configs_name_different_activations():
    asked = []

    async def answer(request: httpx.Request) -> httpx.Response:
        asked.append(ClassificationCompletionRequest.model_validate_json(request.content))
        return httpx.Response(200, json={"data": [{"probs": [2.0]}]})

    assert (await score(answer)).confidence == pytest.approx(0.880797, abs=1e-6)
    assert asked[0].to_pooling_params().use_activation is False


class Server:
    """vLLM with a classifier whose template refuses system messages; a token is a byte."""

    def __init__(self, status: int = 200) -> None:
        self.asked, self._status = [], status

    async def respond(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append((request.url.path, body))
        if request.url.path == "/classify":
            return httpx.Response(self._status, json={"data": [{"probs": [0.0]}]})
        if any(message["role"] == "system" for message in body.get("messages", ())):
            return httpx.Response(400, json={"error": {"message": "system messages are not supported"}})
        text = "".join(m["content"] for m in body["messages"]) if "messages" in body else body["prompt"]
        return httpx.Response(200, json={"tokens": list(text.encode()), "max_model_len": 100})


def decode(token_ids, _skip_special_tokens) -> str:
    return bytes(token_ids).decode()


async def test_its_own_template_renders_a_chat():
    server = Server()
    async with httpx.AsyncClient(transport=httpx.MockTransport(server.respond)) as client:
        tokenizer = RemoteTokenizer("http://generator/", client)
        assert await tokenizer.check() == (list(PROBE.encode()), 100)
        remote = RemoteConfidence("http://generator/", 1.0, client, 1000, ChatInput(tokenizer, decode, 100))
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
        begin_request(RequestState(messages=messages))
        assert await remote.score(Judged([], [], [], answer="4")) == Score(0.5, len("Be brief.\n\n2+2?4"))
    *_, (refused, first), (rendered, second), (scored, last) = server.asked
    assert (refused, rendered, scored) == ("/tokenize", "/tokenize", "/classify")
    assert first["messages"] == [*messages, {"role": "assistant", "content": "4"}]
    assert second == {
        "messages": [{"role": "user", "content": "Be brief.\n\n2+2?"}, {"role": "assistant", "content": "4"}],
        "add_generation_prompt": False,
    }
    assert bytes(last["input"][0]).decode() == "Be brief.\n\n2+2?4"


@pytest.mark.parametrize(
    ("status", "problem"), [(200, None), (404, "/classify gives no score"), (500, "HTTPStatusError")]
)
async def test_a_server_that_does_not_classify_is_found_at_the_start(status, problem):
    async with httpx.AsyncClient(transport=httpx.MockTransport(Server(status).respond)) as client:
        remote = RemoteConfidence("http://generator", 1.0, client, 1000)
        if problem is None:
            await remote.check(JUDGED)
            return
        with pytest.raises(ConfigError, match=problem):
            await remote.check(JUDGED)


async def test_a_server_that_is_slow_at_the_start_is_kept():
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(10)
        raise AssertionError

    async with httpx.AsyncClient(transport=httpx.MockTransport(never)) as client:
        await RemoteConfidence("http://generator", 0.05, client, 1000).check(JUDGED)


async def test_more_tokens_than_the_servers_context_are_too_long():
    async with httpx.AsyncClient(transport=httpx.MockTransport(Server().respond)) as client:
        with pytest.raises(ConfidenceError, match="3 tokens are above the generator's context of 2") as raised:
            await RemoteConfidence("http://generator", 1.0, client, 2).score(Judged([1, 2], [3], [1, 2]))
    assert raised.value.reason == "too_long"

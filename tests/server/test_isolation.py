"""Requests of different API keys do not affect each other; request text is in no log and no metric. On vLLM's app."""

import asyncio
import io
import itertools
import json
import logging

import httpx
import pytest

from rtap_core.errors import ConfigError
from rtap_core.types import Judged, Score
from rtap_server.settings import Settings
from tests.server.whole import CYCLE, Service, make_service

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
REQUESTS = 200
CANARY = "CANARY 83 61 47 29"  # of characters that the model's tokenizer knows


class Half:
    """A generator that is never sure."""

    async def score(self, judged: Judged) -> Score:
        return Score(0.4, len(judged.cycle_token_ids))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    settings = Settings(confidence="remote", confidence_model="http://nowhere", max_cycles=2)
    return make_service(tmp_path_factory.mktemp("keys") / "keys.toml", settings, confidence=Half())


def body_of(path: str, text: str, *, stream: bool = False, **more) -> dict:
    said = {"prompt": text} if path == PATHS[1] else {"input": text} if path == PATHS[2] else {
        "messages": [{"role": "user", "content": text}]
    }  # fmt: skip
    most = "max_output_tokens" if path == PATHS[2] else "max_tokens"
    return {"model": "rtap", most: 200, "stream": stream, **said, **more}


async def test_two_hundred_interleaved_requests_of_three_keys_cross_nowhere(service):
    """Each reply repeats the number of its own prompt, and no other's; each cycle has the salt of its own key."""
    service.engine.prompts.clear()
    service.engine.salts.clear()
    service.engine.most_seconds = 0.01

    def answer(prompt: str) -> str:
        number = prompt.split("#", 1)[1][:7]
        return f"<think>it is {number}</think><answer>{number}</answer>"

    service.engine.write = answer
    keys = ("key-a", "key-b", "key-vllm")
    numbers = [f"N{100_003 + 37 * n}" for n in range(REQUESTS)]

    async def ask(n: int) -> httpx.Response:
        path, key = PATHS[n % 4], keys[n % 3]
        body = body_of(path, f"#{numbers[n]}", stream=n % 5 == 0, rtap={"return_cycles": n % 2 == 0})
        return await service.ask(path, key, json=body, headers={"x-request-id": "same"})

    replies = await asyncio.gather(*(ask(n) for n in range(REQUESTS)))
    everyone = set(numbers)
    for n, reply in enumerate(replies):
        assert reply.status_code == 200, reply.text
        assert {number for number in everyone if number in reply.text} == {numbers[n]}
    salts: dict[str, set[str]] = {}
    for prompt, salt in zip(service.engine.prompts, service.engine.salts, strict=True):
        assert salt
        salts.setdefault(keys[numbers.index(prompt.split("#", 1)[1][:7]) % 3], set()).add(salt)
    assert len(service.engine.prompts) == 2 * REQUESTS  # two cycles each
    assert [len(found) for found in salts.values()] == [1, 1, 1]
    assert len(set.union(*salts.values())) == 3


async def test_one_key_cannot_judge_anothers_answer_or_learn_of_it(service):
    """Also where both chose the same request id."""
    service.engine.write = lambda _: "<think>3+4=7</think><answer>7</answer>"
    verdict = {"correct": True}
    for key in ("key-a", "key-b"):
        reply = await service.ask(PATHS[0], key, json=body_of(PATHS[0], "3 + 4"), headers={"x-request-id": f"of-{key}"})
        verdict["request_id"] = reply.json()["id"]
        assert (await service.ask("/v1/rtap/feedback", key, json=verdict)).status_code == 200
    stranger = await service.ask("/v1/rtap/feedback", "key-a", json=verdict)
    unknown = await service.ask("/v1/rtap/feedback", "key-a", json=verdict | {"request_id": "chatcmpl-of-nobody"})
    message = unknown.json()["error"]["message"].replace("chatcmpl-of-nobody", verdict["request_id"])
    assert (stranger.status_code, stranger.json()["error"]["message"]) == (404, message)


async def test_what_the_generator_reads_for_a_key_is_charged_to_it(service):
    service.forget_spending()
    pair = {"question": "3 + 4", "think": "3+4=7", "answer": "7"}
    first, second = [await service.ask("/v1/rtap/score", "key-poor", json=pair) for _ in range(2)]
    assert (first.status_code, second.status_code) == (200, 429)
    assert abs(int(second.headers["retry-after"]) - (first.json()["confidence_tokens"] - 5) * 12) <= 1
    service.forget_spending()


async def test_stored_responses_are_refused_with_keys(tmp_path, monkeypatch):
    """vLLM's store has no owners: any key could read every response."""
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(ConfigError, match="lets every API key read every stored response"):
        await asyncio.to_thread(make_service, tmp_path / "keys.toml", Settings())


async def test_two_requests_with_one_request_id_do_not_end_each_other(service):
    """vLLM aborts every request under an id, so the client's id must not become part of an engine id."""
    service.engine.write = lambda _: CYCLE
    service.engine.by_token, service.engine.token_seconds = True, 0.02
    headers = {"x-request-id": "same"}
    single, hurried = {"policy": "single"}, {"policy": "single", "deadline_seconds": 0.05}
    try:
        replies = await asyncio.gather(
            *(
                service.ask(PATHS[0], "key-a", json=body_of(PATHS[0], "3 + 4", rtap=rtap), headers=headers)
                for rtap in (single, hurried, single)
            )
        )
    finally:
        service.engine.by_token, service.engine.token_seconds = False, 0.0
    assert [reply.headers["x-request-id"] for reply in replies] == ["same"] * 3
    assert len({reply.json()["id"] for reply in replies}) == 3
    assert [reply.json()["rtap"]["stop_reason"] for reply in replies] == ["max_cycles", "deadline", "max_cycles"]
    assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == ["7", None, "7"]
    assert len(set(service.engine.ids)) == len(service.engine.ids)


async def test_one_key_cannot_stop_anothers_request(service):
    refused = await service.ask("/inference/v1/abort_requests", "key-b", json={"request_ids": ["chatcmpl-of-key-a"]})
    assert refused.status_code == 400
    assert "close the connection" in refused.json()["error"]["message"]


BAD = [
    ("/v1/chat/completions", {"temperature": CANARY}),
    ("/v1/chat/completions", {"messages": CANARY}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": CANARY}]}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "#" + CANARY * 3000}]}),
    ("/v1/chat/completions", {"tools": [{"type": CANARY}]}),
    ("/v1/chat/completions", {"rtap": {"policy": CANARY}}),
    ("/v1/chat/completions", {"vllm_xargs": {"rtap_policy": CANARY}}),
    ("/v1/chat/completions", {"model": CANARY}),
    ("/v1/chat/completions", {"chat_template": CANARY}),
    ("/v1/completions", {"prompt": {"a": CANARY}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": [CANARY]}]}]}),
    ("/v1/responses", {"previous_response_id": CANARY}),
    ("/v1/messages", {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/messages/count_tokens", {"messages": CANARY}),
    ("/tokenize", {"model": "rtap", "prompt": [CANARY]}),
    ("/detokenize", {"model": "rtap", "tokens": [CANARY]}),
    ("/inference/v1/generate", {"model": CANARY, "token_ids": [CANARY]}),
    ("/v1/rtap/score", {"question": CANARY, "answer": ""}),
    ("/v1/rtap/feedback", {"request_id": CANARY, "correct": CANARY}),
    ("/v1/rtap/feedback", {"request_id": CANARY, "correct": True}),
    ("/invocations", {"messages": CANARY}),
    ("/no/route", {"prompt": CANARY}),
]
GOOD = [
    *((path, body_of(path, CANARY, stream=stream)) for path, stream in itertools.product(PATHS, (False, True))),
    ("/v1/rtap/score", {"question": CANARY, "think": CANARY, "answer": CANARY}),
    ("/tokenize", {"model": "rtap", "prompt": CANARY}),
    ("/v1/messages/count_tokens", {"model": "rtap", "messages": [{"role": "user", "content": CANARY}]}),
    ("/v1/chat/completions/render", body_of(PATHS[0], CANARY)),
]


@pytest.fixture(scope="module")
def log(service):
    """Log lines of all loggers at INFO, the default of the server's own; vLLM's default is WARNING here."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    handler.addFilter(lambda record: not record.name.startswith(("httpx", "httpcore")))  # the client of this test
    names = [logging.getLogger(name) for name in ("", "vllm", "uvicorn.error", "uvicorn.access", "fastapi")]
    levels = [one.level for one in names]
    for one in names:
        one.addHandler(handler)
        one.setLevel(logging.INFO)
    yield out
    for one, level in zip(names, levels, strict=True):
        one.removeHandler(handler)
        one.setLevel(level)


@pytest.mark.parametrize(("path", "body"), GOOD, ids=[f"{path} {number}" for number, (path, _) in enumerate(GOOD)])
async def test_a_good_request_is_in_no_log_and_no_metric(service, log, path, body):
    service.engine.write = lambda _: f"<think>{CANARY}</think><answer>{CANARY}</answer>"
    reply = await service.ask(path, "key-a", json=body)
    assert reply.status_code == 200, reply.text
    _check(service, log)


@pytest.mark.parametrize(("path", "body"), BAD, ids=[f"{path} {number}" for number, (path, _) in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_a_4xx_in_openais_shape(service, log, path, body, stream):
    whole = body_of(path, CANARY, stream=stream) | body if path in PATHS else body
    reply = await service.ask(path, "key-a", json=whole)
    assert reply.status_code in (400, 404), reply.text
    shown = json.loads(reply.text)["error"]
    assert set(shown) == {"message", "type", "param", "code"}
    assert shown["message"]
    assert "key-a" not in reply.text + log.getvalue() + service.metrics()
    assert "CANARY" not in service.metrics()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_of_the_engine_tells_nothing(service, log, path, stream):
    text = f"{CANARY} in /srv/models/secret.py at 0x7f0012ab"

    def fail(_: str) -> str:
        raise RuntimeError(text)

    service.engine.write = fail
    try:
        reply = await service.ask(path, "key-a", json=body_of(path, CANARY, stream=stream))
    finally:
        service.engine.write = lambda _: ""
    assert reply.status_code == (200 if stream else 500)
    assert "error" in reply.text or (stream and path == "/v1/responses")  # there vLLM cuts the stream off
    for secret in ("CANARY", "83 61", "/srv", "0x7f", "Traceback"):
        assert secret not in reply.text, reply.text
    if reply.status_code == 500:
        assert reply.json()["error"]["message"].endswith(f"under request id {reply.headers['x-request-id']}")
        assert f"request {reply.headers['x-request-id']} failed" in log.getvalue() or "RuntimeError" in log.getvalue()
    assert "key-a" not in log.getvalue()


def _check(service: Service, log: io.StringIO) -> None:
    written = log.getvalue() + service.metrics()
    for secret in ("CANARY", "83 61", "key-a"):
        assert secret not in written, written[max(0, written.index(secret) - 300) :][:600]

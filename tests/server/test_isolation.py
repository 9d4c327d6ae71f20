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
from tests.error_shapes import error_of
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
    service.engine.calls.clear()
    service.engine.jitter_seconds = 0.01

    def answer(prompt: str) -> str:
        number = prompt.split("#", 1)[1][:7]
        return f"<think>it is {number}</think><answer>{number}</answer>"

    service.engine.script = answer
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
    service.engine.script = lambda _: "<think>3+4=7</think><answer>7</answer>"
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
    pair = {"question": "3 + 4", "think": "3+4=7" * 5, "answer": "7"}
    first, second = [await service.ask("/v1/rtap/score", "key-poor", json=pair) for _ in range(2)]
    assert (first.status_code, second.status_code) == (200, 429)
    assert abs(int(second.headers["retry-after"]) - (first.json()["confidence_tokens"] - 20) * 3) <= 1
    service.forget_spending()


async def test_stored_responses_are_refused_with_keys(tmp_path, monkeypatch):
    """vLLM's store has no owners: any key could read every response."""
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(ConfigError, match="lets every API key read every stored response"):
        await asyncio.to_thread(make_service, tmp_path / "keys.toml", Settings())


async def test_without_keys_responses_may_be_stored_and_requests_aborted_by_id(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    service = await asyncio.to_thread(make_service, None, Settings())
    service.engine.script = lambda _: CYCLE
    made = (await service.ask(PATHS[2], json=body_of(PATHS[2], "3 + 4", store=True))).json()
    assert (await service.ask(f"/v1/responses/{made['id']}", method="GET")).json()["id"] == made["id"]
    assert (await service.ask("/inference/v1/abort_requests", json={"request_ids": ["a"]})).status_code == 200
    assert set(service.engine.salts) == {None}


@pytest.mark.parametrize("stream", [False, True])
async def test_two_requests_with_one_request_id_do_not_end_each_other(service, stream):
    """vLLM aborts every request under an id, so the client's id must not become part of an engine id."""
    engine = service.engine
    engine.calls.clear()
    engine.aborted.clear()
    engine.script, engine.size, engine.token_seconds = (lambda _: CYCLE), 1, 0.02
    hurried = {"policy": "single", "deadline_seconds": 0.05}

    async def ask(key: str, rtap: dict) -> httpx.Response:
        body = body_of(PATHS[0], "3 + 4", rtap=rtap, stream=stream)
        return await service.ask(PATHS[0], key, json=body, headers={"x-request-id": "same"})

    try:
        replies = await asyncio.gather(
            ask("key-a", {"policy": "single"}), ask("key-a", hurried), ask("key-b", {"policy": "single"})
        )
    finally:
        engine.size, engine.token_seconds = None, 0.0
    assert [reply.headers["x-request-id"] for reply in replies] == ["same"] * 3
    shown = [
        [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        if stream else [reply.json()] for reply in replies
    ]  # fmt: skip
    assert len({chunks[0]["id"] for chunks in shown}) == 3
    assert [chunks[-1]["rtap"]["stop_reason"] for chunks in shown] == ["max_cycles", "deadline", "max_cycles"]
    messages = [[c["delta" if stream else "message"] for part in chunks for c in part["choices"]] for chunks in shown]
    assert ["".join(m.get("content") or "" for m in parts) for parts in messages] == ["7", "", "7"]
    ids = [call.request_id for call in engine.calls]
    assert len(set(ids)) == len(ids) == 3
    assert len(engine.aborted) == 1
    assert not [name for name in ids if "same" in name]


@pytest.mark.parametrize("path", ["/abort_requests", "/inference/v1/abort_requests"])
async def test_one_key_cannot_stop_anothers_request(service, path):
    refused = await service.ask(path, "key-b", json={"request_ids": ["chatcmpl-of-key-a"]})
    assert refused.status_code == 400
    assert "close the connection" in refused.json()["error"]["message"]


async def test_a_key_is_in_no_error_log_or_metric(service, log):
    service.forget_spending()
    refused = await service.ask(PATHS[0], "sk-wrong", json=body_of(PATHS[0], "3 + 4"))
    poor = [await service.ask(PATHS[0], "key-poor", json=body_of(PATHS[0], "3 + 4", max_tokens=20)) for _ in range(2)]
    service.forget_spending()
    assert [reply.status_code for reply in (refused, *poor)] == [401, 200, 429]
    for key in ("sk-wrong", "key-poor"):
        assert key not in refused.text + poor[1].text + log.getvalue() + service.metrics()


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


@pytest.fixture
def log(service):
    """Log lines of all loggers at INFO, the default level."""
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
    service.engine.script = lambda _: f"<think>{CANARY}</think><answer>{CANARY}</answer>"
    reply = await service.ask(f"{path}?key=key-a&said=CANARY", "key-a", json=body)
    assert reply.status_code == 200, reply.text
    _check(service, log)


@pytest.mark.parametrize(("path", "body"), BAD, ids=[f"{path} {number}" for number, (path, _) in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_a_4xx_in_openais_shape(service, log, path, body, stream):
    whole = body_of(path, CANARY, stream=stream) | body if path in PATHS else body
    reply = await service.ask(path, "key-a", json=whole)
    assert reply.status_code in (400, 404), reply.text
    assert error_of(path, reply.json())
    assert "key-a" not in reply.text + log.getvalue() + service.metrics()
    assert "CANARY" not in service.metrics()


@pytest.mark.parametrize("path", [*PATHS, "/inference/v1/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_of_the_engine_shows_nothing_but_the_request_id(service, log, path, stream):
    def crash(_: str) -> str:
        raise RuntimeError(f"{CANARY} in /srv/models/secret.py at 0x7f0012ab")

    service.engine.script = crash
    body = body_of(path, CANARY) if path in PATHS else {"model": "rtap", "token_ids": [5], "sampling_params": {}}
    try:
        reply = await service.ask(path, "key-a", json=body | {"stream": stream}, headers={"x-request-id": "id-7"})
    finally:
        service.engine.script = lambda _: ""
    assert (reply.status_code, reply.headers["x-request-id"]) == (200 if stream else 500, "id-7")
    for secret in ("CANARY", "83 61", "/srv", "0x7f", "Traceback", "RuntimeError"):
        assert secret not in reply.text, reply.text
    if not (stream and path == "/v1/responses"):  # there vLLM cuts the stream off
        text = next(line[6:] for line in reply.text.splitlines() if '"error":' in line) if stream else reply.text
        error = error_of(path, json.loads(text))
        assert error["message"].startswith("the server failed on this request")
        assert error["message"].endswith("under request id id-7")
    written = log.getvalue()
    assert written.count("ERROR rtap.errors request id-7 failed") == 1
    cause = written.split("request id-7 failed")[1]
    assert "Traceback" in cause
    assert "in crash" in cause
    assert f"RuntimeError: {CANARY}" in cause
    assert "key-a" not in written + service.metrics()
    assert "CANARY" not in service.metrics()


def _check(service: Service, log: io.StringIO) -> None:
    written = log.getvalue() + service.metrics()
    for secret in ("CANARY", "83 61", "key-a"):
        assert secret not in written, written[max(0, written.index(secret) - 300) :][:600]

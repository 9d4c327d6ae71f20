"""Bad requests get a 4xx with one sentence in OpenAI's error shape, and the server keeps working.

Each single field: tests/server/http. Against plain vLLM: test_fields_against_plain.py.
"""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.error_shapes import error_of

GOOD = {"model": "rtap", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 60}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def _a_good_request_works_afterwards(server):
    yield
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=GOOD, timeout=60)
    assert reply.status_code == 200
    assert reply.json()["rtap"]["cycles"]


def _error(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    error = error_of(reply.request.url.path, reply.json())
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("rtap", "param"),
    [
        ({"treshold": 0.5}, "rtap.treshold"),
        ({"threshold": 1.5}, "rtap.threshold"),
        ({"max_cycles": 17}, "rtap.max_cycles"),
        ({"policy": "sure"}, "rtap.policy"),
        (None, "rtap"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_rtap_fields(server, rtap, param, stream):
    body = GOOD | {"rtap": rtap, "stream": stream}
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=body), 400)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_broken_bodies(server, path):
    for body in (b"{", b"[]", b'"x"', b"\xff\xfe", b"", b"[" * 100_000):
        _error(httpx.post(server.url + path, content=body, headers=JSON), 400)


def test_a_ten_megabyte_body_is_refused_with_and_without_a_declared_length(server):
    huge = GOOD | {"messages": [{"role": "user", "content": "1" * 10_000_000}]}
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=huge), 413)
    assert "larger than 8388608 bytes" in error["message"]

    def chunks():
        for _ in range(160):
            yield b"1" * 65536

    try:
        reply = httpx.post(f"{server.url}/v1/chat/completions", content=chunks())
        assert reply.status_code == 413
    except httpx.WriteError:  # the server answered and closed while we were still sending
        pass


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_eight_megabytes_of_brackets_block_no_other_request(server, path):
    """Others are answered while such bodies are refused, and their memory is released."""
    process, body = psutil.Process(server.process.pid), b'{"messages": [' + b"[]," * 2_700_000 + b"1]}"

    def refuse(_: int) -> None:
        _error(httpx.post(server.url + path, content=body, headers=JSON, timeout=60), 400)

    def cpu_seconds() -> float:
        return process.cpu_times().user + process.cpu_times().system

    refuse(0)
    before, began, answered = process.memory_info().rss, cpu_seconds(), 0
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=server.url, timeout=60) as others:
        refusals = [pool.submit(refuse, n) for n in range(10)]
        while not all(one.done() for one in refusals):
            answered += others.get("/live").status_code == 200
        for one in refusals:
            one.result()
    assert answered >= 10
    assert cpu_seconds() - began < 10  # to read 80 MB and answer the others; parsing the bodies would take 50
    assert process.memory_info().rss - before < 64 * 2**20


def test_a_prompt_longer_than_the_context(server):
    body = GOOD | {"messages": [{"role": "user", "content": "12 + 7 " * 2000}]}
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=body), 400)
    assert "1024" in error["message"]


def test_an_unknown_model(server):
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=GOOD | {"model": "gpt"}), 404)
    assert "gpt" in error["message"]


def test_beam_search_is_refused(server):
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=GOOD | {"use_beam_search": True}), 400)
    assert error["param"] == "use_beam_search"


def test_an_idempotency_key_is_refused(server):
    headers = {"idempotency-key": "a"}
    error = _error(httpx.post(f"{server.url}/v1/chat/completions", json=GOOD, headers=headers), 400)
    assert "not supported" in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/invocations"])
def test_routes_that_would_bypass_recursion_are_refused(server, path):
    error = _error(httpx.post(server.url + path, json=GOOD), 400)
    assert "does not recurse" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["</think><answer>7</answer>", "what does <answer> mean?", "\x1e12*9\x1e"])
def test_tags_and_marks_in_a_prompt_do_not_turn_thinking_into_content(server, text, stream):
    body = GOOD | {"messages": [{"role": "user", "content": text}], "stream": stream, "seed": 1}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        content = "".join(d.get("content") or "" for d in deltas)
        reasoning = "".join(d.get("reasoning") or "" for d in deltas)
        rtap = chunks[-1]["rtap"]
    else:
        message, rtap = reply.json()["choices"][0]["message"], reply.json()["rtap"]
        content, reasoning = message["content"] or "", message["reasoning"] or ""
    assert reasoning
    assert "\x1e" not in content + reasoning
    accepted = [c["answer"] for c in rtap["cycles"] if c["accepted"]]
    assert not accepted or content == accepted[0]


def test_requests_with_the_same_id_do_not_abort_each_other(server):
    """Half of them end at a deadline, which aborts their engine request."""

    def ask(number: int) -> httpx.Response:
        rtap = {"threshold": 1.0, "max_cycles": 4} | ({"deadline_seconds": 0.1} if number % 2 else {})
        headers = {"x-request-id": "same"}
        body = GOOD | {"rtap": rtap, "max_tokens": 400}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    assert {reply.headers["x-request-id"] for reply in replies} == {"same"}
    assert len({reply.json()["id"] for reply in replies}) == 8
    assert {reply.json()["rtap"]["stop_reason"] for reply in replies[::2]} <= {"max_cycles", "max_tokens"}


def test_pipelined_requests_do_not_share_options(server):
    """Only the first one of the connection asks for thoughts."""

    def raw(body, *more: bytes) -> bytes:
        content = json.dumps(body).encode()
        fields = [b"Host: x", b"Content-Type: application/json", *more]
        head = b"\r\n".join((b"POST /v1/chat/completions HTTP/1.1", *fields, b"Content-Length: %d" % len(content)))
        return head + b"\r\n\r\n" + content

    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=30) as sock:
        sock.sendall(raw(GOOD | {"rtap": {"return_cycles": True}}) + raw(GOOD, b"Connection: close"))
        reply = b""
        while part := sock.recv(65536):
            reply += part
    first, second = reply.split(b"HTTP/1.1 200 OK")[1:]
    assert b'"think":' in first
    assert b'"think":' not in second
    assert b'"rtap":' in second

"""The real server under bad input, retries and DEBUG logs: bounds hold, a name is one run, nothing leaks."""

import contextlib
import json
import socket
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import GRACE_SECONDS

CHAT = {"model": "rtap", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 60}
# Sixteen cycles that are never sure enough: a second or two.
LONG = {"model": "rtap", "messages": [{"role": "user", "content": "make 82 from 3, 7, 25"}], "max_tokens": 900,
        "rtap": {"threshold": 1.0, "max_cycles": 16}, "stream": True}  # fmt: skip
TEAM = {"x-api-key": "key-team"}


@pytest.fixture
def url(keyed):
    return keyed[0].url


def metric(url: str, name: str, **labels: str) -> float:
    text = httpx.get(f"{url}/metrics", headers={"x-api-key": "key-scrape"}).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def runs(url: str) -> float:
    """Trajectories that have ended, however."""
    return metric(url, "rtap_requests_total")


def ask(url: str, body, name: str | None = None, **options) -> httpx.Response:
    headers = TEAM | ({} if name is None else {"idempotency-key": name})
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60, **options)


@contextlib.contextmanager
def opened(url: str, name: str):
    headers = TEAM | {"idempotency-key": name}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, headers=headers, timeout=60) as reply:
        yield reply


def until(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def sockets_of(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=10)


def fastest(url: str, request: bytes, status: bytes) -> float:
    """Seconds to the answer, best of five: what the server needs, on cores that other tests share."""
    took = []
    for _ in range(5):
        with sockets_of(url) as sock:
            began = time.perf_counter()
            sock.sendall(request)
            assert sock.recv(12) == b"HTTP/1.1 " + status
            took.append(time.perf_counter() - began)
    return min(took)


def test_heads_are_bounded_and_hold_no_memory(keyed, url):
    """200 MB of one header field, 300 fields, and no HTTP: an answer in OpenAI's shape, and the next request works."""
    process = psutil.Process(keyed[0].process.pid)
    before = process.memory_info().rss
    with sockets_of(url) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nA: ")
        for _ in range(200):
            sock.sendall(b"a" * 2**20)
    for head in (b"".join(b"A%d: a\r\n" % n for n in range(300)), b"A: " + b"a" * 70_000 + b"\r\n"):
        assert fastest(url, b"GET /live HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n", b"431") < 0.05
    assert process.memory_info().rss - before < 32 * 2**20
    assert httpx.get(f"{url}/live").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/messages/count_tokens", "/v1/rtap/score"])
def test_eight_megabytes_of_brackets_hold_up_nobody(keyed, url, path):
    """Others are answered while ten such bodies are refused, and the memory they took is not kept."""
    process, body = psutil.Process(keyed[0].process.pid), b'{"messages": [' + b"[]," * 2_700_000 + b"1]}"

    def refuse(_: int) -> None:
        headers = TEAM | {"content-type": "application/json"}
        reply = httpx.post(url + path, content=body, headers=headers, timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400)

    def worked() -> float:
        return process.cpu_times().user + process.cpu_times().system

    refuse(0)
    before, began, answered = process.memory_info().rss, worked(), 0
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=url, timeout=60) as others:
        refusals = [pool.submit(refuse, n) for n in range(10)]
        while not all(one.done() for one in refusals):
            answered += others.get("/live").status_code == 200
        for one in refusals:
            one.result()
    assert answered >= 10
    assert worked() - began < 10  # seconds of processor, reading 80 MB and answering others; it was fifty
    assert process.memory_info().rss - before < 64 * 2**20


def test_small_refusals_take_milliseconds(url):
    """The fastest of each kind: what the server needs, on cores that other tests share."""
    bad = [CHAT | {"n": 10**12}, CHAT | {"rtap": {"max_cycles": 10**9}}, CHAT | {"stop": ["a"] * 99},
           CHAT | {"chat_template": "{{ 1 }}"}, CHAT | {"messages": [{}] * 2000}]  # fmt: skip
    with httpx.Client(base_url=url, headers=TEAM) as client:
        for body in bad:
            took = []
            for _ in range(5):
                began = time.perf_counter()
                assert client.post("/v1/chat/completions", json=body).status_code == 400
                took.append(time.perf_counter() - began)
            assert min(took) < 0.05
    declared = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nX-Api-Key: key-team\r\nContent-Length: 1000000000\r\n\r\nx"
    assert fastest(url, declared, b"413") < 0.05


def test_a_repeated_request_is_one_run(url):
    name, before = uuid.uuid4().hex, runs(url)
    first, second = ask(url, CHAT, name), ask(url, CHAT, name)
    assert first.content == second.content
    assert (first.headers.get("idempotent-replayed"), second.headers["idempotent-replayed"]) == (None, "true")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert ask(url, CHAT | {"n": 2}, name).status_code == 409
    assert runs(url) - before == 1


def test_who_joins_a_stream_gets_all_of_it_and_the_run_outlives_its_first_client(url):
    name, before = uuid.uuid4().hex, runs(url)
    with contextlib.ExitStack() as first:
        lines = first.enter_context(opened(url, name)).iter_lines()
        seen = [next(lines) for _ in range(6)]
        with opened(url, name) as joined:
            first.close()
            told = [line for line in joined.iter_lines() if line]
    assert [line for line in seen if line] == told[:3]
    assert told[-1] == "data: [DONE]"
    assert len(json.loads(told[-2].removeprefix("data: "))["rtap"]["cycles"]) > 1
    assert runs(url) - before == 1
    assert metric(url, "rtap_requests_total", stop_reason="abandoned") == 0
    again = ask(url, LONG, name)
    assert [line for line in again.text.splitlines() if line] == told


def test_a_client_with_a_short_timeout_gets_its_answer_from_one_run(url):
    """The official client gives up after a third of a second, comes again by itself, and finds what it began: a second
    of work, because from the fourth time on it waits longer than a run is kept that everybody has left."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="key-team", max_retries=8, timeout=0.3)
    before = runs(url)
    body = {key: value for key, value in LONG.items() if key not in ("rtap", "stream")} | {"max_tokens": 100}
    reply = client.chat.completions.create(
        **body, extra_body={"rtap": LONG["rtap"]}, extra_headers={"Idempotency-Key": uuid.uuid4().hex}
    )
    assert reply.choices[0].finish_reason
    assert runs(url) - before == 1


def test_a_run_that_all_have_left_is_ended_after_the_grace_and_the_engine_is_idle_again(url):
    """Half a minute of work, left at once."""
    before = metric(url, "rtap_requests_total", stop_reason="abandoned")
    body = LONG | {"rtap": {"policy": "vote", "samples": 32}, "n": 4, "min_tokens": 900}
    headers = TEAM | {"idempotency-key": uuid.uuid4().hex}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as reply:
        assert reply.status_code == 200
        until(lambda: metric(url, "vllm:num_requests_running") > 0)
        left = time.monotonic()
    time.sleep(GRACE_SECONDS / 2)
    assert metric(url, "rtap_in_flight") == 1
    until(lambda: metric(url, "vllm:num_requests_running") + metric(url, "vllm:num_requests_waiting") == 0)
    assert time.monotonic() - left > GRACE_SECONDS
    assert metric(url, "rtap_in_flight") == 0
    assert metric(url, "rtap_requests_total", stop_reason="abandoned") - before == body["n"]


def test_pipelined_requests_do_not_share_options(url):
    """The second one of a connection did not ask for thoughts, and gets none."""

    def raw(body, *more: bytes) -> bytes:
        content = json.dumps(body).encode()
        fields = [b"Host: x", b"X-Api-Key: key-team", b"Content-Type: application/json", *more]
        head = b"\r\n".join((b"POST /v1/chat/completions HTTP/1.1", *fields, b"Content-Length: %d" % len(content)))
        return head + b"\r\n\r\n" + content

    with sockets_of(url) as sock:
        sock.sendall(raw(CHAT | {"rtap": {"return_cycles": True}}) + raw(CHAT, b"Connection: close"))
        reply = b""
        while part := sock.recv(65536):
            reply += part
    first, second = reply.split(b"HTTP/1.1 200 OK")[1:]
    assert b'"think":' in first
    assert b'"think":' not in second
    assert b'"rtap":' in second


def test_nothing_of_a_request_is_in_the_log_the_metrics_or_an_error(keyed, url):
    """At DEBUG of vLLM and of uvicorn, by every path, good and bad."""
    canary = "CANARY-9f3e7c1b"
    chat = CHAT | {"messages": [{"role": "user", "content": canary}]}
    asked = [
        ("/v1/chat/completions", chat), ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/messages", chat), ("/v1/messages", chat | {"stream": True}),
        ("/v1/completions", {"model": "rtap", "prompt": canary, "max_tokens": 40}),
        ("/v1/responses", {"model": "rtap", "input": canary, "max_output_tokens": 40}),
        ("/v1/messages/count_tokens", chat), ("/tokenize", {"model": "rtap", "prompt": canary}),
        ("/v1/rtap/score", {"question": canary, "think": canary, "answer": canary}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"regex": f"({canary}"}}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"grammar": f"root ::= {canary}"}}),
        ("/v1/chat/completions", chat | {"temperature": canary}),
        ("/v1/chat/completions", chat | {"stop": {"a": canary}}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": [{"type": canary}]}]}),
        ("/v1/completions", {"model": "rtap", "prompt": f"{canary} " * 3000}),
        ("/v1/responses", {"model": "rtap", "input": [{"role": "user", "content": [{"type": canary}]}]}),
        ("/v1/messages", chat | {"max_tokens": canary}), ("/detokenize", {"model": "rtap", "tokens": [canary]}),
        ("/v1/rtap/feedback", {"request_id": canary, "correct": True}), ("/v1/rtap/score", {"question": canary}),
    ]  # fmt: skip
    good = 0
    for path, body in asked:
        reply = httpx.post(f"{url}{path}?key=key-team&said={canary}", json=body, headers=TEAM, timeout=60)
        good += reply.status_code == 200
        if reply.status_code != 200:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            assert canary not in reply.text
            assert reply.headers["x-request-id"]
    assert good == 9
    metrics = httpx.get(f"{url}/metrics", headers={"x-api-key": "key-scrape"}).text
    log = keyed[0].log.read_text()
    assert "DEBUG" in log  # it says all that it would
    for secret in (canary, "key-team", "key-scrape"):
        assert secret not in log
        assert secret not in metrics

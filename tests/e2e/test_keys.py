"""API keys, over raw sockets too: no Host header and no path bypasses them, limits hold, a new file is read at once."""

import json
import socket
import time

import httpx
import openai
import pytest

from tests.e2e.conftest import KEYS, Running

CHAT = {"model": "rtap", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 60}


def _raw(server: Running, *lines: str | bytes) -> tuple[int, bytes]:
    """(status, whole reply) of one request, sent byte for byte."""
    head = b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in (*lines, "Connection: close"))
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10) as sock:
        sock.sendall(head + b"\r\n\r\n")
        reply = b""
        while part := sock.recv(65536):
            reply += part
    return int(reply.split(b" ", 2)[1]), reply


@pytest.mark.parametrize("host", ["x", "x/live?", "x/live#", "/live", "x/ready?a=", "127.0.0.1/live?"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
def test_no_host_header_bypasses_keys(operated, host, method):
    for path in ("/v1/models", "/health", "/version", "/metrics", "/openapi.json"):
        status, reply = _raw(operated, f"{method} {path} HTTP/1.1", f"Host: {host}", "Content-Length: 0")
        assert status in (400, 401), (path, reply)
        assert b"vllm" not in reply


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models/", "//v1/models", "/live/", "//live", "/live/../v1/models", "/live/%2e%2e/v1/models",
        "/%6cive/../v1/models", "/live;/v1/models", "/live%2f", "/v1/models?/live", "/v1/models#/live", "*",
        "http://x/v1/models", "http://x/live/../v1/models", "/LIVE", "/live%00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_no_spelling_of_a_path_bypasses_keys(operated, target, method):
    status, reply = _raw(operated, f"{method} {target} HTTP/1.1", "Host: x")
    assert status in (400, 401), reply


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer \xff\xfe\xc3\x28",
        "Authorization: Bearer " + "k" * 60_000,
        "X-Api-Key: " + "k" * 60_000,
        b"X-Api-Key: \xe9",
        "Authorization: Bearer",
        "Authorization:",
        "Authorization: Bearer key-team,key-limited",
        "Authorization: Basic a2V5LXRlYW0=",
        "X-Api-Key: key-scrape",
    ],
    ids=range(9),
)
def test_strange_headers_are_refused_and_kill_nothing(operated, header):
    status, reply = _raw(operated, "GET /v1/models HTTP/1.1", "Host: x", header)
    assert status in (400, 401, 431), reply
    assert _raw(operated, "GET /v1/models HTTP/1.1", "Host: x", "X-Api-Key: key-team")[0] == 200


def test_probes_are_open_and_metrics_have_their_own_key(operated):
    url = operated.url
    assert httpx.get(f"{url}/live").status_code == httpx.get(f"{url}/ready").status_code == 200
    asked = {key: httpx.get(f"{url}/metrics", headers={"x-api-key": key}) for key in ("key-team", "key-scrape")}
    assert asked["key-team"].status_code == 401
    assert 'rtap_rejected_total{reason="unauthorized"}' in asked["key-scrape"].text


def test_the_official_client_raises_its_own_errors(operated):
    wrong = openai.OpenAI(base_url=f"{operated.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(**CHAT)
    limited = openai.OpenAI(base_url=f"{operated.url}/v1", api_key="key-limited", max_retries=0)
    for _ in range(2):
        assert limited.chat.completions.create(**CHAT).choices
    with pytest.raises(openai.RateLimitError) as refused:
        limited.chat.completions.create(**CHAT)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.type == "rate_limit_error"


def test_keys_do_not_share_the_prefix_cache(operated):
    """The second request of a key finds its prompt in the cache; the first one of another key does not."""
    body = CHAT | {"messages": [{"role": "user", "content": "make 82 from 3, 7, 25 " * 12}], "rtap": {"max_cycles": 1}}

    def cached(key: str) -> int:
        reply = httpx.post(f"{operated.url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=60)
        return reply.json()["rtap"]["cycles"][0]["cached_tokens"]

    file = operated.log.parent / "keys.toml"
    file.write_text(KEYS + '[[keys]]\nname = "other"\nkey = "key-other"\n')
    time.sleep(1.1)
    assert [cached(key) > 0 for key in ("key-team", "key-team", "key-other", "key-other")] == [False, True, False, True]
    file.write_text(KEYS)
    time.sleep(1.1)
    reply = httpx.get(f"{operated.url}/v1/models", headers={"x-api-key": "key-other"})
    assert reply.status_code == 401
    assert "key-other" not in operated.log.read_text()
    assert json.loads(reply.text)["error"]["code"] == "invalid_api_key"

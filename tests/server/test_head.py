"""Heads of requests over raw sockets: what is too long or too much gets 431 at once, and no memory."""

import json
import os
import socket
import time

import psutil
import pytest

from tests.server.live import LIMITS, connect, exchange, rest_of, serving

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def application(scope, receive, send):
    """Answers with the length of the body it has read."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size})


@pytest.fixture(scope="module")
def port():
    with serving(application) as number:
        yield number


def error_of(reply: bytes) -> tuple[int, dict]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"x-request-id: made-here" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.mark.parametrize(
    "parts",
    [
        [GET + b"A: " + b"a" * 9000 + b"\r\n\r\n"],
        [GET + b"A: " + b"a" * 9000],  # it never ends
        [GET + b"a" * 9000],
        [b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /" + b"a" * 9000],
        [GET, *[b"A%d: " % n + b"a" * 500 + b"\r\n" for n in range(20)]],
    ],
    ids=["field", "open field", "name", "target", "open target", "fields"],
)
def test_a_long_head_is_refused(port, parts):
    began = time.perf_counter()
    reply = exchange(port, *parts)
    status, error = error_of(reply)
    assert (status, error["type"]) == (431, "invalid_request_error")
    assert "longer than 8192 bytes" in error["message"]
    assert time.perf_counter() - began < 1.5


def test_many_fields_are_refused_and_as_many_as_allowed_are_not(port):
    fields = [b"A%d: a\r\n" % n for n in range(LIMITS.max_fields)]
    status, error = error_of(exchange(port, GET, *fields, b"\r\n"))
    assert status == 431
    assert "more than 32 header fields" in error["message"]
    assert exchange(port, GET, *fields[:-2], b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_head_in_small_pieces_and_a_long_body_are_fine(port):
    head = (
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nA: " + b"a" * 8000 + b"\r\nContent-Length: 1000000\r\n\r\n"
    )
    reply = exchange(port, *[head[n : n + 7] for n in range(0, len(head), 7)], b"b" * 1_000_000)
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"\r\n1000000\r\n" in reply


def test_each_request_of_a_connection_has_the_limits_of_its_own(port):
    one = GET + b"A: " + b"a" * 5000 + b"\r\n\r\n"
    assert exchange(port, one, one, GET + b"Connection: close\r\n\r\n").count(b"HTTP/1.1 200") == 3


def test_a_long_chunk_extension_ends_the_connection(port):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;"
    assert exchange(port, head, *[b"a" * 2**16] * 64) == b""  # the application may have begun an answer


def test_long_trailers_of_a_chunked_body_end_the_connection(port):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nb\r\n0\r\n"
    assert b"HTTP/1.1 200" not in exchange(
        port, head, *[b"A%d: " % n + b"a" * 900 + b"\r\n" for n in range(20)], b"\r\n"
    )


@pytest.mark.parametrize(
    "said", [b"\x16\x03\x01 TLS", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\nA b\r\n\r\n", b"]\r\n\r\n"]
)
def test_what_is_no_http_is_told_so_in_the_same_shape(port, said):
    status, error = error_of(exchange(port, said))
    assert (status, error["message"]) == (400, "this is not a valid HTTP/1.1 request")


def test_a_refusal_is_quick_and_a_gigabyte_of_header_takes_no_memory(port):
    """One client sends header bytes as fast as it can, for as long as it is let."""
    process = psutil.Process(os.getpid())
    before, began, sent = process.memory_info().rss, time.perf_counter(), 0
    with connect(port) as sock:
        sock.sendall(GET + b"A: ")
        first = None
        try:
            while sent < 2**30:
                sent += sock.send(b"a" * 2**20)
                if first is None and sock.recv(12, socket.MSG_DONTWAIT | socket.MSG_PEEK):
                    first = time.perf_counter() - began
        except BlockingIOError:
            first = _wait_for_reply(sock, began)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert first is not None
        assert first < 0.5
    assert process.memory_info().rss - before < 32 * 2**20


def _wait_for_reply(sock: socket.socket, began: float) -> float:
    assert sock.recv(12) == b"HTTP/1.1 431"
    return time.perf_counter() - began


def test_a_refusal_takes_milliseconds(port):
    took = []
    for _ in range(20):
        with connect(port) as sock:
            began = time.perf_counter()
            sock.sendall(GET + b"A: " + b"a" * 9000 + b"\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 431"
            took.append(time.perf_counter() - began)
    assert min(took) < 0.05  # the fastest: others may be busy on the same cores


def test_the_server_goes_on_after_all_that(port):
    with connect(port) as sock:
        sock.sendall(GET + b"Connection: close\r\n\r\n")
        assert rest_of(sock).startswith(b"HTTP/1.1 200")

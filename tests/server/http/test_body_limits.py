"""What is refused before it is decoded, how fast, and in how much memory."""

import asyncio
import json
import os
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from rtap_core.errors import InvalidRequest
from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.engine.server_state import Drain
from rtap_server.http.admission import Admission, Demand
from rtap_server.http.body_limits import MAX_CONTAINERS, MAX_STRINGS, BodyLimitsMiddleware, BodyMemory, parse_json
from rtap_server.http.field_limits import FieldLimits
from rtap_server.http.request_id import RequestIdMiddleware
from rtap_server.http.route_kinds import RECURSIVE_PATHS
from rtap_server.telemetry.metrics import Metrics
from tests.costs import async_cpu_seconds
from tests.server.live import connect, exchange, rest_of, serving

MIB = 2**20
LARGE = {
    "brackets": b"[" * 8 * MIB,
    "braces": b'{"a":' * (8 * MIB // 5),
    "empty lists": b'{"a":[' + b"[]," * (8 * MIB // 3 - 9) + b"1]}",
    "closing": b"]" * 8 * MIB,
    "quotes": b'"' * 8 * MIB,
    "small texts": b'{"a":[' + b'"a",' * (2 * MIB - 9) + b"1]}",
    "keys": b"{" + b",".join(b'"%d":1' % n for n in range(700_000)) + b"}",
    "escapes": b'{"a":"' + b'{\\"' * (8 * MIB // 3 - 9) + b'"}',
    "open text": b'{"a":"' + b"[{" * (4 * MIB - 9),
    "numbers": b'{"prompt":[' + b"1," * (4 * MIB - 9) + b"1]}",
}


AUDIO = "/v1/audio/transcriptions"
POSTS = [*RECURSIVE_PATHS, "/tokenize", "/v1/rtap/score", AUDIO, "/v1/responses/{response_id}/cancel"]


class Taken:
    """The application inside BodyLimitsMiddleware; it keeps the bodies. ``ask`` returns a status and an error."""

    def __init__(self, limit: int = 8 * MIB, *, timeout_seconds: float = 30.0, memory: int = 64 * MIB) -> None:
        self.bodies = []
        self.types = []
        limits, metrics = FieldLimits(16, 1024, 1000, allows_templates=False), Metrics(CollectorRegistry())
        self.admission = Admission(1)
        self.drain = Drain()
        self.memory = BodyMemory(memory)
        self.app = BodyLimitsMiddleware(
            self, routes=[Route(path, print, methods=["POST"]) for path in POSTS], max_body_bytes=limit,
            body_timeout_seconds=timeout_seconds, memory=self.memory, field_limits=limits, admission=self.admission,
            drain=self.drain, metrics=metrics,
        )  # fmt: skip

    async def __call__(self, scope, receive, send) -> None:
        state = current_request()
        self.bodies.append((state.body, state.fields, (await receive())["body"]))
        self.types.append([value for name, value in scope["headers"] if name == b"content-type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, body: bytes, path="/tokenize", pieces: int = 65536, *, method="POST", **headers: str):
        parts = [body[n : n + pieces] for n in range(0, len(body), pieces)] or [b""]
        waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
        waiting += [{"type": "http.request", "body": parts[-1], "more_body": False}]
        sent = []

        async def receive():
            return waiting.pop(0)

        async def send(message):
            sent.append(message)

        begin_request(RequestState())
        fields = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": fields}
        await self.app(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"]).get("error")


@pytest.mark.parametrize("name", list(LARGE))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_eight_megabytes_of_anything_are_refused_before_they_hold_up_others(name, path):
    taken = Taken()
    status, error = await taken.ask(LARGE[name], path, pieces=8 * MIB)
    seconds = await async_cpu_seconds(lambda: taken.ask(LARGE[name], path, pieces=8 * MIB))
    assert seconds < 0.3  # some tens of milliseconds on an idle core
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert taken.bodies == []


async def test_refusals_leave_no_memory_behind():
    taken, process = Taken(), psutil.Process(os.getpid())
    for name in LARGE:
        await taken.ask(LARGE[name])
    before = process.memory_info().rss
    for _ in range(3):
        for name in LARGE:
            await taken.ask(LARGE[name])
        await taken.ask(b"1" * (9 * MIB))
    assert process.memory_info().rss - before < 64 * MIB


@pytest.mark.parametrize("declared", [True, False])
async def test_a_refusal_of_a_small_body_or_of_a_declared_size_takes_milliseconds(declared):
    taken, took = Taken(limit=2000), []
    for _ in range(20):
        began = time.thread_time()
        headers = {"content_length": str(10**12)} if declared else {}
        status, _ = await taken.ask(b"[" * (9 if declared else 3000), pieces=1000, **headers)
        took.append(time.thread_time() - began)
        assert status == 413
    assert sorted(took)[10] < 0.05


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": 1}', 200),
        (b'{"n": 17}', 400),
        (b"", 200),
        (b'{"prompt": "' + b"a" * 16_001 + b'"}', 400),
        (b'{"image_url": {"url": "data:' + b"a" * 64_001 + b'"}}', 200),
    ],
)
async def test_every_json_body_is_looked_at(body, status):
    assert (await Taken().ask(body))[0] == status


TYPES = [
    "", "application/json", "Application/JSON ; charset=utf-8", "application/json;charset=utf-16", "text/plain",
    "text/json", "application/vnd.api+json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/json, multipart/form-data", ";application/json", "application/octet-stream",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/rtap/score", AUDIO])
@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("body", [b'{"a": 1}', b'{"n": 17}', b"--x\r\n[[[["])
async def test_a_route_reads_what_was_checked_or_nothing(path, content_type, body):
    """Whatever the headers: a JSON route gets a checked JSON object called JSON, or the request is refused."""
    taken = Taken()
    status, error = await taken.ask(body, path, **({"content_type": content_type} if content_type else {}))
    is_json = content_type.partition(";")[0].strip().lower() in ("", "application/json") and content_type[:1] != ";"
    if path == AUDIO:
        assert status == (200 if content_type.startswith("multipart") else 400)
    elif not is_json:
        assert (status, error["param"]) == (400, "Content-Type")
        assert path in error["message"]
        assert "application/json" in error["message"]
    else:
        assert status == (200 if body == b'{"a": 1}' else 400)
    if status == 200 and path != AUDIO:
        assert (taken.bodies[0][1], taken.types) == ({"a": 1}, [[b"application/json"]])
    assert (status == 200) == bool(taken.bodies)


async def test_without_a_type_a_web_page_is_refused_because_its_browser_has_not_asked():
    taken = Taken()
    status, error = await taken.ask(b"{}", origin="http://elsewhere")
    assert (status, error["param"]) == (400, "Content-Type")
    assert (await taken.ask(b"{}", origin="http://elsewhere", content_type="application/json"))[0] == 200


@pytest.mark.parametrize(("encoding", "status"), [("identity", 200), ("gzip", 400), ("br", 400), ("", 400)])
async def test_a_compressed_body_is_refused(encoding, status):
    assert (await Taken().ask(b"{}", content_encoding=encoding))[0] == status


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"a": "\xff"}', "byte 0xff at position 7 is not UTF-8"),
        (b"\xff\xfe{}", "byte 0xff at position 0 is not UTF-8"),
        (b'{"a": "\xc0\x80"}', "byte 0xc0 at position 7 is not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "byte 0xed at position 7 is not UTF-8"),
        (b'{"a": "\xf0\x9f\x98', "byte 0xf0 at position 7 is not UTF-8"),
        ('{"n": 17}'.encode("utf-16"), "byte 0xff at position 0 is not UTF-8"),
        (b'\xef\xbb\xbf{"n": 17}', "it begins with a byte order mark"),
        (b'{"a": "\\ud83d"}', "\\ud83d is half of a surrogate pair"),
        (b'{"a": "\\ude00"}', "\\ude00 is half of a surrogate pair"),
        (b'{"\\ud83d\\ud83d": 1}', "\\ud83d is half of a surrogate pair"),
        (b'{"a": "\x00"}', "invalid character (byte 7)"),
        (b'{"a": 1}\x00', "trailing characters"),
        (b'{"a": NaN}', "invalid character"),
        (b'{"a": 1e999}', "Number out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_bytes_that_are_no_json_are_refused_with_the_place(body, sentence, path):
    status, error = await Taken().ask(body, path)
    assert status == 400
    assert error["message"].startswith("the request body is not JSON: ")
    assert sentence in error["message"]


async def test_what_passes_is_decoded_once_and_given_on_whole():
    taken = Taken()
    await taken.ask(b'{"a": [1]}', pieces=3)
    await taken.ask(b"")
    assert taken.bodies == [
        (b'{"a": [1]}', {"a": [1]}, b'{"a": [1]}'),
        (b"", {}, b""),
    ]


async def test_a_full_server_refuses_recursive_requests_before_it_reads_them():
    taken = Taken()
    with taken.admission.admit(Demand()):
        assert (await taken.ask(b"not JSON", "/v1/completions"))[0] == 503
        assert (await taken.ask(b"{}", "/tokenize"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_an_idempotency_key_on_a_post_is_refused_with_a_sentence(path):
    taken = Taken()
    status, error = await taken.ask(b"{}", path, idempotency_key="k")
    assert (status, error["param"]) == (400, "Idempotency-Key")
    assert "a retry is a new request" in error["message"]
    assert taken.bodies == []
    assert (await taken.ask(b"", path, method="GET", idempotency_key="k"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/live"), ("POST", "/"), ("POST", "/no/route"), ("POST", "/tokenize\n"), ("POST", "/tokenize/"),
     ("PUT", "/tokenize"), ("DELETE", "/v1/chat/completions"), ("GET", "/tokenize"), ("PATCH", "/live")],
)  # fmt: skip
async def test_the_body_of_a_path_without_a_post_route_reaches_nobody(method, path):
    """FastAPI would read all of it for a route with a body, whatever its method."""
    taken = Taken()
    assert await taken.ask(b"1" * 9 * MIB, path, method=method) == (200, None)
    assert taken.bodies == [(b"", {}, b"")]


async def test_a_path_with_a_parameter_is_a_post_route():
    taken = Taken()
    await taken.ask(b'{"a": 1}', "/v1/responses/resp_1/cancel")
    assert taken.bodies[0][2] == b'{"a": 1}'


def request_of(path: str, length: int, *, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n".encode()


async def refusing(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 405, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_150_clients_that_send_to_a_path_without_a_post_route_and_fall_silent_take_no_memory():
    taken, process = Taken(), psutil.Process(os.getpid())
    taken.app._app = refusing
    with serving(RequestIdMiddleware(taken.app)) as port:
        exchange(port, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        before, clients = process.memory_info().rss, []
        for _ in range(150):
            clients.append(connect(port))
            clients[-1].sendall(request_of("/live", 8 * MIB))
            assert b" 405 " in clients[-1].recv(4096)
            clients[-1].sendall(b"1" * (8 * MIB - 1))  # the server reads and forgets it
        assert process.memory_info().rss - before < 100 * MIB  # 1.2 GB were sent
        for client in clients:
            client.close()


def test_a_slow_body_ends_in_408_and_a_closed_connection():
    """Also one of which a byte arrives now and then."""
    with serving(RequestIdMiddleware(Taken(timeout_seconds=0.5).app)) as port:
        for pieces in (0, 50):
            with connect(port) as sock:
                began = time.monotonic()
                sock.sendall(request_of("/tokenize", 100))
                for _ in range(pieces):
                    try:
                        sock.sendall(b"[")
                    except OSError:
                        break
                    time.sleep(0.02)
                reply = rest_of(sock)
                assert time.monotonic() - began < 3
                if not pieces:  # a client that goes on sending may lose the reply to the reset
                    assert reply.startswith(b"HTTP/1.1 408 ")
                    assert b"did not arrive within 0.5 s" in reply
                    assert b"connection: close" in reply.lower()


async def test_large_bodies_share_a_bounded_memory_and_small_ones_always_fit():
    taken, arrived = Taken(memory=10 * MIB), asyncio.Event()
    part = {"type": "http.request", "body": b" " * 7 * MIB, "more_body": True}

    async def slow():
        if not arrived.is_set():
            arrived.set()
            return part
        await asyncio.sleep(60)

    scope = {"type": "http", "method": "POST", "path": "/tokenize", "root_path": "", "headers": []}
    slow_client = asyncio.create_task(taken.app(scope, slow, print))  # type: ignore[arg-type]
    await arrived.wait()
    await asyncio.sleep(0)
    status, error = await taken.ask(b" " * 4 * MIB)
    assert (status, error["code"]) == (503, "server_is_overloaded")
    assert (await taken.ask(b'{"a": [' + b"1," * 30_000 + b"1]}"))[0] == 200
    slow_client.cancel()
    await asyncio.gather(slow_client, return_exceptions=True)
    assert taken.memory.used == 0
    assert (await taken.ask(b" " * 7 * MIB + b"{}"))[0] == 200
    assert taken.memory.used == 0


async def test_the_body_of_a_route_outside_admission_counts_until_it_is_answered():
    taken, used = Taken(), []

    async def looking(scope, receive, send):
        used.append(taken.memory.used)
        await taken(scope, receive, send)

    taken.app._app = looking
    body = b'{"a": ""}' + b" " * MIB
    for path in ("/tokenize", "/v1/completions"):
        await taken.ask(body, path)
    assert used == [len(body) - 2**16, 0]


def test_brackets_in_a_text_are_text():
    code = 'for (;;) { a[0] = "{"; }\n' * 20_000
    assert parse_json(json.dumps({"prompt": code}).encode()) == {"prompt": code}


@pytest.mark.parametrize(("count", "passes"), [(MAX_CONTAINERS - 2, True), (MAX_CONTAINERS - 1, False)])
def test_so_many_objects_and_lists_are_taken(count, passes):
    raw = json.dumps({"{[": [[]] * count}).encode()
    if passes:
        assert len(parse_json(raw)["{["]) == count
    else:
        with pytest.raises(InvalidRequest, match="more than 20000 objects and lists"):
            parse_json(raw)


@pytest.mark.parametrize(("count", "passes"), [(MAX_STRINGS - 1, True), (MAX_STRINGS, False)])
def test_so_many_texts_are_taken(count, passes):
    raw = json.dumps({"a": ['"'] * count}).encode()
    if passes:
        assert len(parse_json(raw)["a"]) == count
    else:
        with pytest.raises(InvalidRequest, match="50000 strings"):
            parse_json(raw)


TEXTS = st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.integers(-(2**53), 2**53) | TEXTS, lambda inner: st.lists(inner, max_size=4), max_leaves=8
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_json_is_read_as_json_reads_it(value):
    assert parse_json(json.dumps(value).encode()) == value


NUMBERS = st.integers() | st.integers(2**62, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.sampled_from(["n", "max_tokens", "a"])
PAIRS = st.lists(st.tuples(KEYS, NUMBERS | TEXTS | st.lists(NUMBERS, max_size=3)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.binary(max_size=8), st.integers(0, 60))
def test_what_is_checked_is_what_a_route_parses(pairs, noise, at):
    """FastAPI decodes the same bytes again, with Python's json: repeated keys, large numbers, any bytes."""
    raw = (
        b"{" + b",".join(json.dumps(name).encode() + b":" + json.dumps(value).encode() for name, value in pairs) + b"}"
    )
    for body in (raw, raw[:at] + noise + raw[at:]):
        try:
            checked = parse_json(body)
        except InvalidRequest:
            continue
        assert checked == json.loads(body)

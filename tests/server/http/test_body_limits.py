"""What is refused before it is decoded, how fast, and in how much memory."""

import json
import os
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from rtap_core.errors import InvalidRequest
from rtap_server.engine.request_state import RequestState, begin_request, current_request
from rtap_server.engine.server_state import Drain
from rtap_server.http.admission import Admission, Demand
from rtap_server.http.body_limits import MAX_CONTAINERS, MAX_STRINGS, BodyLimitsMiddleware, parse_json
from rtap_server.http.field_limits import FieldLimits
from rtap_server.telemetry.metrics import Metrics

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


class Taken:
    """The application inside BodyLimitsMiddleware; it keeps the bodies. ``ask`` returns a status and an error."""

    def __init__(self, limit: int = 8 * MIB) -> None:
        self.bodies = []
        limits, metrics = FieldLimits(16, 1024, 1000, allows_templates=False), Metrics(CollectorRegistry())
        self.admission = Admission(1)
        self.drain = Drain()
        self.app = BodyLimitsMiddleware(
            self, max_body_bytes=limit, field_limits=limits, admission=self.admission, drain=self.drain, metrics=metrics
        )

    async def __call__(self, scope, receive, send) -> None:
        self.bodies.append((current_request(), (await receive())["body"]))
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
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/no/route"])
async def test_eight_megabytes_of_anything_are_refused_before_they_hold_up_others(name, path):
    taken = Taken()
    began = time.thread_time()  # of this thread's own work: others may be busy on the same cores
    status, error = await taken.ask(LARGE[name], path, pieces=8 * MIB)
    assert time.thread_time() - began < 0.3  # some tens of milliseconds on an idle core
    if (name, path) == ("escapes", "/v1/chat/completions"):  # one long text, which vLLM counts by itself
        assert status == 200
    else:
        assert (status, error["code"]) == (400, 400)
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
    ("body", "content_type", "status"),
    [
        (b'{"a": 1}', "application/json", 200),
        (b'{"a": 1}', "", 200),
        (b'{"n": 17}', "text/plain", 400),
        (b'{"n": 17}', "application/vnd.api+json", 400),
        ('{"n": 17}'.encode("utf-16"), "application/json", 400),  # the router would read it
        (b'\xef\xbb\xbf{"n": 17}', "application/json", 400),
        (b'{"n": NaN}', "application/json", 400),
        (b"", "", 200),
        (b"--x\r\n[[[[", "multipart/form-data; boundary=x", 200),
        (b'{"prompt": "' + b"a" * 64_001 + b'"}', "", 400),
        (b'{"image_url": {"url": "data:' + b"a" * 64_001 + b'"}}', "", 200),
    ],
)
async def test_what_a_route_would_read_is_looked_at_whatever_it_is_called(body, content_type, status):
    assert (await Taken().ask(body, content_type=content_type))[0] == status


async def test_what_passes_is_decoded_once_and_given_on_whole():
    taken = Taken()
    await taken.ask(b'{"a": [1]}', pieces=3)
    await taken.ask(b"")
    assert [(state.body, state.fields, again) for state, again in taken.bodies] == [
        (b'{"a": [1]}', {"a": [1]}, b'{"a": [1]}'),
        (b"", {}, b""),
    ]


async def test_a_full_server_refuses_recursive_requests_before_it_reads_them():
    taken = Taken()
    with taken.admission.admit(Demand()):
        assert (await taken.ask(b"not JSON", "/v1/completions"))[0] == 503
        assert (await taken.ask(b"{}", "/tokenize"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/no/route"])
async def test_an_idempotency_key_on_a_post_is_refused_with_a_sentence(path):
    taken = Taken()
    status, error = await taken.ask(b"{}", path, idempotency_key="k")
    assert (status, error["param"]) == (400, "Idempotency-Key")
    assert "a retry is a new request" in error["message"]
    assert taken.bodies == []
    assert (await taken.ask(b"", path, method="GET", idempotency_key="k"))[0] == 200


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

"""Idempotency-Key over real sockets: one key is one run, whoever asks, leaves and comes back."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
import tracemalloc

import httpx
import pytest
from prometheus_client import CollectorRegistry

from rtap_core.errors import Conflict
from rtap_server.engine.drain import Drain
from rtap_server.http.admission import Admission
from rtap_server.http.api_keys import Key, KeyRing
from rtap_server.http.auth import Gate
from rtap_server.http.body_limits import Intake
from rtap_server.http.field_limits import Caps
from rtap_server.http.idempotency import Idempotency, Run, State, Store
from rtap_server.telemetry.metrics import Metrics
from tests.server.live import serving

PATH = "/v1/chat/completions"
BODY = {"messages": []}
PARTS = 5


class Application:
    """Streams PARTS parts and an end, each when ``go`` allows one more. It counts its runs, those that were left, and
    those that were done."""

    def __init__(self) -> None:
        self.runs = self.left = self.done = 0
        self.status, self.last = 200, b"end"
        self.go = threading.Semaphore(0)

    async def __call__(self, scope, receive, send) -> None:
        self.runs += 1
        number = self.runs
        assert (await receive())["type"] == "http.request"
        leaving = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-run", b"%d" % number)]})
        for part in range(PARTS):
            while not self.go.acquire(blocking=False):
                await asyncio.sleep(0.002)
                if leaving.done():
                    self.left += 1
                    return
            await send({"type": "http.response.body", "body": b"run %d part %d;" % (number, part), "more_body": True})
        leaving.cancel()
        self.done += 1
        await send({"type": "http.response.body", "body": self.last})

    def allow(self, parts: int) -> None:
        self.go.release(parts)


class Service:
    """A server around an application. ``ask`` is a whole exchange; ``open`` one that can be left."""

    def __init__(self, seconds: float = 600.0, grace_seconds: float = 0.0) -> None:
        self.application, self.now, self.registry = Application(), 0.0, CollectorRegistry()
        metrics = Metrics(self.registry)
        self.store = Store(seconds, grace_seconds, 8, 100_000, lambda: self.now)
        app = Idempotency(self.application, store=self.store, metrics=metrics)
        caps, admission = Caps(1, 9, 9, allows_templates=False), Admission(100)
        intake = Intake(app, max_body_bytes=10_000, caps=caps, admission=admission, drain=Drain(), metrics=metrics)
        keys = [Key(text, hashlib.sha256(text.encode()).digest()) for text in ("a", "b")]
        self.gate = Gate(intake, keys=KeyRing(keys, None), metrics=metrics, secret=b"s" * 32)
        self.url = ""

    def ask(self, name="k", *, key="a", body=BODY, path=PATH) -> httpx.Response:
        headers = {"x-api-key": key} | ({} if name is None else {"idempotency-key": name})
        return httpx.post(self.url + path, json=body, headers=headers, timeout=10)

    @contextlib.contextmanager
    def open(self, name="k"):
        """A reply that is not read yet; its client leaves at the end."""
        headers = {"x-api-key": "a", "idempotency-key": name}
        with httpx.stream("POST", self.url + PATH, json=BODY, headers=headers, timeout=10) as reply:
            yield reply

    def counted(self, run: str) -> float:
        return self.registry.get_sample_value("rtap_idempotent_total", {"run": run}) or 0.0


@pytest.fixture
def service():
    made = Service()
    with serving(made.gate) as port:
        made.url = f"http://127.0.0.1:{port}"
        yield made


def until(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


WHOLE = "".join(f"run 1 part {part};" for part in range(PARTS)) + "end"


def test_the_second_gets_the_first_ones_result_byte_for_byte(service):
    service.application.allow(PARTS)
    first, second = service.ask(), service.ask()
    assert first.text == second.text == WHOLE
    assert second.headers["x-run"] == "1"
    assert (first.headers.get("idempotent-replayed"), second.headers["idempotent-replayed"]) == (None, "true")
    assert service.application.runs == 1
    assert (service.counted("going"), service.counted("done")) == (0, 1)


def test_without_a_key_each_request_is_a_run(service):
    service.application.allow(2 * PARTS)
    assert [service.ask(None).headers["x-run"] for _ in range(2)] == ["1", "2"]


def test_who_joins_a_stream_gets_all_of_it_from_its_beginning(service):
    with service.open() as reply:
        service.application.allow(3)
        parts = reply.iter_raw()  # kept: without it the client would leave
        assert b"part 0" in next(parts)
        with service.open() as joined:
            service.application.allow(PARTS - 3)
            assert joined.read().decode() == WHOLE
            assert joined.headers["idempotent-replayed"] == "true"
    assert service.application.runs == 1
    assert service.counted("going") == 1


def test_the_first_leaves_and_the_run_goes_on_for_who_joined(service):
    with contextlib.ExitStack() as first:
        reply = first.enter_context(service.open())
        service.application.allow(1)
        parts = reply.iter_raw()
        assert b"part 0" in next(parts)
        with service.open() as joined:
            first.close()
            time.sleep(0.1)  # enough for the server to see it, which it must not act on
            assert service.application.left == 0
            service.application.allow(PARTS - 1)
            assert joined.read().decode() == WHOLE
    assert (service.application.runs, service.application.done) == (1, 1)
    assert service.ask().text == WHOLE  # and its result is kept


def test_who_joined_leaves_and_the_first_goes_on(service):
    with service.open() as reply:
        with service.open():
            until(lambda: service.counted("going") == 1)
        time.sleep(0.1)
        service.application.allow(PARTS)
        assert reply.read().decode() == WHOLE
    assert service.application.left == 0


def test_when_all_have_left_the_run_ends_within_a_second_and_the_next_one_begins_anew(service):
    with service.open(), service.open():
        until(lambda: service.counted("going") == 1)
        began = time.monotonic()
    until(lambda: service.application.left == 1)
    assert time.monotonic() - began < 1
    service.application.allow(PARTS)
    assert service.ask().headers["x-run"] == "2"
    assert service.counted("done") == 0


def test_who_comes_again_in_time_finds_the_run_and_who_does_not_begins_anew():
    made = Service(grace_seconds=0.3)
    with serving(made.gate) as port:
        made.url = f"http://127.0.0.1:{port}"
        with made.open():
            pass
        with made.open():
            assert made.counted("going") == 1
            time.sleep(0.5)  # longer than the grace, but somebody is here
            assert made.application.left == 0
        until(lambda: made.application.left == 1)
        made.application.allow(PARTS)
        assert made.ask().headers["x-run"] == "2"


def test_another_body_or_path_under_the_same_name_is_a_conflict(service):
    service.application.allow(PARTS)
    service.ask()
    for other in (service.ask(body={"messages": [{}]}), service.ask(path="/tokenize"), service.ask(path=PATH + "?a=1")):
        error = other.json()["error"]
        assert (other.status_code, error["code"], error["type"]) == (409, 409, "conflict_error")
        assert other.headers["x-should-retry"] == "false"
    assert service.application.runs == 1
    assert service.registry.get_sample_value("rtap_rejected_total", {"reason": "conflict"}) == 3


def test_a_conflict_is_seen_while_the_run_goes_on(service):
    with service.open():
        assert service.ask(body={"messages": [{}]}).status_code == 409
        service.application.allow(PARTS)


def test_a_name_is_one_api_keys_own(service):
    service.application.allow(2 * PARTS)
    assert [service.ask(key=key).headers["x-run"] for key in ("a", "b", "a", "b")] == ["1", "2", "1", "2"]


@pytest.mark.parametrize(
    ("status", "last"),
    [(400, b"{}"), (503, b"{}"), (500, b"{}"), (200, b'data: {"error": {}}\n\n'), (200, b"event: error\n\n"),
     (200, b"event: response.failed\n\n"), (200, b'{"finish_reason":"abort"}')],
)  # fmt: skip
def test_what_failed_is_not_kept(service, status, last):
    service.application.status, service.application.last = status, last
    service.application.allow(2 * PARTS)
    assert [service.ask().headers["x-run"] for _ in range(2)] == ["1", "2"]


@pytest.mark.parametrize("name", ["", "a b", "é".encode(), "x" * 256])
def test_a_name_that_cannot_be_one_is_refused(service, name):
    reply = service.ask(name)
    assert reply.status_code == 400
    assert "Idempotency-Key must be" in reply.json()["error"]["message"]


def test_a_result_expires(service):
    service.application.allow(2 * PARTS)
    assert service.ask().headers["x-run"] == "1"
    service.now = 599
    assert service.ask().headers["x-run"] == "1"
    service.now = 601
    assert service.ask().headers["x-run"] == "2"


def test_a_result_goes_at_its_time_also_where_nobody_asks_any_more():
    made = Service(seconds=0.1)
    with serving(made.gate) as port:
        made.url = f"http://127.0.0.1:{port}"
        made.application.allow(2 * PARTS)
        assert [made.ask(name).status_code for name in ("k", "l")] == [200, 200]
        assert len(made.store) == 2
        made.now = 0.2
        until(lambda: len(made.store) == 0)


def test_the_size_of_a_kept_run_is_no_less_than_it_takes():
    run, chunk = Run(b"d", 0.0), b"x" * 200
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10_000):
            run.add({"type": "http.response.body", "body": chunk + b".", "more_body": True})
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held <= run.size < 1.5 * held


def test_twenty_at_once_are_one_run(service):
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(service.ask().text)) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: service.counted("going") == 19)
    service.application.allow(PARTS)
    for thread in threads:
        thread.join()
    assert replies == [WHOLE] * 20
    assert service.application.runs == 1


def test_a_setting_of_no_seconds_turns_it_off():
    made = Service(seconds=0)
    with serving(made.gate) as port:
        made.url = f"http://127.0.0.1:{port}"
        made.application.allow(2 * PARTS)
        assert [made.ask().headers["x-run"] for _ in range(2)] == ["1", "2"]


class Broken:
    """Raises, before or after its reply has begun."""

    def __init__(self, *, begins: bool) -> None:
        self.begins, self.go = begins, threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        if self.begins:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        while not self.go.is_set():
            await asyncio.sleep(0.002)
        raise RuntimeError("broken")


@pytest.mark.parametrize("begins", [False, True])
def test_a_run_that_breaks_ends_for_all_and_is_forgotten(service, begins):
    layer = service.gate._app._app
    layer._app = broken = Broken(begins=begins)
    ends = []

    def ask():
        try:
            ends.append(service.ask().status_code)
        except httpx.RemoteProtocolError:
            ends.append("cut")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: service.counted("going") == 1)
    broken.go.set()
    for thread in threads:
        thread.join()
    assert sorted(map(str, ends)) == (["cut", "cut"] if begins else ["500", "503"])
    assert len(service.store) == 0


def message(size: int):
    return {"type": "http.response.body", "body": b"x" * size, "more_body": False}


async def test_the_store_is_bounded_in_results_and_bytes():
    store = Store(60, 0, 3, 10_000, lambda: 0.0)
    for number in range(5):
        run = store.begin((b"", b"%d" % number), b"d")
        run.add({"type": "http.response.start", "status": 200, "headers": []})
        run.add(message(10))
        run.end()
        store.tidy()
        assert len(store) <= 3
    assert [store.find((b"", b"%d" % number), b"d") is not None for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    big = store.begin((b"", b"big"), b"d")
    big.add(message(9_700))
    assert store.find((b"", b"3"), b"d") is None  # the oldest went for it
    assert store.find((b"", b"big"), b"d") is big
    big.add(message(9_800))
    assert store.find((b"", b"big"), b"d") is None  # more than all that may be kept: who reads it goes on
    assert len(store) == 0


async def test_a_run_is_told_whole_to_readers_that_come_at_any_time():
    run, told = Run(b"d", 0.0), []

    async def read():
        told.append([m["body"] async for m in run.read()])

    readers = []
    for part in range(4):
        readers.append(asyncio.create_task(read()))
        await asyncio.sleep(0)
        run.add({"type": "http.response.body", "body": b"%d" % part, "more_body": True})
    run.end()
    readers.append(asyncio.create_task(read()))
    await asyncio.gather(*readers)
    assert told == [[b"0", b"1", b"2", b"3"]] * 5
    assert run.state is State.BROKEN  # it had no last part


async def test_a_conflict_says_nothing_of_the_other_request():
    store = Store(60, 0, 3, 10_000, lambda: 0.0)
    store.begin((b"", b"name"), b"one")
    with pytest.raises(Conflict) as refused:
        store.find((b"", b"name"), b"two")
    assert "name" not in str(refused.value)
    assert json.dumps(str(refused.value))

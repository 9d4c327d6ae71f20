"""Attacks of the abuse test: requests that stopped or starved a server once.

An attack runs in a process of its own, so that its work does not delay the clients that measure.
"""

import asyncio
import io
import json
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.stress.soak_traffic import CHAT, COMPLETIONS, trajectories_of

SCORE, TOKENIZE = "/v1/rtap/score", "/tokenize"
MIB = 2**20
TOKENS_PER_MINUTE = 2000  # of Target.limited_key
HELD_SECONDS = 60.0  # a server may hold a silent connection with a request this long
_REPLY_SECONDS = 120.0
_GOOD_IN_FLIGHT = 3
_QUESTION = "make 82 from 3, 7, 25"
_FORGED = "FORGED by tests.stress.abuse"


@dataclass(frozen=True, slots=True)
class Target:
    """The server under attack. key: of the attacker; empty without API keys. limited_key: of TOKENS_PER_MINUTE.

    log: the server's output."""

    url: str
    key: str = ""
    limited_key: str = ""
    log: Path | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of an attacker with a key."""
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}


@dataclass(slots=True)
class Outcome:
    """Result of an attack. replies: by status, ``closed`` (without a reply), ``held`` or ``left`` (by the attacker).

    problems: what the server must not do."""

    replies: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])

    def reply(self, request: bytes, status: str | int, allowed: Collection[int] | None = None) -> None:
        """Count a reply. allowed: statuses; None: all but 5xx, and 503 for a full server."""
        self.replies[str(status)] += 1
        code = int(status)
        if code not in allowed if allowed is not None else code >= 500 and code != 503:
            self.problem(f"{code} for {_shown(request)}")

    def problem(self, text: str) -> None:
        """Note a problem, once."""
        if text not in self.problems and len(self.problems) < 10:
            self.problems.append(text)


def _shown(request: bytes) -> str:
    """Beginning and end of a request."""
    text = request.decode("latin-1")
    return repr(text if len(text) < 300 else f"{text[:120]} … {text[-180:]}")


@dataclass(frozen=True, slots=True)
class Attack:
    """name: for the command line and the report. expected: what a sound server does, in the report's words."""

    name: str
    expected: str
    run: Callable[[Target, Outcome], Coroutine[Any, Any, None]]


# ------------------------------------------------------------------------------------------------ whole requests


def _session(target: Target) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=_REPLY_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(target.url, headers=target.headers, timeout=timeout, connector=connector)


async def _post(
    session: aiohttp.ClientSession,
    outcome: Outcome,
    path: str,
    body: Mapping[str, Any] | bytes,
    *,
    allowed: Collection[int] | None = None,
    leave_after: float | None = None,
    headers: Any = None,
) -> bytes:
    """Send a request, count its reply, return the body of a 200. leave_after: seconds until the client disconnects."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with asyncio.timeout(leave_after), session.post(path, data=io.BytesIO(data), headers=headers) as reply:
            content = await reply.read()
            outcome.reply(path.encode() + b" " + data, reply.status, allowed)
            return content if reply.status == 200 else b""
    except TimeoutError:
        if leave_after is None:
            outcome.problem(f"no reply within {_REPLY_SECONDS:.0f} s: {_shown(data)}")
        outcome.replies["left"] += 1
    except aiohttp.ClientError:  # a server may close a connection whose body it does not read
        outcome.replies["closed"] += 1
    return b""


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "rtap", "max_tokens": 64, "messages": [{"role": "user", "content": _QUESTION}], **fields}


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "rtap", "max_tokens": 64, "prompt": _QUESTION, **fields}


async def multiplied_completion(target: Target, outcome: Outcome) -> None:
    """548 bytes that ask for 64 x 16 x 32 trajectories."""
    rtap = {"policy": "vote", "samples": 32, "deadline_seconds": 5}
    body = _completion(prompt=["hi"] * 64, n=16, ignore_eos=True, max_tokens=1000, rtap=rtap)
    began = time.monotonic()
    async with _session(target) as session:
        await _post(session, outcome, COMPLETIONS, body)
    if time.monotonic() - began > 10:
        outcome.problem(f"answered after {time.monotonic() - began:.0f} s with a deadline of 5 s")


async def duplicate_content_types(target: Target, outcome: Outcome) -> None:
    """A body whose checks another Content-Type may skip."""
    body = json.dumps({"model": "rtap", "prompt": "1 " * 4_000_000}).encode()
    types = ("application/json", "multipart/form-data; boundary=x")
    async with _session(target) as session:
        for first, second in (types, reversed(types)):
            for path, sent in ((TOKENIZE, body), (SCORE, _score(4 * MIB)), (CHAT, json.dumps(_chat(n=1000)).encode())):
                headers = [(k, v) for k, v in target.headers.items() if k != "Content-Type"]
                headers += [("Content-Type", first), ("Content-Type", second)]
                await _post(session, outcome, path, sent, headers=headers, allowed=(400, 413, 415))


def _score(length: int) -> bytes:
    text = "1 " * (length // 2)
    return json.dumps({"question": _QUESTION, "think": text, "answer": "2"}).encode()


async def long_texts(target: Target, outcome: Outcome) -> None:
    """Texts up to the limit of a body, to routes that tokenise."""
    async with _session(target) as session:
        for length in (2 * MIB, 8 * MIB - 1000):
            for word in ("1 ", "a", "\u00e9", "</answer>"):
                text = word * (length // len(word.encode()))
                tokenize = {"model": "rtap", "prompt": text}
                score = {"question": _QUESTION, "think": text, "answer": "2"}
                question = [{"role": "user", "content": text}]
                bodies = ((TOKENIZE, tokenize), (SCORE, score), (CHAT, _chat(messages=question)))
                await asyncio.gather(*(_post(session, outcome, path, _compact(body)) for path, body in bodies))


def _compact(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


async def large_grammars(target: Target, outcome: Outcome) -> None:
    """Grammars that compile for minutes, from clients that leave at once."""
    enum = {"type": "string", "enum": [f"value {n}" for n in range(49_000)]}
    grammars = [
        _json_schema(enum),
        {"structured_outputs": {"json": enum}},
        {"structured_outputs": {"choice": enum["enum"]}},
        {"structured_outputs": {"regex": "|".join(f"word{n}" for n in range(30_000))}},
        {"structured_outputs": {"regex": "(a|b){5000}(c|d){5000}"}},
    ]
    async with _session(target) as session:
        jobs = [(path, make(**grammar)) for grammar in grammars for path, make in _GENERATING]
        await asyncio.gather(*(_post(session, outcome, path, body, leave_after=1) for path, body in jobs))


def _json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


_GENERATING: Sequence[tuple[str, Callable[..., dict[str, Any]]]] = ((CHAT, _chat), (COMPLETIONS, _completion))
_INVALID: Sequence[Mapping[str, Any]] = (
    _json_schema({"$ref": "#"}),
    _json_schema({"$ref": "#/$defs/missing"}),
    _json_schema({"type": "object", "patternProperties": {"^C[": {"type": "string"}}}),
    _json_schema({"type": "string", "pattern": "("}),
    _json_schema({"allOf": [{"$ref": "#/allOf/0"}]}),
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"grammar": "root ::= root"}},
    {"structured_outputs": {"grammar": 'root ::= root "a" | root'}},
    {"structured_outputs": {"grammar": "root ::= missing"}},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"structural_tag": "{}"}},
    {"vllm_xargs": {"kv_transfer_params": "x"}},
    {"vllm_xargs": {"": ""}},
)


async def invalid_grammars(target: Target, outcome: Outcome) -> None:
    """Schemas and grammars that cannot be compiled, whole and streamed."""
    async with _session(target) as session:
        for fields in _INVALID:
            for path, make in _GENERATING:
                for stream in (False, True):
                    content = await _post(session, outcome, path, make(**fields, stream=stream))
                    if any(_is_server_error(line) for line in content.splitlines()):
                        outcome.problem(f"a 5xx in a stream of {path} for {json.dumps(fields)}")


def _is_server_error(line: bytes) -> bool:
    """True for an error event of a stream that is not the client's fault."""
    return line.startswith(b'data: {"error"') and json.loads(line[6:])["error"]["type"] == "server_error"


async def forged_log_record(target: Target, outcome: Outcome) -> None:
    """A line break and a record inside a schema."""
    record = "\n" + json.dumps({"level": "ERROR", "message": _FORGED}) + "\n"
    schemas = [{"$ref": f"#/{record}"}, {"$ref": record}, {"type": "string", "pattern": f"({record}"}]
    schemas += [{"type": record}, {"type": "string", "format": record}, {record: record}]
    async with _session(target) as session:
        for schema in schemas:
            await _post(session, outcome, CHAT, _chat(**_json_schema(schema)))
        for name, value in (("grammar", f"root ::= {record}"), ("regex", f"({record}")):
            await _post(session, outcome, CHAT, _chat(structured_outputs={name: value}))
        await _post(session, outcome, f"/v1/{_FORGED}\n{record}".replace("\n", "%0A"), b"{}")
    for line in await _logged(target, 0):
        if line.startswith(record.strip()):
            outcome.problem(f"a forged line in the log: {line}")


async def _logged(target: Target, start: int) -> list[str]:
    """Lines of the log from an offset on; none without a log."""
    await asyncio.sleep(1)  # for output that is still on its way
    return [] if target.log is None else target.log.read_bytes()[start:].decode(errors="replace").splitlines()


async def spent_key(target: Target, outcome: Outcome) -> None:
    """A key of TOKENS_PER_MINUTE asks for more, with requests that start together."""
    if not target.limited_key:
        outcome.replies["not run: needs --limited-key"] += 1
        return
    limited = Target(target.url, target.limited_key)
    bodies = [
        _completion(n=16, max_tokens=1000, ignore_eos=True),
        _completion(n=2, max_tokens=900, ignore_eos=True),
        _completion(max_tokens=None, ignore_eos=True),
        _completion(prompt=[_QUESTION] * 8, max_tokens=200, ignore_eos=True),
        _completion(max_tokens=500, ignore_eos=True, rtap={"policy": "vote", "samples": 16}),
        *[_completion(max_tokens=300, ignore_eos=True)] * 8,
    ]
    began = time.monotonic()
    async with _session(limited) as session:
        contents = [
            content
            for _ in range(3)
            for content in await asyncio.gather(*(_post(session, outcome, COMPLETIONS, body) for body in bodies))
        ]
    allowed = TOKENS_PER_MINUTE * (1 + (time.monotonic() - began) / 60)
    spent = sum(_generated(json.loads(content)) for content in contents if content)
    outcome.replies[f"{spent} tokens"] += 1
    if spent > allowed:
        outcome.problem(f"{spent} tokens generated; {allowed:.0f} are allowed")


def _generated(reply: Mapping[str, Any]) -> int:
    trajectories = trajectories_of(reply)
    return sum(t["discarded_tokens"] + sum(cycle["tokens"] for cycle in t["cycles"]) for t in trajectories)


# ------------------------------------------------------------------------------------------------------ sockets


def _head(path: str, headers: Mapping[str, str], *, length: int | None, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: rtap", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def _connect(target: Target, *, receive_bytes: int | None = None) -> socket.socket:
    address = urlsplit(target.url)
    connection = socket.socket()
    connection.setblocking(False)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
    except OSError:
        connection.close()
        raise
    return connection


async def _held(
    target: Target, outcome: Outcome, parts: Callable[[], Iterator[bytes]], pause_seconds: float = 0
) -> None:
    """Send ``parts`` with pauses, then be silent until the server replies or closes, at most HELD_SECONDS in all."""
    loop = asyncio.get_running_loop()
    with await _connect(target) as connection:

        async def send() -> None:
            with suppress(ConnectionError):
                for part in parts():
                    await loop.sock_sendall(connection, part)
                    await asyncio.sleep(pause_seconds)

        sending = asyncio.create_task(send())
        try:
            async with asyncio.timeout(HELD_SECONDS):
                reply = await loop.sock_recv(connection, 65536)
            status = reply[9:12].decode("latin-1")
            if status.isdigit():
                outcome.reply(next(parts()), status)
            else:
                outcome.replies["closed"] += 1
        except ConnectionError:
            outcome.replies["closed"] += 1
        except TimeoutError:
            outcome.replies["held"] += 1
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _all_released(outcome: Outcome, connections: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*connections)
    if held := outcome.replies["held"]:
        outcome.problem(f"{held} of {len(connections)} connections are still held after {HELD_SECONDS:.0f} s")


async def unauthenticated_bodies(target: Target, outcome: Outcome) -> None:
    """150 bodies of 8 MB to /live without their last byte and without a key."""
    size = 8 * MIB - 1

    def parts() -> Iterator[bytes]:
        yield _head("/live", {}, length=size + 1)
        for _ in range(0, size - MIB, MIB):
            yield b"x" * MIB
        yield b"x" * (MIB - 1)

    await _all_released(outcome, [_held(target, outcome, parts) for _ in range(150)])


async def slow_bodies(target: Target, outcome: Outcome) -> None:
    """100 bodies that arrive a byte a second, half of them in chunks."""
    body = json.dumps(_chat()).encode()

    def plain() -> Iterator[bytes]:
        yield _head(CHAT, target.headers, length=len(body))
        yield from (body[i : i + 1] for i in range(len(body)))

    def chunked() -> Iterator[bytes]:
        yield _head(CHAT, {**target.headers, "Transfer-Encoding": "chunked"}, length=None)
        yield from (b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body)))

    await _all_released(outcome, [_held(target, outcome, way, 1.0) for way in (plain, chunked) for _ in range(50)])


async def half_headers(target: Target, outcome: Outcome) -> None:
    """200 connections that send half a header. No server here closes them; they must hurt nobody."""
    part = _head(CHAT, target.headers, length=10)[:-20]
    with ExitStack() as connections:
        for _ in range(200):
            connection = connections.enter_context(await _connect(target))
            connection.send(part)
            outcome.replies["left"] += 1
        await asyncio.sleep(20)


async def unread_streams(target: Target, outcome: Outcome) -> None:
    """32 streams of megabytes that nobody reads: their places must be free soon after their deadline."""
    deadline = 3
    long = {"logprobs": True, "top_logprobs": 20, "n": 4, "max_tokens": 900, "ignore_eos": True, "stream": True}
    body = json.dumps(_chat(**long, rtap={"policy": "single", "deadline_seconds": deadline})).encode()
    request, loop = _head(CHAT, target.headers, length=len(body)) + body, asyncio.get_running_loop()
    with ExitStack() as held:
        async with _session(target) as session:
            before, now = await _in_flight(session), 0.0
            connections = [held.enter_context(await _connect(target, receive_bytes=4096)) for _ in range(32)]
            await asyncio.gather(*(loop.sock_sendall(connection, request) for connection in connections))
            began = time.monotonic()
            await asyncio.sleep(deadline)
            while (late := time.monotonic() - began - deadline) < HELD_SECONDS:
                if (now := await _in_flight(session)) <= before + _GOOD_IN_FLIGHT:
                    break
                await asyncio.sleep(0.5)
        for connection in connections:
            outcome.replies[_status(connection)] += 1
    if not outcome.replies["200"]:
        outcome.problem("the attack failed: no stream began")
    if late > 10:
        outcome.problem(f"{now:.0f} requests are in flight {late:.0f} s after their deadline")


def _status(connection: socket.socket) -> str:
    """Status of a reply that stays unread."""
    with suppress(OSError):
        return connection.recv(12, socket.MSG_PEEK)[9:].decode("latin-1") or "closed"
    return "held"


async def _in_flight(session: aiohttp.ClientSession) -> float:
    async with session.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("rtap_in_flight "))


async def invalid_bytes(target: Target, outcome: Outcome) -> None:
    """0xFF in body, header, path and query: a 4xx, the connection goes on, no traceback in the log."""
    start = 0 if target.log is None else target.log.stat().st_size
    good = _head("/live", {}, length=None, method="GET")
    key = {name: value for name, value in target.headers.items() if name != "Content-Type"}
    json_type, text, form = ({"Content-Type": type_} for type_ in ("application/json", "text/plain", "multipart/x"))
    bodies = (
        b"\xff",
        b"\xff" * 1000,
        b'{"model": "rtap", "messages": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"a": "\\ud800"}',
        b"[]",
    )
    requests = [
        _head(path, {**key, **type_}, length=len(body)) + body
        for path in (CHAT, TOKENIZE, SCORE, "/v1/messages", "/v1/rtap/feedback")
        for type_ in (json_type, dict[str, str](), text, form)
        for body in bodies
    ]
    requests += [
        _head("/v1/%ff", key, length=None, method="GET"),
        _head("/v1/models?x=%ff", key, length=None, method="GET"),
        _head("/v1/models", {**key, "X-Header": "\xff"}, length=None, method="GET").replace(b"\xc3\xbf", b"\xff"),
    ]
    for request in requests:
        await asyncio.to_thread(_twice, target, outcome, request, good)
    tracebacks = sum(line.startswith("Traceback") for line in await _logged(target, start))
    if tracebacks:
        outcome.problem(f"{tracebacks} tracebacks in the log")


def _twice(target: Target, outcome: Outcome, request: bytes, good: bytes) -> None:
    """Send ``request`` and then a good one on the same connection."""
    address = urlsplit(target.url)
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=30) as connection:
        for sent in (request, good):
            connection.sendall(sent)
            reply = _read_reply(connection)
            if not reply:
                outcome.replies["closed"] += 1
                outcome.problem(f"the connection was closed after {_shown(request)}")
                return
            outcome.reply(sent, reply[9:12].decode())


def _read_reply(connection: socket.socket) -> bytes:
    """One reply with its body; empty when the server closes first."""
    with connection.makefile("rb") as stream, suppress(ConnectionError):
        lines = list(iter(stream.readline, b"\r\n"))
        if not lines or not lines[0]:
            return b""
        headers = dict(line.lower().strip().split(b": ", 1) for line in lines[1:])
        return b"".join(lines) + stream.read(int(headers.get(b"content-length", b"0")))
    return b""


ATTACKS: Sequence[Attack] = (
    Attack("multiplied-completion", "a 4xx, or an answer by its deadline", multiplied_completion),
    Attack("unauthenticated-bodies", f"refused, no connection held for {HELD_SECONDS:.0f} s", unauthenticated_bodies),
    Attack("slow-bodies", f"ended within {HELD_SECONDS:.0f} s", slow_bodies),
    Attack("duplicate-content-types", "a 4xx", duplicate_content_types),
    Attack("long-texts", "no 5xx", long_texts),
    Attack("large-grammars", "refused, or compiled without delay for others", large_grammars),
    Attack("invalid-grammars", "a 4xx, in streams too", invalid_grammars),
    Attack("forged-log-record", "a 4xx, no forged line in the log", forged_log_record),
    Attack("unread-streams", "places are free within 10 s of the deadline", unread_streams),
    Attack("half-headers", "nobody notices", half_headers),
    Attack("invalid-bytes", "a 4xx, the connection goes on", invalid_bytes),
    Attack("spent-key", f"at most {TOKENS_PER_MINUTE} tokens a minute", spent_key),
)


def run_attack(name: str, target: Target) -> Outcome:
    """Run an attack to its end. A failure of the attack itself is one of its problems."""
    outcome = Outcome()
    (attack,) = (attack for attack in ATTACKS if attack.name == name)
    try:
        asyncio.run(attack.run(target, outcome))
    except Exception as error:
        outcome.problem(f"the attack failed: {type(error).__name__}: {error}")
    return outcome

"""Idempotency-Key: a request that is sent again joins the run that it started, or gets that run's result.

A store of runs, bounded and expiring, and a thin ASGI layer over it. Inside the gate, so that a name is one key's own,
and outside admission, because who joins takes no place. What is kept is the reply as it was sent, byte for byte: a
stream is told again from its beginning. Nothing is on disk, and each process has its own store.
"""

import asyncio
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from enum import StrEnum

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtap_core.errors import Conflict, InvalidRequest, Overloaded
from rtap_server.http.auth import current_owner
from rtap_server.http.body_limits import body_of, replay
from rtap_server.http.errors import response_to
from rtap_server.telemetry.metrics import Metrics

_HEADER = b"idempotency-key"
_GOOD_NAME = re.compile(rb"[!-~]{1,255}")
_REPLAYED = (b"idempotent-replayed", b"true")
# How a stream says that it broke, in its 200: vLLM's endpoints, Anthropic's, OpenAI's responses.
_BROKEN = (
    b'data: {"error"',
    b"event: error",
    b"event: response.failed",
    b'"finish_reason":"abort"',
    b'"finish_reason":"error"',
)
_MESSAGE_BYTES = 256  # of a kept message, besides its body
_LEAST_SECONDS = 1.0  # between two looks for what is too old

Name = tuple[bytes, bytes]


class State(StrEnum):
    """Of a run."""

    GOING = "going"
    DONE = "done"  # with a result that is worth telling again
    BROKEN = "broken"  # refused, failed, or left by everybody


@dataclass(slots=True, eq=False)
class Run:
    """One run of a request, and its reply so far. digest: of the request. grace_seconds: how long it goes on when
    everybody has left, so that who comes again finds it."""

    digest: bytes
    began: float
    grace_seconds: float = 0.0
    state: State = State.GOING
    messages: list[Message] = field(default_factory=list[Message])
    size: int = 0
    readers: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # by everybody who read it, for good
    _leaving: asyncio.TimerHandle | None = None

    def add(self, message: Message) -> None:
        """Append what the application sends."""
        self.messages.append(message)
        self.size += len(message.get("body", b"")) + _MESSAGE_BYTES
        self._tell()

    def end(self) -> None:
        """The application has returned."""
        self.state = State.DONE if self._is_worth_keeping() else State.BROKEN
        self._tell()

    async def read(self) -> AsyncGenerator[Message]:
        """The reply from its beginning, as it comes."""
        position = 0
        while True:
            while position < len(self.messages):
                yield self.messages[position]
                position += 1
            if self.state is not State.GOING:
                return
            await self._news.wait()

    @contextmanager
    def reader(self) -> Generator[None]:
        """Around one client's reading. When the last has left before the end, and none has come, the run ends."""
        self.readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
        try:
            yield
        finally:
            self.readers -= 1
            if not self.readers and self.state is State.GOING:
                self._leaving = asyncio.get_running_loop().call_later(self.grace_seconds, self.left.set)

    def _tell(self) -> None:
        """Wake all who wait; who comes later waits for the next."""
        self._news.set()
        self._news = asyncio.Event()

    @property
    def is_whole(self) -> bool:
        """Whether the reply has its last part."""
        return bool(self.messages) and not self.messages[-1].get("more_body", "body" not in self.messages[-1])

    def _is_worth_keeping(self) -> bool:
        if not self.is_whole or self.messages[0].get("status") != 200:
            return False
        return not any(sign in message.get("body", b"") for message in self.messages for sign in _BROKEN)


@dataclass(slots=True)
class Store:
    """Runs by name. seconds: how long one is kept after it began. grace_seconds: of each run. results, size: how many
    runs are kept, and of how many bytes."""

    seconds: float
    grace_seconds: float
    results: int
    size: int
    clock: Callable[[], float] = time.monotonic
    _runs: OrderedDict[Name, Run] = field(default_factory=OrderedDict[Name, Run])

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, name: Name, digest: bytes) -> Run | None:
        """The run of that name that goes on or is done. Raises Conflict where it is another request's."""
        self.tidy()
        run = self._runs.get(name)
        if run is not None and run.digest != digest:
            raise Conflict("this Idempotency-Key came with another request before; use a new key for a new request")
        return run

    def begin(self, name: Name, digest: bytes) -> Run:
        """A new run of that name."""
        run = self._runs[name] = Run(digest, self.clock(), self.grace_seconds)
        return run

    def tidy(self) -> None:
        """Forget what broke, what is too old, and the oldest of what is too much. Who reads one goes on reading it."""
        oldest = self.clock() - self.seconds
        for name, run in list(self._runs.items()):
            is_old = run.state is State.DONE and run.began < oldest
            is_left = run.state is State.GOING and run.left.is_set()
            if is_old or is_left or run.state is State.BROKEN:
                del self._runs[name]
        held = sum(run.size for run in self._runs.values())
        while self._runs and (len(self._runs) > self.results or held > self.size):
            held -= self._runs.popitem(last=False)[1].size

    def seconds_left(self) -> float:
        """Until the oldest run is too old."""
        return next(iter(self._runs.values())).began + self.seconds - self.clock()


class Idempotency:
    """Around every POST that has the header."""

    def __init__(self, app: ASGIApp, *, store: Store, metrics: Metrics) -> None:
        self._app, self._store, self._metrics = app, store, metrics
        self._forgetting: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [v for k, v in scope["headers"] if k == _HEADER] if scope["type"] == "http" else []
        if not given or scope["method"] != "POST" or not self._store.seconds:
            await self._app(scope, receive, send)
            return
        try:
            if len(given) > 1 or not _GOOD_NAME.fullmatch(given[0]):
                raise InvalidRequest("Idempotency-Key must be one value of 1 to 255 printable ASCII characters")
            name, digest = (current_owner(), given[0]), _digest(scope)
            run = self._store.find(name, digest)
        except (InvalidRequest, Conflict) as error:
            self._metrics.rejected("conflict" if isinstance(error, Conflict) else "invalid")
            await response_to(error)(scope, receive, send)
            return
        if run is None:
            await self._start(self._store.begin(name, digest), scope, receive, send)
        else:
            self._metrics.joined(run.state)
            await self._join(run, scope, receive, send)

    async def _start(self, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the reply, and read it like everybody else. This request lasts as long as the run, whoever reads: so
        what its key is charged, and the place it takes, are those of the whole run."""

        async def leave() -> Message:
            await run.left.wait()
            return {"type": "http.disconnect"}

        async def add(message: Message) -> None:
            run.add(message)

        async def write() -> None:
            try:
                await self._app(scope, replay(body_of(scope).raw, leave), add)
            finally:
                run.end()
                self._forget()

        writing = asyncio.create_task(write())
        try:
            await _tell(run, receive, send)
            await writing  # raises what the application raised, to whom it would have been raised
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _forget(self) -> None:
        """What is kept goes when its time is over, also where nobody asks any more."""
        self._store.tidy()
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        if len(self._store):
            # In a context of its own: that of the request would be kept as long, and all that it knows of it.
            wait, loop = max(_LEAST_SECONDS, self._store.seconds_left()), asyncio.get_running_loop()
            self._forgetting = loop.call_later(wait, self._forget, context=Context())

    async def _join(self, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
        if not await _tell(run, receive, send, _REPLAYED):
            error = Overloaded("the run of this Idempotency-Key ended without a result; send the request again")
            await response_to(error)(scope, receive, send)


async def _tell(run: Run, receive: Receive, send: Send, *fields: tuple[bytes, bytes]) -> bool:
    """Send the reply as it comes, until its end or until this client leaves. False where there was none to send."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def pass_on() -> bool:
        is_begun = False
        async with aclosing(run.read()) as messages:
            async for message in messages:
                is_begun = True
                is_head = message["type"] == "http.response.start"
                await send({**message, "headers": [*message["headers"], *fields]} if is_head else message)
        return is_begun

    with run.reader():  # from the moment on that the run was found: nothing is awaited in between
        tasks = telling, _ = asyncio.create_task(pass_on()), asyncio.create_task(leave())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_left = not telling.done()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return has_left or telling.result()


def _digest(scope: Scope) -> bytes:
    """What makes a request the same: its path, its query and the bytes of its body."""
    target = get_route_path(scope).encode() + b"?" + scope.get("query_string", b"")
    return hashlib.sha256(hashlib.sha256(target).digest() + body_of(scope).raw).digest()

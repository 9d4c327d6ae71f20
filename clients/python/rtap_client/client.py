"""``RTAP`` and ``AsyncRTAP``: the openai SDK's clients with ``rtap=`` in chat calls and ``.rtap`` in their results.

Connections, retries, time limits and everything else stay the SDK's; what is added is types and the server's own three
routes. Nothing here reads streams (``streams.py``).
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast, overload

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai.resources.chat import AsyncChat, AsyncCompletions, Chat, Completions
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from typing_extensions import Unpack

from rtap_client.types import ChatChunk, ChatReply, Feedback, RtapOptions, Score, ServerConfig

DEFAULT_URL = "http://127.0.0.1:8000"
IDEMPOTENCY_HEADER = "Idempotency-Key"
_T = TypeVar("_T")


class ChatOptions(CompletionCreateParamsBase, total=False):
    """All that the SDK's ``chat.completions.create`` takes, except ``stream``, and ``rtap``."""

    rtap: RtapOptions | None
    extra_headers: Mapping[str, str] | None
    extra_query: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None
    timeout: float | None


def address(url: str | None) -> str:
    """The base URL of an API, from an address with or without ``/v1``; by default ``RTAP_URL``, else this machine."""
    root = (url or os.environ.get("RTAP_URL") or DEFAULT_URL).rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def _key(given: Any) -> Any:
    """A server without keys takes any, and the SDK insists on one."""
    return given or os.environ.get("RTAP_API_KEY") or "none"


def _body(options: Mapping[str, Any]) -> dict[str, Any]:
    """The SDK's arguments: ``rtap`` travels in ``extra_body``."""
    rest = {name: value for name, value in options.items() if name != "rtap"}
    if options.get("rtap") is not None:
        rest["extra_body"] = {**(rest.get("extra_body") or {}), "rtap": options["rtap"]}
    return rest


def _typed(cast_to: type[_T]) -> type[_T]:
    """Our reading of what the SDK would read as a chat completion."""
    return cast(type[_T], ChatReply) if cast_to is ChatCompletion else cast_to


class RTAP(OpenAI):
    """A client of an rtap server.

        client = RTAP()                               # RTAP_URL, else http://127.0.0.1:8000
        reply = client.chat.completions.create(
            model="rtap",
            messages=[{"role": "user", "content": "make 82 from 3, 7, 25"}],
            rtap={"threshold": 0.8, "max_cycles": 4},
        )
        reply.choices[0].message.content, reply.rtap.confidence, reply.rtap.stop_reason

    ``base_url`` may come without ``/v1``. Keys: ``api_key``, else ``RTAP_API_KEY``. All else is the SDK's: a request
    that fails or is told to come again (429, 503 with Retry-After) is repeated ``max_retries`` times (2), with one
    Idempotency-Key, so that the server does its work once. Without repeats (0) there is no such key, and a request
    whose connection closes ends at once; with it the server waits a second for the repeat.
    """

    def __init__(self, base_url: Any = None, *, api_key: Any = None, **options: Any) -> None:
        super().__init__(
            base_url=address(None if base_url is None else str(base_url)), api_key=_key(api_key), **options
        )
        self._idempotency_header = IDEMPOTENCY_HEADER if self.max_retries else None

    @property
    def chat(self) -> "RtapChat":
        """Chat completions."""
        return RtapChat(self)

    def score(self, question: str, answer: str, *, think: str = "") -> Score:
        """How sure the server's generator is of a Think–Answer pair that was written elsewhere."""
        return self.post("/rtap/score", body={"question": question, "think": think, "answer": answer}, cast_to=Score)

    def feedback(self, request_id: str, *, correct: bool, choice: int = 0) -> Feedback:
        """Say whether an answer was right. request_id: the ``id`` of its reply."""
        body = {"request_id": request_id, "correct": correct, "choice": choice}
        return self.post("/rtap/feedback", body=body, cast_to=Feedback)

    def config(self) -> ServerConfig:
        """How the server recurses: its models, defaults and ceilings."""
        return self.get("/rtap/config", cast_to=ServerConfig)

    def post(self, path: str, *, cast_to: Any, stream_cls: Any = None, **options: Any) -> Any:
        """The SDK's, with chat completions read as ours."""
        stream_cls = Stream[ChatChunk] if stream_cls == Stream[ChatCompletionChunk] else stream_cls
        return super().post(path, cast_to=_typed(cast_to), stream_cls=stream_cls, **options)


class RtapChat(Chat):
    """The SDK's ``client.chat``."""

    @property
    def completions(self) -> "RtapCompletions":
        """Chat completions."""
        return RtapCompletions(self._client)


class RtapCompletions(Completions):
    """The SDK's ``client.chat.completions``."""

    @overload
    def create(self, *, stream: Literal[False] | None = None, **options: Unpack[ChatOptions]) -> ChatReply: ...

    @overload
    def create(self, *, stream: Literal[True], **options: Unpack[ChatOptions]) -> Stream[ChatChunk]: ...

    @overload
    def create(self, *, stream: bool, **options: Unpack[ChatOptions]) -> ChatReply | Stream[ChatChunk]: ...

    def create(  # pyright: ignore[reportIncompatibleMethodOverride] - the SDK spells 40 parameters out
        self, *, stream: bool | None = None, **options: Any
    ) -> ChatReply | Stream[ChatChunk]:
        """The SDK's, with ``rtap=``."""
        return cast(Any, super().create)(**_body(options), **({} if stream is None else {"stream": stream}))


class AsyncRTAP(AsyncOpenAI):
    """``RTAP`` for asyncio. Cancelling a task that awaits a reply closes its connection, and the server stops."""

    def __init__(self, base_url: Any = None, *, api_key: Any = None, **options: Any) -> None:
        super().__init__(
            base_url=address(None if base_url is None else str(base_url)), api_key=_key(api_key), **options
        )
        self._idempotency_header = IDEMPOTENCY_HEADER if self.max_retries else None

    @property
    def chat(self) -> "AsyncRtapChat":
        """Chat completions."""
        return AsyncRtapChat(self)

    async def score(self, question: str, answer: str, *, think: str = "") -> Score:
        """How sure the server's generator is of a Think–Answer pair that was written elsewhere."""
        body = {"question": question, "think": think, "answer": answer}
        return await self.post("/rtap/score", body=body, cast_to=Score)

    async def feedback(self, request_id: str, *, correct: bool, choice: int = 0) -> Feedback:
        """Say whether an answer was right. request_id: the ``id`` of its reply."""
        body = {"request_id": request_id, "correct": correct, "choice": choice}
        return await self.post("/rtap/feedback", body=body, cast_to=Feedback)

    async def config(self) -> ServerConfig:
        """How the server recurses: its models, defaults and ceilings."""
        return await self.get("/rtap/config", cast_to=ServerConfig)

    async def post(self, path: str, *, cast_to: Any, stream_cls: Any = None, **options: Any) -> Any:
        """The SDK's, with chat completions read as ours."""
        stream_cls = AsyncStream[ChatChunk] if stream_cls == AsyncStream[ChatCompletionChunk] else stream_cls
        return await super().post(path, cast_to=_typed(cast_to), stream_cls=stream_cls, **options)


class AsyncRtapChat(AsyncChat):
    """The SDK's ``client.chat``."""

    @property
    def completions(self) -> "AsyncRtapCompletions":
        """Chat completions."""
        return AsyncRtapCompletions(self._client)


class AsyncRtapCompletions(AsyncCompletions):
    """The SDK's ``client.chat.completions``."""

    @overload
    async def create(self, *, stream: Literal[False] | None = None, **options: Unpack[ChatOptions]) -> ChatReply: ...

    @overload
    async def create(self, *, stream: Literal[True], **options: Unpack[ChatOptions]) -> AsyncStream[ChatChunk]: ...

    @overload
    async def create(self, *, stream: bool, **options: Unpack[ChatOptions]) -> ChatReply | AsyncStream[ChatChunk]: ...

    async def create(  # pyright: ignore[reportIncompatibleMethodOverride] - the SDK spells 40 parameters out
        self, *, stream: bool | None = None, **options: Any
    ) -> ChatReply | AsyncStream[ChatChunk]:
        """The SDK's, with ``rtap=``."""
        return await cast(Any, super().create)(**_body(options), **({} if stream is None else {"stream": stream}))

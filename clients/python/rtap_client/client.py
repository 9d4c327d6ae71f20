"""Sync and async clients: the openai SDK with ``rtap=`` in chat calls, ``.rtap`` in replies, and rtap's own routes.

Connections, retries and timeouts are the SDK's. Streams are read in ``streams.py``.
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
_T = TypeVar("_T")


class ChatOptions(CompletionCreateParamsBase, total=False):
    """Arguments of the SDK's ``chat.completions.create`` except ``stream``, and ``rtap``."""

    rtap: RtapOptions | None
    extra_headers: Mapping[str, str] | None
    extra_query: Mapping[str, object] | None
    extra_body: Mapping[str, object] | None
    timeout: float | None


def api_url(url: str | None) -> str:
    """Return the API's base URL for an address with or without ``/v1``. Default: ``RTAP_URL``, else this machine."""
    root = (url or os.environ.get("RTAP_URL") or DEFAULT_URL).rstrip("/")
    return root if root.endswith("/v1") else f"{root}/v1"


def _with_defaults(base_url: Any, api_key: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the SDK's constructor. The SDK requires a key; a server without keys accepts any."""
    key = api_key or os.environ.get("RTAP_API_KEY") or "none"
    return {**options, "base_url": api_url(None if base_url is None else str(base_url)), "api_key": key}


def _sdk_arguments(options: Mapping[str, Any], stream: bool | None) -> dict[str, Any]:
    """Arguments of the SDK's ``create``: ``rtap`` moves into ``extra_body``."""
    arguments = {name: value for name, value in options.items() if name != "rtap"}
    if options.get("rtap") is not None:
        arguments["extra_body"] = {**(arguments.get("extra_body") or {}), "rtap": options["rtap"]}
    return arguments if stream is None else {**arguments, "stream": stream}


def _reply_type(cast_to: type[_T]) -> type[_T]:
    return cast(type[_T], ChatReply) if cast_to is ChatCompletion else cast_to


def _score_body(question: str, answer: str, think: str) -> dict[str, str]:
    return {"question": question, "think": think, "answer": answer}


def _feedback_body(request_id: str, correct: bool, choice: int) -> dict[str, object]:
    return {"request_id": request_id, "correct": correct, "choice": choice}


class RTAP(OpenAI):
    """Client of an rtap server.

        client = RTAP()                               # RTAP_URL, else http://127.0.0.1:8000
        reply = client.chat.completions.create(
            model="rtap",
            messages=[{"role": "user", "content": "make 82 from 3, 7, 25"}],
            rtap={"threshold": 0.8, "max_cycles": 4},
        )
        reply.choices[0].message.content, reply.rtap.confidence, reply.rtap.stop_reason

    ``base_url``: with or without ``/v1``. ``api_key``: by default ``RTAP_API_KEY``. All other arguments are the SDK's.
    The SDK retries a failed request ``max_retries`` times (default 2) and honours Retry-After on 429 and 503. Each
    retry is a new request to the server.
    """

    def __init__(self, base_url: Any = None, *, api_key: Any = None, **options: Any) -> None:
        super().__init__(**_with_defaults(base_url, api_key, options))

    @property
    def chat(self) -> "RtapChat":
        """Chat completions."""
        return RtapChat(self)

    def score(self, question: str, answer: str, *, think: str = "") -> Score:
        """Score an existing answer with the server's confidence generator."""
        return self.post("/rtap/score", body=_score_body(question, answer, think), cast_to=Score)

    def feedback(self, request_id: str, *, correct: bool, choice: int = 0) -> Feedback:
        """Report whether an answer was correct. request_id: the reply's ``id``."""
        return self.post("/rtap/feedback", body=_feedback_body(request_id, correct, choice), cast_to=Feedback)

    def config(self) -> ServerConfig:
        """Return the server's models, defaults and limits."""
        return self.get("/rtap/config", cast_to=ServerConfig)

    def post(self, path: str, *, cast_to: Any, stream_cls: Any = None, **options: Any) -> Any:
        """The SDK's ``post``, with chat completions parsed as ChatReply and ChatChunk."""
        stream_cls = Stream[ChatChunk] if stream_cls == Stream[ChatCompletionChunk] else stream_cls
        return super().post(path, cast_to=_reply_type(cast_to), stream_cls=stream_cls, **options)


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
        """The SDK's ``create``, with ``rtap=``."""
        return cast(Any, super().create)(**_sdk_arguments(options, stream))


class AsyncRTAP(AsyncOpenAI):
    """``RTAP`` for asyncio. Cancelling a task that awaits a reply closes its connection, and the server aborts."""

    def __init__(self, base_url: Any = None, *, api_key: Any = None, **options: Any) -> None:
        super().__init__(**_with_defaults(base_url, api_key, options))

    @property
    def chat(self) -> "AsyncRtapChat":
        """Chat completions."""
        return AsyncRtapChat(self)

    async def score(self, question: str, answer: str, *, think: str = "") -> Score:
        """Score an existing answer with the server's confidence generator."""
        return await self.post("/rtap/score", body=_score_body(question, answer, think), cast_to=Score)

    async def feedback(self, request_id: str, *, correct: bool, choice: int = 0) -> Feedback:
        """Report whether an answer was correct. request_id: the reply's ``id``."""
        return await self.post("/rtap/feedback", body=_feedback_body(request_id, correct, choice), cast_to=Feedback)

    async def config(self) -> ServerConfig:
        """Return the server's models, defaults and limits."""
        return await self.get("/rtap/config", cast_to=ServerConfig)

    async def post(self, path: str, *, cast_to: Any, stream_cls: Any = None, **options: Any) -> Any:
        """The SDK's ``post``, with chat completions parsed as ChatReply and ChatChunk."""
        stream_cls = AsyncStream[ChatChunk] if stream_cls == AsyncStream[ChatCompletionChunk] else stream_cls
        return await super().post(path, cast_to=_reply_type(cast_to), stream_cls=stream_cls, **options)


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
        """The SDK's ``create``, with ``rtap=``."""
        return await cast(Any, super().create)(**_sdk_arguments(options, stream))

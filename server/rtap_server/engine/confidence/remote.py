"""Confidence from a vLLM ``/classify`` server."""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, cast

import httpx

from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import CircuitBreaker, check_length, probability, refuse_images
from rtap_server.engine.confidence.inputs import Input, Message, TemplateRefused, read_token_ids
from rtap_server.engine.output_writer import GenerateCall
from rtap_server.engine.request_state import salted_prompt

# Text that tokenizers encode differently: tags, digits, spaces, a letter outside ASCII.
PROBE = "<think>12 * 9 = 108 é</think><answer>108</answer>"
_NO_REPLY = (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


class RemoteConfidence:
    """A vLLM server with ``/classify``, which receives token ids."""

    def __init__(
        self,
        address: str,
        timeout_seconds: float,
        client: httpx.AsyncClient,
        max_model_len: int,
        input_of: Input = read_token_ids,
    ) -> None:
        """max_model_len: the server's context in tokens. input_of: what the server reads."""
        self._address, self._timeout_seconds, self._client = address.rstrip("/"), timeout_seconds, client
        self._max_model_len, self._input_of, self._breaker = max_model_len, input_of, CircuitBreaker()

    async def score(self, judged: Judged) -> Score:
        """One request to the remote server, and one more to tokenise a chat."""
        refuse_images(judged)
        with self._breaker.attempt():
            try:
                async with asyncio.timeout(self._timeout_seconds):  # httpx's timeouts are per read
                    read = await self._input_of(judged)
                    check_length(read, self._max_model_len)
                    return Score(await self._classify(read, _trace_headers(judged.request)), len(read))
            except (TimeoutError, httpx.TimeoutException) as error:
                raise ConfidenceError("the remote generator timed out", reason="timeout") from error
            except _NO_REPLY as error:
                raise ConfidenceError(f"the remote generator failed: {type(error).__name__}") from error

    async def _classify(self, read: Sequence[int], headers: dict[str, str]) -> float:
        reply = await self._client.post(
            f"{self._address}/classify",
            json=salted_prompt({"input": [list(read)], "use_activation": False}),
            headers=headers,
            timeout=None,
        )
        reply.raise_for_status()
        return probability([float(logit) for logit in reply.json()["data"][0]["probs"]])

    async def check(self, judged: Judged) -> None:
        """Raise ConfigError when the server refuses to score ``judged``. A slow one may be starting."""
        try:
            await self.score(judged)
        except ConfidenceError as error:
            if error.reason != "timeout":
                raise ConfigError(
                    f"{self._address}/classify gives no score: {error}; serve a classifier of one label (right) or two "
                    "(wrong, right) with `vllm serve CHECKPOINT --runner pooling`"
                ) from error


class RemoteTokenizer:
    """ChatTokenizer of a vLLM server: the server renders and tokenises."""

    def __init__(self, address: str, client: httpx.AsyncClient) -> None:
        self._address, self._client = address.rstrip("/"), client

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        body = {"messages": list(messages), "add_generation_prompt": False}
        reply = await self._client.post(f"{self._address}/tokenize", json=body, timeout=None)
        if reply.status_code == HTTPStatus.BAD_REQUEST:
            raise TemplateRefused
        return _tokens(reply)

    async def text(self, text: str) -> list[int]:
        return _tokens(await self._client.post(f"{self._address}/tokenize", json={"prompt": text}, timeout=None))

    async def check(self) -> tuple[list[int], int]:
        """Token ids of PROBE, and the server's context length. Raises ConfigError when no server answers."""
        body = {"prompt": PROBE, "add_special_tokens": False}
        try:
            reply = await self._client.post(f"{self._address}/tokenize", json=body, timeout=10.0)
            return _tokens(reply), int(reply.json()["max_model_len"])
        except _NO_REPLY as error:
            raise ConfigError(
                f"no vLLM classify server answers at {self._address} ({type(error).__name__}); "
                "start it with `vllm serve CHECKPOINT --runner pooling`"
            ) from error


def _tokens(reply: httpx.Response) -> list[int]:
    reply.raise_for_status()
    body: Any = reply.json()
    return cast(list[int], body["tokens"])


def _trace_headers(call: GenerateCall | None) -> dict[str, str]:
    """Trace headers that make the remote server's spans part of the request's trace."""
    return {} if call is None else dict(call.options.get("trace_headers") or {})

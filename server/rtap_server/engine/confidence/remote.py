"""Confidence from a vLLM ``/classify`` server."""

import asyncio
from collections.abc import Sequence
from typing import cast

import httpx

from rtap_core.errors import ConfidenceError, ConfigError
from rtap_core.types import Judged, Score
from rtap_server.engine.confidence import CircuitBreaker, refuse_images
from rtap_server.engine.output_writer import GenerateCall
from rtap_server.engine.request_state import salted_prompt

# Text that tokenizers encode differently: tags, digits, spaces, a letter outside ASCII.
PROBE = "<think>12 * 9 = 108 é</think><answer>108</answer>"


class RemoteConfidence:
    """A vLLM server with ``/classify``. It receives token ids, so it must share the policy's tokenizer."""

    def __init__(self, address: str, timeout_seconds: float, client: httpx.AsyncClient) -> None:
        self._address, self._timeout_seconds, self._client = address.rstrip("/"), timeout_seconds, client
        self._breaker = CircuitBreaker()

    async def score(self, judged: Judged) -> Score:
        """One request to the remote server."""
        refuse_images(judged)
        token_ids = [*judged.question_token_ids, *judged.cycle_token_ids]
        with self._breaker.attempt():
            probability = await self._classify(token_ids, _trace_headers(judged.request))
        return Score(probability, len(token_ids))

    async def _classify(self, token_ids: list[int], headers: dict[str, str]) -> float:
        try:
            async with asyncio.timeout(self._timeout_seconds):  # httpx's timeouts are per read
                reply = await self._client.post(
                    f"{self._address}/classify",
                    json=salted_prompt({"input": [token_ids]}),
                    headers=headers,
                    timeout=None,
                )
            reply.raise_for_status()
            probability = float(reply.json()["data"][0]["probs"][-1])
        except (TimeoutError, httpx.TimeoutException) as error:
            raise ConfidenceError("the remote generator timed out", reason="timeout") from error
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError, LookupError, TypeError) as error:
            raise ConfidenceError(f"the remote generator failed: {type(error).__name__}") from error
        if not 0.0 <= probability <= 1.0:
            raise ConfidenceError(f"the remote generator sent {probability}, which is not a probability")
        return probability

    async def check(self, encode_ids: Sequence[int]) -> None:
        """Raise ConfigError unless the server answers and tokenises like the policy. encode_ids: of PROBE."""
        try:
            reply = await self._client.post(
                f"{self._address}/tokenize", json={"prompt": PROBE, "add_special_tokens": False}, timeout=10.0
            )
            reply.raise_for_status()
            tokens = cast(list[int], reply.json()["tokens"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"no vLLM classify server answers at {self._address} ({type(error).__name__}); "
                "start it with `vllm serve CHECKPOINT --runner pooling`"
            ) from error
        if tokens != list(encode_ids):
            raise ConfigError(
                f"the generator at {self._address} and the policy have different tokenizers; use a generator trained "
                "for this policy"
            )


def _trace_headers(call: GenerateCall | None) -> dict[str, str]:
    """Trace headers that make the remote server's spans part of the request's trace."""
    return {} if call is None else dict(call.options.get("trace_headers") or {})

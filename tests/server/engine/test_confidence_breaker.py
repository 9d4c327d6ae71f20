"""Requests do not wait one by one for a generator that does not answer, in this server or behind an address."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from rtap_core.errors import ConfidenceError
from rtap_core.types import Confidence, Judged
from rtap_server.engine.confidence.pooling import PoolingConfidence
from rtap_server.engine.confidence.remote import RemoteConfidence

JUDGED = Judged([1, 2], [3], [1, 2])
TIMEOUT_SECONDS = 0.3


class Generator:
    """An engine and a transport that answer while ``is_silent`` is False."""

    is_silent = False
    waiting = 0

    async def answer(self) -> None:
        self.waiting += 1
        try:
            while self.is_silent:
                await asyncio.sleep(0.01)
        finally:
            self.waiting -= 1

    async def encode(self, *_: Any) -> AsyncIterator[Any]:
        await self.answer()
        yield SimpleNamespace(finished=True, outputs=SimpleNamespace(data=[0.5]))

    async def respond(self, _: httpx.Request) -> httpx.Response:
        await self.answer()
        return httpx.Response(200, json={"data": [{"probs": [0.5]}]})


@asynccontextmanager
async def confidence_of(kind: str, generator: Generator) -> AsyncIterator[Confidence]:
    async with httpx.AsyncClient(transport=httpx.MockTransport(generator.respond)) as client:
        if kind == "remote":
            yield RemoteConfidence("http://generator", TIMEOUT_SECONDS, client, 1000)
        else:
            supervised: Any = SimpleNamespace(engine=generator)
            yield PoolingConfidence(supervised, TIMEOUT_SECONDS, 100)


async def seconds_and_reason(confidence: Confidence) -> tuple[float, str | None]:
    began = time.monotonic()
    try:
        await confidence.score(JUDGED)
    except ConfidenceError as error:
        return time.monotonic() - began, error.reason
    return time.monotonic() - began, None


@pytest.mark.parametrize("kind", ["pooling", "remote"])
async def test_after_a_timeout_one_request_at_a_time_waits_until_the_generator_answers(kind):
    generator = Generator()
    async with confidence_of(kind, generator) as confidence:

        async def scores(count: int) -> list[tuple[float, str | None]]:
            return sorted(await asyncio.gather(*(seconds_and_reason(confidence) for _ in range(count))))

        generator.is_silent = True
        assert [reason for _, reason in await scores(8)] == ["timeout"] * 8
        for _ in range(2):
            taken = await scores(8)
            assert [reason for _, reason in taken] == ["timeout"] * 8
            assert [seconds > TIMEOUT_SECONDS / 2 for seconds, _ in taken] == [False] * 7 + [True]
        trial = asyncio.create_task(seconds_and_reason(confidence))
        await asyncio.sleep(TIMEOUT_SECONDS / 10)
        trial.cancel()  # the client leaves
        await asyncio.gather(trial, return_exceptions=True)
        trial = asyncio.create_task(seconds_and_reason(confidence))
        await asyncio.sleep(TIMEOUT_SECONDS / 10)
        assert generator.waiting == 1
        generator.is_silent = False
        assert (await trial)[1] is None
        assert [reason for _, reason in await scores(8)] == [None] * 8


async def test_an_error_is_an_answer():
    """A refused connection takes no time, so that every request may try."""
    num_calls = 0

    async def refuse(_: httpx.Request) -> httpx.Response:
        nonlocal num_calls
        num_calls += 1
        raise httpx.ConnectError("refused")

    async with httpx.AsyncClient(transport=httpx.MockTransport(refuse)) as client:
        confidence = RemoteConfidence("http://generator", TIMEOUT_SECONDS, client, 1000)
        taken = await asyncio.gather(*(seconds_and_reason(confidence) for _ in range(8)))
    assert {reason for _, reason in taken} == {"error"}
    assert num_calls == 8

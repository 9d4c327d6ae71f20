"""Load generator of the overload benchmark: whole chat requests, from so many clients or at such a rate.

A server that is full is asked like any other; what it refuses properly is counted apart.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np


@dataclass(frozen=True, slots=True)
class Load:
    """One phase. completed, refused: milliseconds of each. late: of sending, against when it was to be. wrong: replies
    that are neither an answer nor a 503 with Retry-After."""

    seconds: float
    completed: tuple[float, ...]
    refused: tuple[float, ...] = ()
    late: tuple[float, ...] = ()
    wrong: tuple[str, ...] = ()


@dataclass(slots=True)
class Clients:
    """They ask one server for answers, with the same bodies in turn."""

    session: aiohttp.ClientSession
    url: str
    bodies: Sequence[bytes]
    asked: int = 0

    async def one(self, completed: list[float], refused: list[float], wrong: list[str]) -> None:
        """Ask once."""
        body = self.bodies[self.asked % len(self.bodies)]
        self.asked += 1
        began = time.perf_counter()
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", data=body) as reply:
                content = await reply.read()
        except aiohttp.ClientError as error:
            wrong.append(f"{type(error).__name__}: {error}")
            return
        took = 1000 * (time.perf_counter() - began)
        if reply.status == 200 and b'"stop_reason"' in content:
            completed.append(took)
        elif reply.status == 503 and reply.headers.get("Retry-After", "").isdigit():
            refused.append(took)
        else:
            wrong.append(f"{reply.status}: {content[:200]!r}")

    async def closed(self, clients: int, seconds: float) -> Load:
        """So many, each asking again as soon as it is answered; what is answered after the end does not count."""
        completed, refused, wrong = list[float](), list[float](), list[str]()
        began = time.perf_counter()

        async def ask() -> None:
            while time.perf_counter() - began < seconds:
                await self.one(completed, refused, wrong)

        tasks = [asyncio.create_task(ask()) for _ in range(clients)]
        await asyncio.sleep(seconds)
        counted = Load(time.perf_counter() - began, tuple(completed), tuple(refused), (), tuple(wrong))
        await asyncio.gather(*tasks)
        return counted

    async def opened(self, rate: float, seconds: float, seed: int) -> Load:
        """Arrivals at random, ``rate`` a second, whatever has become of those before."""
        completed, refused, wrong, late = list[float](), list[float](), list[str](), list[float]()
        chance, tasks = random.Random(seed), list[asyncio.Task[None]]()
        began = time.perf_counter()
        due = 0.0
        while (due := due + chance.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            late.append(1000 * (time.perf_counter() - began - due))
            tasks.append(asyncio.create_task(self.one(completed, refused, wrong)))
        counted = Load(time.perf_counter() - began, tuple(completed), tuple(refused), tuple(late), tuple(wrong))
        await asyncio.gather(*tasks)
        return counted


def rate_of(loads: Sequence[Load]) -> float:
    """Completed requests a second of all loads together."""
    return sum(len(one.completed) for one in loads) / sum(one.seconds for one in loads)


def p99_of(loads: Sequence[Load]) -> float:
    """Milliseconds, of completed requests of all loads together."""
    return float(np.percentile(np.concatenate([one.completed for one in loads]), 99))


def open_session() -> aiohttp.ClientSession:
    """As many connections as are wanted."""
    headers = {"content-type": "application/json"}
    return aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    )

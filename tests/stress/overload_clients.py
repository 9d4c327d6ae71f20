"""Clients of the overload test: whole chat requests, in a closed loop or at a Poisson rate.

Refusals (503 with Retry-After) are counted apart from answers. ``vllm bench serve`` counts them as failures.
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
    """One phase. completed, refused: latencies in milliseconds. late: delay of sending against the schedule.

    wrong: replies that are neither an answer nor a 503 with Retry-After."""

    seconds: float
    completed: tuple[float, ...]
    refused: tuple[float, ...] = ()
    late: tuple[float, ...] = ()
    wrong: tuple[str, ...] = ()


@dataclass(slots=True)
class Clients:
    """Clients of one server, with the same bodies in turn."""

    session: aiohttp.ClientSession
    url: str
    bodies: Sequence[bytes]
    sent: int = 0

    async def one(self, completed: list[float], refused: list[float], wrong: list[str]) -> None:
        """Send one request."""
        body = self.bodies[self.sent % len(self.bodies)]
        self.sent += 1
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
        """A closed loop of ``clients``; replies after the end do not count."""
        completed, refused, wrong = list[float](), list[float](), list[str]()
        began = time.perf_counter()

        async def loop() -> None:
            while time.perf_counter() - began < seconds:
                await self.one(completed, refused, wrong)

        tasks = [asyncio.create_task(loop()) for _ in range(clients)]
        await asyncio.sleep(seconds)
        counted = Load(time.perf_counter() - began, tuple(completed), tuple(refused), (), tuple(wrong))
        await asyncio.gather(*tasks)
        return counted

    async def opened(self, rate: float, seconds: float, seed: int) -> Load:
        """Poisson arrivals, ``rate`` a second."""
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
    """Completed requests per second of all loads together."""
    return sum(len(one.completed) for one in loads) / sum(one.seconds for one in loads)


def p99_of(loads: Sequence[Load]) -> float:
    """99th percentile of completed requests of all loads together, in milliseconds."""
    return float(np.percentile(np.concatenate([one.completed for one in loads]), 99))


def open_session() -> aiohttp.ClientSession:
    """A session without a limit on connections."""
    headers = {"content-type": "application/json"}
    return aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    )

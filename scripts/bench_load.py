"""Load generator of the benchmarks: streaming chat requests, a fixed number at a time, as little client work as can be.

The client shares the machine with the servers it measures, so events are not parsed while the clock runs: bytes are
searched until the first text that is no tag, then only kept; usage is read after the load has ended.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

# The first chunk, which has the role and no text: what vLLM's own benchmark and most clients take the time to. Then the
# first text of any kind, and first text that is not the opening tag: a server that splits reasoning from content does
# not send the tag, so the first kind comes one token later from it although both are equally fast.
ANY_CHUNK = re.compile(rb"^data: ", re.MULTILINE)
ANY_TEXT = re.compile(rb'"(?:content|reasoning)":"(?!")')
ANY_WORD = re.compile(rb'"(?:content|reasoning)":"(?!"|<think>")')
MARKS = {"first_chunk": ANY_CHUNK, "first_text": ANY_TEXT, "first_word": ANY_WORD}
USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True, slots=True)
class Load:
    """One closed-loop load on one server. first_chunk, first_text, first_word: seconds, one entry for each reply that
    has any."""

    seconds: float
    num_requests: int
    tokens: int
    first_chunk: tuple[float, ...]
    first_text: tuple[float, ...]
    first_word: tuple[float, ...]
    errors: tuple[str, ...]


def open_session() -> aiohttp.ClientSession:
    """For ``load``: any number at a time, and no limit but on silence."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers={"Content-Type": "application/json"})


async def load(session: aiohttp.ClientSession, url: str, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> Load:
    """Send all bodies, ``concurrency`` at a time, the next as soon as one is answered."""
    payloads = iter([json.dumps(body).encode() for body in bodies])
    seen: dict[str, list[float]] = {name: [] for name in MARKS}
    tails: list[bytes] = []
    errors: list[str] = []

    async def work() -> None:
        for payload in payloads:
            try:
                first, tail = await _stream(session, url, payload)
            except (aiohttp.ClientError, _Refused) as error:
                errors.append(f"{type(error).__name__}: {error}")
                continue
            tails.append(tail)
            for name, seconds in first.items():  # a model may end its turn at once, without any text
                seen[name].append(seconds)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    tokens = sum(int(found[-1]) for tail in tails if (found := USAGE.findall(tail)))
    firsts = {name: tuple(times) for name, times in seen.items()}
    return Load(seconds, len(tails), tokens, **firsts, errors=tuple(errors))


class _Refused(Exception):
    """No stream, or one without an end."""


async def _stream(session: aiohttp.ClientSession, url: str, payload: bytes) -> tuple[dict[str, float], bytes]:
    """Seconds to the first of each of MARKS that there is, and the last bytes. Raises _Refused, aiohttp.ClientError."""
    first: dict[str, float] = {}
    tail = b""
    start = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=payload) as response:
        async for piece in response.content.iter_any():
            if len(first) < len(MARKS):
                now = time.perf_counter() - start
                first |= {name: now for name, mark in MARKS.items() if name not in first and mark.search(piece)}
            tail = (tail + piece)[-4096:]
    if response.status != 200 or not tail.rstrip().endswith(b"[DONE]"):
        raise _Refused(f"HTTP {response.status}: {tail[:300].decode(errors='replace')}")
    return first, tail

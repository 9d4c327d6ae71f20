"""Load generator of the benchmarks: streaming chat requests, a fixed number at a time, as little client work as can be.

The client shares the machine with the servers it measures, so events are not parsed while the clock runs: bytes are
searched until the first text, then only kept; usage is read after the load has ended.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

# First text of any kind, and first text that is not the opening tag: a server that splits reasoning from content does
# not send the tag, so the first kind comes one token later from it although both are equally fast.
ANY_TEXT = re.compile(rb'"(?:content|reasoning)":"(?!")')
ANY_WORD = re.compile(rb'"(?:content|reasoning)":"(?!"|<think>")')
USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass(frozen=True, slots=True)
class Load:
    """One closed-loop load on one server. first_text, first_word: seconds, one entry for each reply that has any."""

    seconds: float
    num_requests: int
    tokens: int
    first_text: tuple[float, ...]
    first_word: tuple[float, ...]
    errors: tuple[str, ...]


async def load(session: aiohttp.ClientSession, url: str, bodies: Sequence[Mapping[str, Any]], concurrency: int) -> Load:
    """Send all bodies, ``concurrency`` at a time, the next as soon as one is answered."""
    payloads = iter([json.dumps(body).encode() for body in bodies])
    texts: list[float] = []
    words: list[float] = []
    tails: list[bytes] = []
    errors: list[str] = []

    async def work() -> None:
        for payload in payloads:
            await _stream(session, url, payload, texts, words, tails, errors)

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    tokens = sum(int(found[-1]) for tail in tails if (found := USAGE.findall(tail)))
    return Load(seconds, len(tails), tokens, tuple(texts), tuple(words), tuple(errors))


async def _stream(
    session: aiohttp.ClientSession,
    url: str,
    payload: bytes,
    texts: list[float],
    words: list[float],
    tails: list[bytes],
    errors: list[str],
) -> None:
    text = word = None
    tail = b""
    start = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/chat/completions", data=payload) as response:
            async for piece in response.content.iter_any():
                if word is None:
                    if text is None and ANY_TEXT.search(piece):
                        text = time.perf_counter() - start
                    if ANY_WORD.search(piece):
                        word = time.perf_counter() - start
                tail = (tail + piece)[-4096:]
    except aiohttp.ClientError as error:
        errors.append(f"{type(error).__name__}: {error}")
        return
    if response.status != 200 or not tail.rstrip().endswith(b"[DONE]"):
        errors.append(f"HTTP {response.status}: {tail[:300].decode(errors='replace')}")
        return
    tails.append(tail)
    if text is not None:  # a model may end its turn at once
        texts.append(text)
    if word is not None:
        words.append(word)

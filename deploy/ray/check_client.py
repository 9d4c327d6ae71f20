"""A client of a fleet for scripts/check_ray.py: asks, notes which replica answered and how each reply ended."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

CONCURRENT = 16


@dataclass(frozen=True, slots=True)
class Told:
    """One reply as its client saw it. ending: done; error, a stream that said so; cut, one that did not."""

    status: int
    replica: str
    ending: str
    seconds: float
    tokens: int = 0
    cached: int = 0
    text: str = ""


class Client:
    """Asks the fleet."""

    def __init__(self, url: str, *, socket: str | None = None, key: str = "client-key") -> None:
        transport = None if socket is None else httpx.AsyncHTTPTransport(uds=socket)
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, transport=transport, timeout=120, limits=limits)
        self._headers = {"authorization": f"Bearer {key}"}

    async def ask(
        self,
        question: str,
        seed: int,
        *,
        stream: bool = False,
        session: str = "",
        turns: Sequence[Any] = (),
        **rtap: Any,
    ) -> Told:
        """One chat request."""
        messages = [{"role": "user", "content": question}, *turns]
        body = {"model": "rtap", "messages": messages, "seed": seed, "stream": stream, "rtap": rtap}
        headers = {**self._headers, **({"x-session-id": session} if session else {})}
        began = time.monotonic()
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            try:
                data = await reply.aread()
            except httpx.HTTPError:
                return Told(reply.status_code, "", "cut", time.monotonic() - began)
        seconds, replica = time.monotonic() - began, reply.headers.get("x-rtap-replica", "")
        if stream and reply.status_code == 200:
            failed = b'"overloaded_error"' in data
            ending = "error" if failed else "done" if data.endswith(b"data: [DONE]\n\n") else "cut"
            return Told(200, replica, ending, seconds)
        told = json.loads(data)
        cycles = told.get("rtap", {}).get("cycles", [])
        return Told(
            reply.status_code, replica, "done", seconds,
            tokens=sum(c["tokens"] + c["prompt_tokens"] - c["cached_tokens"] for c in cycles),
            cached=sum(c["cached_tokens"] for c in cycles[:1]),
            text=told["choices"][0]["message"]["content"] if cycles else "",
        )  # fmt: skip

    async def leave_early(self, question: str) -> None:
        """Begin a long stream and go at its first bytes."""
        long = {"threshold": 1, "max_cycles": 16}
        body = {"model": "rtap", "messages": [{"role": "user", "content": question}], "stream": True, "rtap": long}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=self._headers) as reply:
            async for _ in reply.aiter_raw():
                return

    async def many(self, jobs: Sequence[Mapping[str, Any]], concurrent: int = CONCURRENT) -> list[Told]:
        """All of them, so many at a time."""
        places = asyncio.Semaphore(concurrent)

        async def one(job: Mapping[str, Any]) -> Told:
            async with places:
                return await self.ask(**job)

        return await asyncio.gather(*map(one, jobs))

    async def get(self, path: str, key: str) -> httpx.Response:
        """A GET."""
        return await self._http.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of a series over the fleet."""
        text = (await self.get("/metrics", "metrics-key")).raise_for_status().text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


async def wait_for(client: Client, replicas: int, seconds: float = 240) -> float:
    """Seconds until so many replicas are ready."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        reply = await client.get("/ready", "")
        # 404, from Ray itself, until the application is there
        if reply.status_code == 200 and reply.json()["replicas"] == replicas:
            return time.monotonic() - began
        await asyncio.sleep(0.5)
    raise SystemExit(f"not {replicas} replicas after {seconds:.0f} s")

"""HTTP client of deploy/ray/check.py: records the replica and the ending of each reply."""

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
class ClientReply:
    """One reply. ending: "done", "error" (a stream that ended with an error event) or "cut" (one without an end)."""

    status: int
    replica: str
    ending: str
    seconds: float
    tokens: int = 0
    cached: int = 0
    text: str = ""


class Client:
    """A client of the fleet, or of one replica's socket."""

    def __init__(self, url: str, *, socket: str | None = None, key: str = "client-key") -> None:
        transport = None if socket is None else httpx.AsyncHTTPTransport(uds=socket)
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, transport=transport, timeout=120, limits=limits)
        self._headers = {"authorization": f"Bearer {key}"}

    async def chat(
        self,
        question: str,
        seed: int,
        *,
        stream: bool = False,
        session: str = "",
        turns: Sequence[Any] = (),
        **rtap: Any,
    ) -> ClientReply:
        """One chat request."""
        messages = [{"role": "user", "content": question}, *turns]
        body = {"model": "rtap", "messages": messages, "seed": seed, "stream": stream, "rtap": rtap}
        headers = {**self._headers, **({"x-session-id": session} if session else {})}
        began = time.monotonic()
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            try:
                data = await reply.aread()
            except httpx.HTTPError:
                return ClientReply(reply.status_code, "", "cut", time.monotonic() - began)
        seconds, replica = time.monotonic() - began, reply.headers.get("x-rtap-replica", "")
        if stream and reply.status_code == 200:
            failed = b'"overloaded_error"' in data
            ending = "error" if failed else "done" if data.endswith(b"data: [DONE]\n\n") else "cut"
            return ClientReply(200, replica, ending, seconds)
        body = json.loads(data)
        cycles = body.get("rtap", {}).get("cycles", [])
        return ClientReply(
            reply.status_code, replica, "done", seconds,
            tokens=sum(c["tokens"] + c["prompt_tokens"] - c["cached_tokens"] for c in cycles),
            cached=sum(c["cached_tokens"] for c in cycles[:1]),
            text=body["choices"][0]["message"]["content"] if cycles else "",
        )  # fmt: skip

    async def leave_early(self, question: str) -> None:
        """Start a long stream and disconnect at its first bytes."""
        long = {"threshold": 1, "max_cycles": 16}
        body = {"model": "rtap", "messages": [{"role": "user", "content": question}], "stream": True, "rtap": long}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=self._headers) as reply:
            async for _ in reply.aiter_raw():
                return

    async def many(self, jobs: Sequence[Mapping[str, Any]], concurrent: int = CONCURRENT) -> list[ClientReply]:
        """Send all requests, ``concurrent`` at a time."""
        limit = asyncio.Semaphore(concurrent)

        async def one(job: Mapping[str, Any]) -> ClientReply:
            async with limit:
                return await self.chat(**job)

        return await asyncio.gather(*map(one, jobs))

    async def get(self, path: str, key: str) -> httpx.Response:
        """GET a path."""
        return await self._http.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of a series over the fleet."""
        text = (await self.get("/metrics", "metrics-key")).raise_for_status().text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())


async def wait_for(client: Client, replicas: int, seconds: float = 240) -> float:
    """Seconds until this number of replicas is ready."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        reply = await client.get("/ready", "")
        # Ray answers 404 until the application runs
        if reply.status_code == 200 and reply.json()["replicas"] == replicas:
            return time.monotonic() - began
        await asyncio.sleep(0.5)
    raise SystemExit(f"not {replicas} replicas after {seconds:.0f} s")

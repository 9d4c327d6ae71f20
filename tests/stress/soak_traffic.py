"""Mixed traffic of the soak test, and a tally of what clients received.

Clients that disconnect ask for more work than fits before they leave, so that their trajectories never finish: the
server's counters must equal the trajectories that clients received.
"""

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.error_shapes import error_of

Body = dict[str, Any]
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
_MOST_TOKENS = 160
_LEAVE_SECONDS, _SHORT_SECONDS = 0.5, 0.03  # longest stay of a client that disconnects
# Seconds of work with a generator; with and without one, on endpoints that have these fields.
_LONG: Mapping[str, Any] = {"rtap": {"policy": "confidence", "threshold": 1.0, "max_cycles": 16}}
_ENDLESS: Mapping[str, Any] = {**_LONG, "ignore_eos": True, "max_tokens": 900}
_BAD: Sequence[tuple[str, bytes, int, str]] = (  # path, body, status, label of rtap_rejected_total
    (CHAT, b"{", 400, "invalid"),
    (MESSAGES, b"[" * 5000, 400, "invalid"),
    (CHAT, b'{"model": "rtap", "messages": [], "rtap": {"threshold": 2}}', 400, "invalid"),
    (COMPLETIONS, b'{"model": "rtap", "prompt": "3+4", "n": 1000}', 400, "invalid"),
    (RESPONSES, b'{"model": "rtap", "input": "3+4", "rtap": []}', 400, "invalid"),
    (CHAT, b'{"messages": "' + b"1" * 9_000_000 + b'"}', 413, "body_too_large"),
)


@dataclass(slots=True)
class Tally:
    """What clients received. trajectories: by policy and stop reason. sums: by the series that counts the same.

    left: trajectories of clients that disconnected. sent: requests by kind. errors: failures."""

    trajectories: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    sums: Counter[str] = field(default_factory=Counter[str])
    left: int = 0
    sent: Counter[str] = field(default_factory=Counter[str])
    errors: list[str] = field(default_factory=list[str])

    def take(self, trajectory: Mapping[str, Any]) -> None:
        """Count one ``rtap`` object."""
        self.trajectories[trajectory["policy"], trajectory["stop_reason"]] += 1
        cycles: list[Body] = trajectory["cycles"]
        self.sums["rtap_cycles_sum"] += len(cycles)
        self.sums["rtap_oops_tokens_total"] += sum(c["oops_tokens"] for c in cycles)
        self.sums["rtap_cached_tokens_total"] += sum(c["cached_tokens"] for c in cycles)
        self.sums["rtap_recomputed_tokens_total"] += sum(
            max(0, c["prompt_tokens"] - c["cached_tokens"]) for c in cycles
        )
        self.sums["rtap_confidence_tokens_total"] += trajectory["confidence_tokens"]
        self.sums["rtap_discarded_tokens_total"] += trajectory["discarded_tokens"]
        self.sums["rtap_cycle_confidence_count"] += sum(c["confidence"] is not None for c in cycles)
        if "degraded" in trajectory:
            self.sums[f"rtap_degraded_total{{reason={trajectory['degraded']}}}"] += 1


@dataclass(slots=True)
class Traffic:
    """Clients of one server. seed: of all their choices. is_generator_away: trajectories end early then."""

    url: str
    seed: int
    tally: Tally = field(default_factory=Tally)
    is_generator_away: bool = False

    async def run(self, clients: int, seconds: float) -> None:
        """A closed loop of ``clients``; all connections are closed at the end."""
        until = asyncio.get_running_loop().time() + seconds
        timeout = aiohttp.ClientTimeout(total=120)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(
                *(self._client(session, random.Random(f"{self.seed} {n}"), until) for n in range(clients))
            )

    async def _client(self, session: aiohttp.ClientSession, chance: random.Random, until: float) -> None:
        client = _Client(self, session, chance)
        kinds = list(_KINDS)
        while asyncio.get_running_loop().time() < until:
            kind = chance.choices(kinds, [_KINDS[k][0] for k in kinds])[0]
            self.tally.sent[kind] += 1
            try:
                await _KINDS[kind][1](client)
            except (aiohttp.ClientError, TimeoutError, KeyError, ValueError, AssertionError) as error:
                self.tally.errors.append(f"{kind}: {type(error).__name__}: {error}"[:500])


@dataclass(slots=True)
class _Client:
    traffic: Traffic
    session: aiohttp.ClientSession
    chance: random.Random

    def question(self) -> str:
        """A question of the bundled model's two tasks."""
        a, b, c = (self.chance.randint(2, 90) for _ in range(3))
        return self.chance.choice([f"{a}*{b}+{c}", f"make {a * b + c} from {a}, {b}, {c}"])

    def body(self, path: str, **more: Any) -> Body:
        """A request body of this endpoint."""
        text = self.question()
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        question: Mapping[str, Body] = {
            CHAT: {"messages": [{"role": "user", "content": text}]},
            MESSAGES: {"messages": [{"role": "user", "content": text}]},
            COMPLETIONS: {"prompt": text},
            RESPONSES: {"input": text},
        }
        return {"model": "rtap", limit: _MOST_TOKENS} | question[path] | more

    async def plain(self) -> None:
        """Any endpoint, streaming or not, any policy."""
        path = self.chance.choice(ENDPOINTS)
        policy = self.chance.choice(["confidence", "confidence", "model", "single"])
        body = self.body(path, rtap={"policy": policy, "max_cycles": self.chance.randint(1, 4)})
        await self.send(path, body | {"stream": self.chance.random() < 0.5})

    async def several(self) -> None:
        """Several choices of one request."""
        path = self.chance.choice([CHAT, COMPLETIONS])
        await self.send(path, self.body(path, n=3, rtap={"max_cycles": 2}, stream=self.chance.random() < 0.5))

    async def vote(self) -> None:
        """Policy ``vote``."""
        path = self.chance.choice(ENDPOINTS)
        await self.send(path, self.body(path, rtap={"policy": "vote", "samples": 4}))

    async def hurry(self) -> None:
        """A deadline that cuts the answer."""
        body = self.body(CHAT, ignore_eos=True, rtap={"threshold": 1.0, "max_cycles": 16, "deadline_seconds": 0.3})
        await self.send(CHAT, body | {"max_tokens": 900, "stream": self.chance.random() < 0.5})

    async def bad(self) -> None:
        """Requests that the server refuses."""
        path, body, status, reason = self.chance.choice(_BAD)
        headers = {"content-type": "application/json"}
        self.traffic.tally.sums[f"rtap_rejected_total{{reason={reason}}}"] += 1
        try:
            async with self.session.post(self.traffic.url + path, data=io.BytesIO(body), headers=headers) as reply:
                assert reply.status == status, f"{reply.status} and not {status}: {(await reply.text())[:200]}"
                assert error_of(path, await reply.json())
        except aiohttp.ClientOSError:
            assert status == 413, "the connection broke"  # the server closes a body that it does not read

    async def leave(self) -> None:
        """Disconnect before the reply or during a stream; before a first cycle where work cannot be made endless."""
        path = self.chance.choice((CHAT, COMPLETIONS) if self.traffic.is_generator_away else ENDPOINTS)
        is_long = path in (CHAT, COMPLETIONS)
        more = _ENDLESS if is_long else {**_LONG, "max_output_tokens" if path == RESPONSES else "max_tokens": 900}
        body = self.body(path, stream=self.chance.random() < 0.5, **more)
        self.traffic.tally.left += 1
        try:
            async with asyncio.timeout(self.chance.uniform(0, _LEAVE_SECONDS if is_long else _SHORT_SECONDS)):
                async with self.session.post(self.traffic.url + path, json=body) as reply:
                    async for _ in reply.content.iter_any():
                        pass
        except TimeoutError:
            return
        raise AssertionError("the request finished before its client disconnected")

    async def other(self) -> None:
        """Routes without generation."""
        body = {"question": self.question(), "think": "1", "answer": "2"}
        async with self.session.post(f"{self.traffic.url}/v1/rtap/score", json=body) as reply:
            assert reply.status in (200, 503), reply.status  # 503 without a generator
        for path in ("/v1/rtap/config", "/ready", "/v1/models", "/metrics"):
            async with self.session.get(self.traffic.url + path) as reply:
                assert reply.status == 200, f"{path}: {reply.status}"

    async def judge(self) -> None:
        """An answer and feedback on it."""
        reply_body = await self.send(CHAT, self.body(CHAT))
        body = {"request_id": reply_body["id"], "correct": self.chance.random() < 0.5}
        async with self.session.post(f"{self.traffic.url}/v1/rtap/feedback", json=body) as reply:
            assert reply.status == 200, reply.status

    async def send(self, path: str, body: Body) -> Body:
        """Send, read to the end, and tally every trajectory. Returns the reply, of a stream its final event."""
        async with self.session.post(self.traffic.url + path, json=body) as reply:
            assert reply.status == 200, f"{reply.status}: {(await reply.text())[:300]}"
            last = await (_final_event(reply) if body.get("stream") else reply.json())
        trajectories = trajectories_of(last)
        assert len(trajectories) == body.get("n", 1), f"{len(trajectories)} trajectories of {body.get('n', 1)}"
        for trajectory in trajectories:
            self.traffic.tally.take(trajectory)
        return last


async def _final_event(reply: aiohttp.ClientResponse) -> Body:
    """The event with the trajectories; there is exactly one, and no cycle event after it."""
    final, events = None, list[Body]()
    async for line in reply.content:
        if line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
            assert "error" not in events[-1], str(events[-1])
            rtap = events[-1].get("response", events[-1]).get("rtap")
            assert final is None or rtap is None, f"an rtap event after the final one: {events[-2:]}"
            final = events[-1] if rtap is not None and "policy" in rtap else final
    assert final is not None, f"a stream without its final event: {events[-3:]}"
    return final


def trajectories_of(reply: Mapping[str, Any]) -> list[Body]:
    """The ``rtap`` objects of a reply or of a stream's final event, one per choice."""
    reply = reply.get("response", reply)
    choices = reply.get("rtap_choices") or [c["rtap"] for c in reply.get("choices", ()) if "rtap" in c]
    return choices or [reply["rtap"]]


_KINDS: Mapping[str, tuple[float, Callable[[_Client], Awaitable[None]]]] = {
    "plain": (8, _Client.plain),
    "several choices": (1, _Client.several),
    "vote": (1, _Client.vote),
    "deadline": (1, _Client.hurry),
    "bad": (2, _Client.bad),
    "left": (3, _Client.leave),
    "other routes": (1, _Client.other),
    "judged": (1, _Client.judge),
}

"""Mixed traffic for the soak test: clients of every kind, and what they saw, to be held against the server's counters.

Whoever leaves asks for more work than fits into the time it stays, so that its trajectories are never finished: those
that were told to clients are then all that the server may have counted. Judging is ``soak.py``'s job.
"""

import asyncio
import io
import json
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Body = dict[str, Any]
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
_MOST_TOKENS = 160
_LEAVE_SECONDS, _SHORT_SECONDS = 0.5, 0.03  # how long one who leaves stays at most
# Seconds of work with and without a generator; and what comes near where there are no such fields.
_LONG: Mapping[str, Any] = {"rtap": {"policy": "confidence", "threshold": 1.0, "max_cycles": 16}}
_ENDLESS: Mapping[str, Any] = {**_LONG, "ignore_eos": True, "min_tokens": 900, "max_tokens": 900}
_BAD: Sequence[tuple[str, bytes, int, str]] = (  # path, body, status, and the reason that it is counted under
    (CHAT, b"{", 400, "invalid"),
    (MESSAGES, b"[" * 5000, 400, "invalid"),
    (CHAT, b'{"model": "rtap", "messages": [], "rtap": {"threshold": 2}}', 400, "invalid"),
    (COMPLETIONS, b'{"model": "rtap", "prompt": "3+4", "n": 1000}', 400, "invalid"),
    (RESPONSES, b'{"model": "rtap", "input": "3+4", "rtap": []}', 400, "invalid"),
    (CHAT, b'{"messages": "' + b"1" * 9_000_000 + b'"}', 413, "body_too_large"),
)


@dataclass(slots=True)
class Tally:
    """What clients saw. trajectories: by policy and stop reason. sums: over them, by the series that counts the same.
    left: trajectories of those who left. asked: requests by kind. errors: what should not have happened."""

    trajectories: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    sums: Counter[str] = field(default_factory=Counter[str])
    left: int = 0
    asked: Counter[str] = field(default_factory=Counter[str])
    errors: list[str] = field(default_factory=list[str])

    def take(self, told: Mapping[str, Any]) -> None:
        """Count one ``rtap`` object."""
        self.trajectories[told["policy"], told["stop_reason"]] += 1
        cycles: list[Body] = told["cycles"]
        self.sums["rtap_cycles_sum"] += len(cycles)
        self.sums["rtap_oops_tokens_total"] += sum(c["oops_tokens"] for c in cycles)
        self.sums["rtap_cached_tokens_total"] += sum(c["cached_tokens"] for c in cycles)
        self.sums["rtap_recomputed_tokens_total"] += sum(
            max(0, c["prompt_tokens"] - c["cached_tokens"]) for c in cycles
        )
        self.sums["rtap_confidence_tokens_total"] += told["confidence_tokens"]
        self.sums["rtap_discarded_tokens_total"] += told["discarded_tokens"]
        self.sums["rtap_cycle_confidence_count"] += sum(c["confidence"] is not None for c in cycles)
        if "degraded" in told:
            self.sums[f"rtap_degraded_total{{reason={told['degraded']}}}"] += 1


@dataclass(slots=True)
class Traffic:
    """Clients of one server. seed: of everything that they choose. is_generator_away: a trajectory ends by itself
    then, soon, unless it is made endless."""

    url: str
    seed: int
    tally: Tally = field(default_factory=Tally)
    is_generator_away: bool = False

    async def run(self, clients: int, seconds: float) -> None:
        """So many clients at a time, each asking again as soon as it is answered; all connections are closed then."""
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
            self.tally.asked[kind] += 1
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
        """Of the two tasks that the bundled model knows."""
        a, b, c = (self.chance.randint(2, 90) for _ in range(3))
        return self.chance.choice([f"{a}*{b}+{c}", f"make {a * b + c} from {a}, {b}, {c}"])

    def body(self, path: str, **more: Any) -> Body:
        """A request in the words of its endpoint."""
        text = self.question()
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        asked: Mapping[str, Body] = {
            CHAT: {"messages": [{"role": "user", "content": text}]},
            MESSAGES: {"messages": [{"role": "user", "content": text}]},
            COMPLETIONS: {"prompt": text},
            RESPONSES: {"input": text},
        }
        return {"model": "rtap", limit: _MOST_TOKENS} | asked[path] | more

    async def plain(self) -> None:
        """Any endpoint, whole or streamed, under any policy."""
        path = self.chance.choice(ENDPOINTS)
        policy = self.chance.choice(["confidence", "confidence", "model", "single"])
        body = self.body(path, rtap={"policy": policy, "max_cycles": self.chance.randint(1, 4)})
        await self.ask(path, body | {"stream": self.chance.random() < 0.5})

    async def several(self) -> None:
        """Some choices of one request."""
        path = self.chance.choice([CHAT, COMPLETIONS])
        await self.ask(path, self.body(path, n=3, rtap={"max_cycles": 2}, stream=self.chance.random() < 0.5))

    async def vote(self) -> None:
        """Samples side by side."""
        path = self.chance.choice(ENDPOINTS)
        await self.ask(path, self.body(path, rtap={"policy": "vote", "samples": 4}))

    async def hurry(self) -> None:
        """A deadline that cuts."""
        body = self.body(CHAT, ignore_eos=True, rtap={"threshold": 1.0, "max_cycles": 16, "deadline_seconds": 0.3})
        await self.ask(CHAT, body | {"max_tokens": 900, "stream": self.chance.random() < 0.5})

    async def repeat(self) -> None:
        """The same request twice at once and once more, under one name; then another under that name."""
        name = {"Idempotency-Key": uuid.UUID(int=self.chance.getrandbits(128)).hex}
        path = self.chance.choice(ENDPOINTS)
        body = self.body(path, stream=self.chance.random() < 0.5)
        await asyncio.gather(self.ask(path, body, name), self.ask(path, body, name))
        await self.ask(path, body, name)
        async with self.session.post(self.traffic.url + path, json=self.body(path, user="x"), headers=name) as reply:
            assert reply.status == 409, f"{reply.status} for another request of the same name"
            self.traffic.tally.sums["rtap_rejected_total{reason=conflict}"] += 1

    async def bad(self) -> None:
        """What is refused."""
        path, body, status, reason = self.chance.choice(_BAD)
        headers = {"content-type": "application/json"}
        self.traffic.tally.sums[f"rtap_rejected_total{{reason={reason}}}"] += 1
        try:
            async with self.session.post(self.traffic.url + path, data=io.BytesIO(body), headers=headers) as reply:
                assert reply.status == status, f"{reply.status} and not {status}: {(await reply.text())[:200]}"
                assert set((await reply.json())["error"]) == {"message", "type", "param", "code"}
        except aiohttp.ClientOSError:
            assert status == 413, "the connection broke"  # the server need not wait for all that it will not read

    async def leave(self) -> None:
        """Away before the reply, or in the midst of a stream; where an endpoint has no way to ask for endless work,
        before a first cycle can have been written."""
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
        raise AssertionError("what should take seconds was over before its client could leave")

    async def other(self) -> None:
        """The routes beside generation."""
        body = {"question": self.question(), "think": "1", "answer": "2"}
        async with self.session.post(f"{self.traffic.url}/v1/rtap/score", json=body) as reply:
            assert reply.status in (200, 503), reply.status  # without a generator nothing scores
        for path in ("/v1/rtap/config", "/ready", "/v1/models", "/metrics"):
            async with self.session.get(self.traffic.url + path) as reply:
                assert reply.status == 200, f"{path}: {reply.status}"

    async def judge(self) -> None:
        """An answer, and a verdict on it."""
        told = await self.ask(CHAT, self.body(CHAT))
        body = {"request_id": told["id"], "correct": self.chance.random() < 0.5}
        async with self.session.post(f"{self.traffic.url}/v1/rtap/feedback", json=body) as reply:
            assert reply.status == 200, reply.status

    async def ask(self, path: str, body: Body, headers: Mapping[str, str] | None = None) -> Body:
        """Send, read to the end, count every trajectory that the reply tells. Result: what it says last."""
        async with self.session.post(self.traffic.url + path, json=body, headers=headers) as reply:
            assert reply.status == 200, f"{reply.status}: {(await reply.text())[:300]}"
            last = await (_last_of(reply) if body.get("stream") else reply.json())
            is_first = "idempotent-replayed" not in reply.headers
        told = trajectories_of(last)
        assert len(told) == body.get("n", 1), f"{len(told)} trajectories told, {body.get('n', 1)} asked for"
        if is_first:
            for one in told:
                self.traffic.tally.take(one)
        else:
            self.traffic.tally.sums["rtap_idempotent_total"] += 1
        return last


async def _last_of(reply: aiohttp.ClientResponse) -> Body:
    """The event of a stream that tells the trajectories; there is one, and no cycle is told after it."""
    told, events = None, list[Body]()
    async for line in reply.content:
        if line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
            assert "error" not in events[-1], str(events[-1])
            rtap = events[-1].get("response", events[-1]).get("rtap")
            assert told is None or rtap is None, f"told after the end: {events[-2:]}"
            told = events[-1] if rtap is not None and "policy" in rtap else told
    assert told is not None, f"a stream without its end: {events[-3:]}"
    return told


def trajectories_of(reply: Mapping[str, Any]) -> list[Body]:
    """The ``rtap`` objects of a whole reply or of a stream's last event, one a choice."""
    reply = reply.get("response", reply)
    choices = reply.get("rtap_choices") or [c["rtap"] for c in reply.get("choices", ()) if "rtap" in c]
    return choices or [reply["rtap"]]


_KINDS: Mapping[str, tuple[float, Callable[[_Client], Awaitable[None]]]] = {
    "plain": (8, _Client.plain),
    "several choices": (1, _Client.several),
    "vote": (1, _Client.vote),
    "deadline": (1, _Client.hurry),
    "repeated": (1, _Client.repeat),
    "bad": (2, _Client.bad),
    "left": (3, _Client.leave),
    "other routes": (1, _Client.other),
    "judged": (1, _Client.judge),
}

"""HTTP client of an rtap server for evaluations. Requests are neither retried nor dropped."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from rtap_core.answers import extract_answer
from rtap_core.errors import ConfigError
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Outcome, Reply, Run, RunSpec
from rtap_training.evaluation.rules import CONFIDENCE


@dataclass(frozen=True, slots=True)
class Load:
    """Request settings of a run. seed: base of the per-question seeds. max_cycles, max_tokens,
    recursion: None for the server's default."""

    concurrency: int
    temperature: float
    seed: int
    max_cycles: int | None = None
    max_tokens: int | None = None
    recursion: str | None = None


class RtapServer:
    """A running server. ``connect`` sets ``model`` and ``config``."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_seconds: float, concurrency: int) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_seconds = timeout_seconds
        self._concurrency = concurrency
        self.model = ""
        self.config: Mapping[str, Any] = {}

    async def connect(self) -> Self:
        """Fetch ``model`` and ``config``. Raises ConfigError if no rtap server answers."""
        async with self._client() as client:
            self.config = await self._get(client, "/v1/rtap/config")
            self.model = (await self._get(client, "/v1/models"))["data"][0]["id"]
        return self

    def _client(self) -> httpx.AsyncClient:
        """Connections of one run. They are not reused: an idle connection may close while a request is sent on it."""
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        return httpx.AsyncClient(
            base_url=self._base_url, headers=self._headers, timeout=self._timeout_seconds, limits=limits
        )

    async def _get(self, client: httpx.AsyncClient, path: str) -> Mapping[str, Any]:
        try:
            response = await client.get(path)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(
                f"no server answers at {self._base_url} ({reason}); start one with `rtap serve`"
            ) from error
        if not response.is_success:
            hint = "set RTAP_API_KEY to its key" if response.status_code == 401 else "is this an rtap server?"
            raise ConfigError(f"{self._base_url}{path} answered {response.status_code}; {hint}")
        return response.json()

    async def _ask(self, client: httpx.AsyncClient, index: int, question: Question, spec: RunSpec, load: Load) -> Reply:
        """Send one question under one rule. A failure becomes a reply with ``error``."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "temperature": load.temperature,
            "seed": question.seed(load.seed),
            "rtap": {**spec.request(max_cycles=load.max_cycles), "return_cycles": True},
        }
        if load.recursion is not None and spec.rule == CONFIDENCE:
            body["rtap"]["recursion"] = load.recursion
        if load.max_tokens is not None:
            body["max_completion_tokens"] = load.max_tokens
        start = time.perf_counter()
        try:
            response = await client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            return Reply(index, error=f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - start
        if not response.is_success:
            return Reply(index, error=f"HTTP {response.status_code}: {response.text[:300]}")
        try:
            return Reply(index, seconds, response.json())
        except ValueError as error:
            return Reply(index, error=f"invalid reply ({type(error).__name__}: {error})")

    async def run(
        self,
        task: str,
        questions: Sequence[Question],
        spec: RunSpec,
        load: Load,
        *,
        on_outcome: Callable[[Outcome], None],
        on_reply: Callable[[Reply], None] = lambda _: None,
        only: Sequence[int] | None = None,
    ) -> Run:
        """Send questions under one rule, ``load.concurrency`` at a time, then judge the replies outside the timed part.

        on_reply: called as each reply arrives. on_outcome: called for each judged reply.
        only: positions of the questions to send; None: all."""
        positions = range(len(questions)) if only is None else only
        waiting = iter(positions)
        replies: list[Reply] = []

        async def work(client: httpx.AsyncClient) -> None:
            for index in waiting:
                reply = await self._ask(client, index, questions[index], spec, load)
                replies.append(reply)
                on_reply(reply)

        async with self._client() as client:
            start = time.perf_counter()
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(load.concurrency, len(positions))):
                    workers.create_task(work(client))
            wall_seconds = time.perf_counter() - start
        outcomes: list[Outcome] = []
        for reply in replies:
            outcome = await asyncio.to_thread(judged, questions[reply.index], reply)
            outcomes.append(outcome)
            on_outcome(outcome)
        return Run(task, spec, tuple(sorted(outcomes, key=lambda outcome: outcome.index)), wall_seconds)


def judged(question: Question, reply: Reply) -> Outcome:
    """The outcome of a reply. An invalid reply becomes an outcome with ``error``."""
    if reply.error is not None or reply.body is None:
        return Outcome(reply.index, error=reply.error or "invalid reply (empty)")
    try:
        return outcome_of(reply.index, question, reply.body, reply.seconds)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return Outcome(reply.index, error=f"invalid reply ({type(error).__name__}: {error})")


def outcome_of(index: int, question: Question, reply: Mapping[str, Any], seconds: float) -> Outcome:
    """Parse a chat completion with an ``rtap`` field. Raises KeyError, TypeError, … for anything else."""
    rtap: Mapping[str, Any] = reply["rtap"]
    cycles = tuple(
        CycleRecord(
            answer=cycle["answer"],
            is_correct=question.is_right(cycle["answer"]),
            confidence=cycle["confidence"],
            tokens=cycle["tokens"],
            oops_tokens=cycle["oops_tokens"],
            prompt_tokens=cycle["prompt_tokens"],
            cached_tokens=cycle["cached_tokens"],
            seconds=cycle["seconds"],
            confidence_seconds=cycle["confidence_seconds"] or 0.0,
            think=cycle.get("think"),
            text=cycle.get("text"),
            logprobs=cycle.get("logprobs"),
        )
        # Samples of a vote are listed as they finish; a prefix in that order would favour short ones.
        for cycle in sorted(rtap["cycles"], key=lambda cycle: cycle["index"])
    )
    content = (reply["choices"][0]["message"]["content"] or "").strip()
    # The server returns the text of a cut cycle too; votes and replays do not count it as an answer.
    is_complete = any(cycle.answer is not None for cycle in cycles)
    answer = extract_answer(content) if content and is_complete else None
    return Outcome(
        index=index,
        answer=answer,
        is_correct=question.is_right(answer),
        stop_reason=rtap["stop_reason"],
        policy_tokens=reply["usage"]["completion_tokens"] + rtap["discarded_tokens"],
        generator_tokens=rtap["confidence_tokens"],
        seconds=seconds,
        first_answer_seconds=rtap["first_answer_seconds"],
        degraded=rtap.get("degraded"),
        cycles=cycles,
    )

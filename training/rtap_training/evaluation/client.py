"""HTTP client of an rtap server for evaluations. Requests are neither retried nor dropped."""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import TypeAdapter

from rtap_core.answers import extract_answer
from rtap_core.errors import ConfigError
from rtap_training.evaluation.question_files import Question
from rtap_training.evaluation.records import CycleRecord, Load, Outcome, Run, RunSpec
from rtap_training.evaluation.server_process import running_server, serve_command

_CYCLE = TypeAdapter(CycleRecord)


class RtapServer:
    """A running server. ``connect`` sets ``model`` and ``config``."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_seconds: float) -> None:
        self._base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_seconds = timeout_seconds
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
        limits = httpx.Limits(max_connections=None)
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

    async def _post(
        self, client: httpx.AsyncClient, index: int, question: Question, spec: RunSpec, load: Load
    ) -> Outcome:
        """Send one question under one rule. A failure becomes an outcome with ``error``."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.prompt}],
            "temperature": load.temperature,
            "seed": question.seed(load.seed),
            "rtap": {**spec.request(load), "return_cycles": True},
        }
        if load.max_tokens is not None:
            body["max_completion_tokens"] = load.max_tokens
        start = time.perf_counter()
        try:
            response = await client.post("/v1/chat/completions", json=body)
            seconds = time.perf_counter() - start
            if not response.is_success:
                return Outcome(index, error=f"HTTP {response.status_code}: {response.text[:300]}")
            return outcome_of(index, response.json(), seconds)
        except httpx.HTTPError as error:
            return Outcome(index, error=f"{type(error).__name__}: {error}")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return Outcome(index, error=f"invalid reply ({type(error).__name__}: {error})")

    async def ask(
        self,
        questions: Sequence[Question],
        spec: RunSpec,
        load: Load,
        *,
        only: Sequence[int] | None = None,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> tuple[list[Outcome], float]:
        """Outcomes, not yet judged, and the seconds from the first request to the last reply; ``load.concurrency``
        requests at a time.

        only: positions of the questions to send; None: all. on_outcome: called as each reply arrives."""
        positions = range(len(questions)) if only is None else only
        waiting = iter(positions)
        outcomes: list[Outcome] = []

        async def work(client: httpx.AsyncClient) -> None:
            for index in waiting:
                outcomes.append(await self._post(client, index, questions[index], spec, load))
                on_outcome(outcomes[-1])

        async with self._client() as client:
            start = time.perf_counter()
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(load.concurrency, len(positions))):
                    workers.create_task(work(client))
            return outcomes, time.perf_counter() - start

    async def run(self, task: str, questions: Sequence[Question], spec: RunSpec, load: Load) -> Run:
        """Ask all questions under one rule, then judge the answers outside the timed part."""
        outcomes, seconds = await self.ask(questions, spec, load)
        outcomes.sort(key=lambda outcome: outcome.index)
        return Run(task, spec, tuple(judged(questions[outcome.index], outcome) for outcome in outcomes), seconds)


@asynccontextmanager
async def open_server(args: argparse.Namespace, serve_flags: Sequence[str], *, log: Path) -> AsyncGenerator[RtapServer]:
    """Connect to the server of ``args``; start and stop it unless there is an address. Raises ConfigError."""

    with ExitStack() as stack:
        url = args.server
        if url is None:
            sys.stderr.write(f"starting the server (its log: {log})\n")
            command = serve_command(args.model, args.confidence_model, serve_flags)
            url = stack.enter_context(running_server(command, log=log, ready_seconds=args.ready_timeout))
        yield await RtapServer(url, api_key=args.api_key, timeout_seconds=args.timeout).connect()


def judged(question: Question, outcome: Outcome) -> Outcome:
    """The outcome with its answers checked."""
    cycles = tuple(replace(cycle, is_correct=question.is_right(cycle.answer)) for cycle in outcome.cycles)
    return replace(outcome, is_correct=question.is_right(outcome.answer), cycles=cycles)


def outcome_of(index: int, reply: Mapping[str, Any], seconds: float) -> Outcome:
    """Parse a chat completion with an ``rtap`` field. Raises KeyError, TypeError, … for anything else."""
    rtap: Mapping[str, Any] = reply["rtap"]
    # Samples of a vote are listed as they finish; a prefix in that order would favour short ones.
    cycles = tuple(map(_CYCLE.validate_python, sorted(rtap["cycles"], key=lambda cycle: cycle["index"])))
    content = (reply["choices"][0]["message"]["content"] or "").strip()
    # The server returns the text of a cut cycle too; votes and replays do not count it as an answer.
    is_complete = any(cycle.answer is not None for cycle in cycles)
    return Outcome(
        index=index,
        answer=extract_answer(content) if content and is_complete else None,
        stop_reason=rtap["stop_reason"],
        policy_tokens=reply["usage"]["completion_tokens"] + rtap["discarded_tokens"],
        generator_tokens=rtap["confidence_tokens"],
        seconds=seconds,
        first_answer_seconds=rtap["first_answer_seconds"],
        degraded=rtap.get("degraded"),
        cycles=cycles,
    )

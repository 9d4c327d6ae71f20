"""Run the server's Think–Answer loop for many trajectories on a batch-only engine.

Every trajectory is one run of ``rtap_core.recursion``. Each requests its next cycle and waits; once all running
trajectories wait, one batch is generated for all. Training and serving thus share the loop, with full batches.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rtap_core.types import Step


@dataclass(frozen=True, slots=True)
class Request:
    """Request for one cycle. row: index of the trajectory."""

    row: int
    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated tokens of a request, including the end token. logps: from the sampler, or None."""

    ids: list[int]
    logps: list[float] | None


Generate = Callable[[Sequence[Request]], list[Completion]]
"""Generate every request until an end token or its limit; results in the order of the requests."""


T = TypeVar("T")


class Lockstep:
    """Collect the requests of ``num_rows`` trajectories; generate once all running trajectories wait."""

    def __init__(self, generate: Generate, num_rows: int) -> None:
        self._generate = generate
        self._num_running = num_rows
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []

    async def write(self, request: Request) -> Completion:
        """Completion of one request; waits until every running trajectory has requested."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._flush()
        return await future

    def leave(self) -> None:
        """Remove a trajectory that has ended or failed."""
        self._num_running -= 1
        self._flush()

    def _flush(self) -> None:
        self._waiting = [
            item for item in self._waiting if not item[1].done()
        ]  # drop futures cancelled with a failed row
        if not self._waiting or len(self._waiting) < self._num_running:
            return
        batch, self._waiting = sorted(self._waiting, key=lambda item: item[0].row), []  # deterministic order
        try:
            results = self._generate([request for request, _ in batch])
        except Exception as error:  # fail every trajectory of the batch, not only the last caller
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), written in zip(batch, results, strict=True):
            future.set_result(written)


def in_lockstep(generate: Generate, num_rows: int, follow: Callable[[Lockstep, int], Awaitable[T]]) -> list[T]:
    """Run ``follow(lockstep, row)`` concurrently for every row; return the results in row order."""

    async def run_all() -> list[T]:
        lockstep = Lockstep(generate, num_rows)

        async def run(row: int) -> T:
            try:
                return await follow(lockstep, row)
            finally:
                lockstep.leave()

        return await asyncio.gather(*map(run, range(num_rows)))

    return asyncio.run(run_all())


@dataclass(frozen=True, slots=True)
class RowEngine:
    """``rtap_core.types.Engine`` for one trajectory.

    end_ids: stop tokens; those not in ``end_of_turn_ids`` end a cycle only. max_cycle_tokens: limit per cycle; None for
    the trajectory's limit alone.
    """

    lockstep: Lockstep
    row: int
    end_ids: frozenset[int]
    end_of_turn_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    encode_tag: Callable[[str], list[int]]
    max_cycle_tokens: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a tag."""
        return self.encode_tag(text)

    async def cycle(
        self, prompt_token_ids: Sequence[int], *, index: int, max_tokens: int | None
    ) -> AsyncGenerator[Step, None]:
        """Yield the whole cycle in one step. ``native`` holds the sampler's log-probabilities."""
        del index  # the trainer's random state applies, not a seed per cycle
        limit = min(limit for limit in (max_tokens, self.max_cycle_tokens) if limit is not None)
        written = await self.lockstep.write(Request(self.row, list(prompt_token_ids), limit))
        last = written.ids[-1] if written.ids else None
        yield Step(
            text=self.decode([i for i in written.ids if i not in self.end_of_turn_ids]),  # as vLLM detokenises
            token_ids=written.ids,
            finished=True,
            truncated=last not in self.end_ids,
            ended_turn=last in self.end_of_turn_ids,
            prompt_tokens=len(prompt_token_ids),
            cached_tokens=0,
            native=written.logps,
        )

"""Run the server's own Think–Answer loop for many trajectories over an engine that only generates whole batches.

Every trajectory is one run of ``rtap_core.recursion``. Each asks for its next cycle and waits; when all that are
still running wait, one batch is generated for all. So training and serving share the loop, and a batch is as full as
it can be. Not here: what is rewarded, and how a batch is generated.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rtap_core.types import Step


@dataclass(frozen=True, slots=True)
class Request:
    """One cycle to write. ``row``: the trajectory's place in the batch of all."""

    row: int
    prompt_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for a request, its end token included. ``logps``: of the sampler, where it gives them."""

    ids: list[int]
    logps: list[float] | None


Generate = Callable[[Sequence[Request]], list[Completion]]
"""Continue every request until an end token or its limit; results in the order of the requests."""


T = TypeVar("T")


class Lockstep:
    """Collects the requests of ``num_rows`` trajectories and generates when nobody can go on without it."""

    def __init__(self, generate: Generate, num_rows: int) -> None:
        self._generate = generate
        self._num_running = num_rows
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []

    async def write(self, request: Request) -> Completion:
        """The continuation of one request, after everybody else has asked too."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._flush()
        return await future

    def leave(self) -> None:
        """A trajectory has ended (or failed): the others need not wait for it."""
        self._num_running -= 1
        self._flush()

    def _flush(self) -> None:
        self._waiting = [item for item in self._waiting if not item[1].done()]  # cancelled with a row that failed
        if not self._waiting or len(self._waiting) < self._num_running:
            return
        batch, self._waiting = sorted(self._waiting, key=lambda item: item[0].row), []  # the same draw every time
        try:
            results = self._generate([request for request, _ in batch])
        except Exception as error:  # it belongs to every trajectory of the batch, not to the last to ask
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), written in zip(batch, results, strict=True):
            future.set_result(written)


def in_lockstep(generate: Generate, num_rows: int, follow: Callable[[Lockstep, int], Awaitable[T]]) -> list[T]:
    """``follow`` (lockstep, row) for every row, side by side; what they return, in the order of the rows."""

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

    end_ids: tokens at which generation stops; those not in ``end_of_turn_ids`` end a cycle only.
    max_cycle_tokens: bound of one cycle, None for none but the trajectory's own.
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
        """The whole cycle in one step. ``native`` carries the sampler's log-probabilities."""
        del index  # the sampler's random state is the trainer's, not a seed for each cycle
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

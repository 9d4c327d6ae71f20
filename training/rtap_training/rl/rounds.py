"""Generation in which every process takes part until all have finished.

With sharded weights every forward pass is a collective call, and TRL's vLLM modes gather the prompts of all processes
as if each had as many. Recursive rollouts end after different numbers of cycles, so a process that has nothing left
to write goes on with a spare row. Not here: the batch itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rtap_training.rl.lockstep import Completion, Generate, Request

Largest = Callable[[Sequence[int]], list[int]]
"""The largest of each number over all processes; a collective call."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """``generate`` in step with the other processes.

    spare: what to write where there is nothing else. same_size: whether all processes must bring as many rows.
    """

    generate: Generate
    largest: Largest
    spare: Request
    same_size: bool

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One round; the result has the requests' rows only."""
        return self._round(requests) or []

    def finish(self) -> None:
        """Stay until nobody has anything left to write."""
        while self._round([]) is not None:
            pass

    def _round(self, requests: Sequence[Request]) -> list[Completion] | None:
        limits = [r.max_tokens for r in requests]
        size, limit = self.largest([len(requests), max(limits, default=0)])
        if size == 0:
            return None
        spares = [self.spare] * ((size if self.same_size else 1) - len(requests))
        rows = [*requests, *spares]
        if self.same_size:  # one process asks for all, with its own limit
            rows = [replace(r, max_tokens=limit) for r in rows]
        return [
            Completion(w.ids[:own], None if w.logps is None else w.logps[:own])
            for w, own in zip(self.generate(rows), limits, strict=False)
        ]

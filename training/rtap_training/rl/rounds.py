"""Collective generation: every process takes part until all have finished.

With sharded weights every forward pass is a collective call, and TRL's vLLM modes expect equally many prompts from
every process. Recursive rollouts need different numbers of cycles, so a finished process generates a spare row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rtap_training.rl.lockstep import Completion, Generate, Request

Largest = Callable[[Sequence[int]], list[int]]
"""Maximum of each value over all processes; a collective call."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """Run ``generate`` in step with the other processes.

    spare: request of a process without any. same_size: all processes must pass equally many rows.
    """

    generate: Generate
    largest: Largest
    spare: Request
    same_size: bool

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """Generate one round; returns the completions of ``requests`` only."""
        return self._round(requests) or []

    def finish(self) -> None:
        """Take part until all processes have finished."""
        while self._round([]) is not None:
            pass

    def _round(self, requests: Sequence[Request]) -> list[Completion] | None:
        limits = [r.max_tokens for r in requests]
        size, limit = self.largest([len(requests), max(limits, default=0)])
        if size == 0:
            return None
        spares = [self.spare] * ((size if self.same_size else 1) - len(requests))
        rows = [*requests, *spares]
        if self.same_size:  # one process requests for all, with its limit
            rows = [replace(r, max_tokens=limit) for r in rows]
        return [
            Completion(w.ids[:own], None if w.logps is None else w.logps[:own])
            for w, own in zip(self.generate(rows), limits, strict=False)
        ]

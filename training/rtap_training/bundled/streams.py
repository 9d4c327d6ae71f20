"""Endless, resumable stream of training data. Resuming draws one pool again."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Stream(Iterator[Item], Generic[Item]):
    """Yield items pool by pool. ``draw`` returns a non-empty pool that depends only on the random state."""

    def __init__(self, draw: Callable[[Random], Sequence[Item]], *, seed: int) -> None:
        self._draw = draw
        self._random = Random(seed)
        self._before_pool = self._random.getstate()
        self._pool: Sequence[Item] = ()
        self._num_used = 0

    def __next__(self) -> Item:
        if self._num_used == len(self._pool):
            self._next_pool()
        self._num_used += 1
        return self._pool[self._num_used - 1]

    def _next_pool(self) -> None:
        self._before_pool = self._random.getstate()
        self._pool = self._draw(self._random)
        self._num_used = 0

    def state_dict(self) -> dict[str, Any]:
        """The random state before the current pool, and the number of items used from it."""
        return {"before_pool": self._before_pool, "num_used": self._num_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position of a stream with the same ``draw``."""
        self._random.setstate(state["before_pool"])
        self._next_pool()
        self._num_used = state["num_used"]

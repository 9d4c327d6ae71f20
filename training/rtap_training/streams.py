"""Endless data that a stopped run finds its place in again, at the price of drawing one pool."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Stream(Iterator[Item], Generic[Item]):
    """Items of one pool after the other. ``draw`` makes a pool, never an empty one, from the random state alone."""

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
        """The place: the random state before the pool, and how much of the pool is used."""
        return {"before_pool": self._before_pool, "num_used": self._num_used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that a stream of the same ``draw`` was at."""
        self._random.setstate(state["before_pool"])
        self._next_pool()
        self._num_used = state["num_used"]

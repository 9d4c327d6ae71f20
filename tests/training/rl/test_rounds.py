"""Collective generation, with two threads as processes."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rtap_training.rl.lockstep import Completion, Request
from rtap_training.rl.rounds import Rounds

SPARE = Request(0, [9], 1)
Batches = list[list[Request]]


class Pair:
    """Maximum over two threads; a single caller times out."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._given: list[Sequence[int]] = []

    def __call__(self, values: Sequence[int]) -> list[int]:
        self._given.append(values)
        self._barrier.wait()
        result = [max(numbers) for numbers in zip(*self._given, strict=True)]
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()
        return result


def play(batches: list[Batches], *, same_size: bool) -> tuple[list[Batches], list[list[list[Completion]]]]:
    """Requests and completions of two processes that generate their batches in order."""
    largest = Pair()

    def process(mine: list[list[Request]]) -> tuple[list[list[Request]], list[list[Completion]]]:
        asked: list[list[Request]] = []

        def generate(requests: Sequence[Request]) -> list[Completion]:
            asked.append(list(requests))
            return [Completion([r.prompt_ids[0]] * r.max_tokens, [0.5] * r.max_tokens) for r in requests]

        rounds = Rounds(generate, largest, SPARE, same_size)
        results = [rounds(batch) for batch in mine]
        rounds.finish()
        return asked, results

    with ThreadPoolExecutor(2) as pool:
        pairs = list(pool.map(process, batches))
    return [asked for asked, _ in pairs], [results for _, results in pairs]


def rows(count: int, max_tokens: int = 5) -> list[Request]:
    return [Request(i, [i], max_tokens) for i in range(count)]


def test_a_process_that_has_finished_writes_a_spare_row() -> None:
    asked, _ = play([[rows(2)], [rows(2), rows(1), rows(1)]], same_size=False)
    assert asked[0] == [rows(2), [SPARE], [SPARE]]
    assert asked[1] == [rows(2), rows(1), rows(1)]


def test_with_one_asking_for_all_batches_are_equally_long_and_limits_equal() -> None:
    asked, _ = play([[rows(3, max_tokens=7)], [rows(1, max_tokens=2)]], same_size=True)
    assert [len(batch) for batch in asked[0] + asked[1]] == [3, 3]
    assert {r.max_tokens for batches in asked for batch in batches for r in batch} == {7}


def test_rows_are_cut_at_their_own_limit_and_spare_rows_are_dropped() -> None:
    _, results = play([[rows(3, max_tokens=7)], [rows(1, max_tokens=2)]], same_size=True)
    assert [[w.ids for w in batch] for batch in results[1]] == [[[0, 0]]]
    assert [w.logps for w in results[1][0]] == [[0.5, 0.5]]
    assert [len(w.ids) for w in results[0][0]] == [7, 7, 7]


def test_processes_that_end_together_do_no_extra_round() -> None:
    asked, _ = play([[rows(1)], [rows(2)]], same_size=False)
    assert [len(batches) for batches in asked] == [1, 1]

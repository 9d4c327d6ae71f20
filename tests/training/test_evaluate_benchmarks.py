"""The benchmark scripts: what counts as first text, and how rounds become ratios."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_overhead")


@pytest.mark.parametrize(
    ("chunk", "is_text", "is_word"),
    [
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}', False, False),
        (b'data: {"choices":[{"delta":{"content":null,"reasoning":null}}]}', False, False),
        (b'data: {"choices":[{"delta":{"content":"<think>"}}]}', True, False),
        (
            b'data: {"choices":[{"delta":{"content":"<think>"}}]}\n\ndata: {"choices":[{"delta":{"content":"3"}}]}',
            True,
            True,
        ),
        (b'data: {"choices":[{"delta":{"reasoning":"3","reasoning_content":"3"}}]}', True, True),
        (b'data: {"choices":[{"delta":{"content":"<"}}]}', True, True),
    ],
)
def test_first_text_is_found_in_either_field_and_the_tag_is_no_word(
    overhead: ModuleType, chunk: bytes, is_text: bool, is_word: bool
) -> None:
    assert overhead.load.__module__ == "bench_load"
    bench_load = importlib.import_module("bench_load")
    assert bool(bench_load.ANY_TEXT.search(chunk)) == is_text
    assert bool(bench_load.ANY_WORD.search(chunk)) == is_word
    assert bench_load.ANY_CHUNK.search(chunk)
    assert not bench_load.ANY_CHUNK.search(b": a comment of the stream's, which keeps the connection\n\n")


def test_ratios_are_of_pooled_rounds_and_noise_that_hits_both_servers_cancels(overhead: ModuleType) -> None:
    def one(slowness: float, first_text: float) -> object:
        return overhead.Load(slowness, 10, 100, *[(first_text,) * 10] * 3, ())

    slow_minutes = (1.0, 2.0, 5.0, 1.5)  # of the machine, the same for both in a round
    rounds = [overhead.Round(one(1.25 * s, 0.02), one(s, 0.01), ours_first=True) for s in slow_minutes]
    level = overhead.summarise(8, [rounds[:2], rounds[2:]])
    assert (level.starts, level.rounds, level.requests_a_round) == (2, 4, 10)
    requests, tokens, first = level.figures[:3]
    assert requests.plain == pytest.approx(40 / 9.5)
    assert tokens.plain == pytest.approx(400 / 9.5)
    assert (requests.ratio.value, requests.ratio.low, requests.ratio.high) == pytest.approx((0.8, 0.8, 0.8))
    assert (requests.is_met, requests.bound) == (False, ">= 0.98")
    assert (first.ours, first.plain, first.ratio.value, first.is_met) == pytest.approx((20.0, 10.0, 2.0, False))
    assert level.figures[3].is_met is None  # nothing is asked of the 99th percentile


def test_what_differs_from_start_to_start_widens_the_interval_however_many_rounds_each_has(
    overhead: ModuleType,
) -> None:
    def rounds(slowness: float, count: int) -> list[object]:
        loads = [overhead.Load(s, 10, 100, *[(0.01,) * 10] * 3, ()) for s in (slowness, 1.0)]
        return [overhead.Round(*loads, ours_first=True)] * count

    for count in (2, 200):
        ratio = overhead.summarise(8, [rounds(1.0, count), rounds(1.25, count)]).figures[0].ratio
        assert (ratio.low, ratio.high) == pytest.approx((0.8, 1.0))

"""Answer equivalence as text and as mathematics; bounded time; failures are counted or raised."""

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_core.errors import ConfigError
from rtap_training.tasks.equivalence import MAX_LENGTH, Comparer, Counts

CALM = {"equal", "compared", "unreadable_answers"}


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    comparer = Comparer(limit_seconds=20)  # a busy machine is no hostile answer
    yield comparer
    comparer.close()


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac12", "$0.5$"),
        ("1000", "1,000"),
        ("$18", "18.00"),
        ("12 cm", "12"),
        ("12", "12 cm"),
        ("x=5", "5"),
        ("x^2+1", "1 + x^2"),
        (r"\sqrt{2}", "sqrt(2)"),
        ("(3,4)", "(3, 4)"),
        (r"\{1,2\}", "{2, 1}"),
        (r"90^\circ", "90"),
        ("5", r"\boxed{5}"),
        (r"\text{even}", "Even."),
        ("Paris", " paris "),
    ],
)
def test_the_same_written_otherwise(comparer: Comparer, reference: str, answer: str) -> None:
    assert comparer.same(answer, reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("5", "-5"),
        ("5", "5, 6"),
        ("5", "5 or 6"),
        ("3", "1 or 2 or 3"),
        ("5", "<answer>5</answer>"),
        ("(1,2)", "(2,1)"),
        ("1/3", "0.33"),
        ("x=5", "y=5"),
        ("Room 3", "Floor 3"),
        ("Room 3", "Room 4"),
        ("Paris", "pairs"),
        ("5", "five"),
        ("5", ""),
        ("", "5"),
        ("5", "\x00"),
    ],
)
def test_something_else(comparer: Comparer, reference: str, answer: str) -> None:
    assert not comparer.same(answer, reference)


@given(number=st.integers(-(10**9), 10**9), other=st.integers(-(10**9), 10**9))
def test_whole_numbers_are_equal_only_to_themselves(comparer: Comparer, number: int, other: int) -> None:
    assert comparer.same(f"{number:,}", str(number))
    assert comparer.same(str(other), str(number)) == (number == other)


@given(answer=st.text(alphabet=st.sampled_from("\\{}^_$()+-*/=,.:;|&%! 0159xfracsqt\n\t"), max_size=30))
def test_odd_text_is_answered_and_counted(comparer: Comparer, answer: str) -> None:
    assert comparer.same(answer, "41/43") in (True, False)
    counts = asdict(comparer.counts)
    assert counts["compared"] >= sum(counts.values()) - counts["compared"]


def test_a_comparison_that_never_ends_is_stopped_counted_and_leaves_a_working_comparer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    comparer = Comparer(limit_seconds=1)
    try:
        assert comparer.same("2/4", "1/2")
        started = perf_counter()
        with caplog.at_level(logging.WARNING):
            assert not comparer.same("9^{9^{9^{9}}}", "5")
            assert not comparer.same("10000000!", "5")
        assert comparer.same("0.25", "1/4")
        assert perf_counter() - started < 20  # about 3 s, two restarts among them
        assert comparer.counts == Counts(compared=4, equal=2, timeouts=2)
        assert caplog.text.count("took over 1 s") == 1
        started = perf_counter()
        assert not comparer.same("9^{9^{9^{9}}}", "5")
        assert perf_counter() - started < 0.1  # known by now
    finally:
        comparer.close()


def test_long_answers_are_not_read(comparer: Comparer) -> None:
    before = comparer.counts
    started = perf_counter()
    assert not comparer.same("(" * 10**6, "5")
    assert comparer.same("5" * (MAX_LENGTH + 1), "5" * (MAX_LENGTH + 1))
    assert perf_counter() - started < 1
    assert comparer.counts == before


def test_threads_share_one_comparer(comparer: Comparer) -> None:
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda n: comparer.same(f"{2 * n}/{2 * (n + 1)}", f"{n}/{n + 1}"), range(1, 60)))
    assert all(verdicts)


def test_a_worker_that_does_not_start_is_an_error() -> None:
    with pytest.raises(ConfigError, match="math-verify, which compares answers, does not start"):
        Comparer(command=(sys.executable, "-c", "import no_such_module")).same("1/2", "0.5")


def test_a_worker_that_dies_is_counted() -> None:
    comparer = Comparer(command=(sys.executable, "-c", "print('ready', flush=True); input()"))
    assert not comparer.same("1/2", "0.5")
    assert comparer.counts == Counts(compared=1, failures=1)
    comparer.close()

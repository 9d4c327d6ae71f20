"""Statements: brute force finds what the checker accepts, phrasing and order do not matter, odd text is refused."""

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_training.tasks.knights import Knights
from rtap_training.tasks.puzzle import first_clash, parse_guess, parse_puzzle, parse_statement, solutions
from tests.costs import cpu_seconds

TASK = Knights(2, 8, weights=None)
SEEDS = st.integers(0, 2**32)


def truth(statement: str, guess: str) -> bool:
    """Truth value of a statement, evaluated by Python."""
    names = dict(zip("ABCDEFGH", guess, strict=False)) | {"T": "T", "L": "L"}
    text = statement.replace("!=", "#").replace("=", "==").replace("#", "!=").replace("&", " and ").replace("|", " or ")
    return bool(eval(text, {"__builtins__": {}}, names))


@given(SEEDS)
def test_statements_mean_what_they_say(seed: int) -> None:
    problem = TASK.sample(Random(seed))
    for guess in map("".join, product("TL", repeat=min(len(problem.puzzle), 4))):
        full = guess.ljust(len(problem.puzzle), "T")
        for statement in problem.puzzle:
            assert statement.holds(full) == statement.evaluate(full)[1] == truth(str(statement), full)


@given(SEEDS)
def test_exactly_one_guess_is_consistent(seed: int) -> None:
    puzzle = TASK.sample(Random(seed)).puzzle
    guesses = ["".join(g) for g in product("TL", repeat=len(puzzle))]
    consistent = [
        g for g in guesses if all(truth(str(s), g) == (kind == "T") for s, kind in zip(puzzle, g, strict=True))
    ]
    assert [*solutions(puzzle)] == consistent == [g for g in guesses if first_clash(puzzle, g) is None]
    assert len(consistent) == 1


@given(SEEDS)
def test_every_phrasing_and_order_reads_back(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    for _ in range(5):
        assert parse_puzzle(problem.phrase(rng)) == problem.puzzle
    said = [f"{p} says {s}" for p, s in zip("ABCDEFGH", problem.puzzle, strict=False)]
    rng.shuffle(said)
    assert parse_puzzle("; ".join(said).lower()) == problem.puzzle


def test_canonical_statements_do_not_depend_on_the_order_of_what_commutes() -> None:
    for one, other in (("A=C", "C=A"), ("B!=A", "A!=B"), ("B=T&C=L", "C=L&B=T"), ("B=L|A=T", "A=T|B=L")):
        assert parse_statement(one).canonical == parse_statement(other).canonical
    texts = ["A=C", "A!=C", "A=T&C=T", "A=T|C=T", "A=T", "A=L"]
    assert len({parse_statement(t).canonical for t in texts}) == len(texts)


@pytest.mark.parametrize(
    ("answer", "guess"),
    [
        ("TLT", "TLT"),
        (" t, l, t ", "TLT"),
        ("T L T.", "TLT"),
        ("A=T B=L C=T", "TLT"),
        ("c=t, a=t, b=l", "TLT"),
        ("TL", None),
        ("TLTT", None),
        ("TXT", None),
        ("A=T B=L", None),
        ("A=T B=L B=L", None),
        ("A=T B=L D=T", None),
        ("A=T L T", None),
        ("1 0 1", None),
        ("TLT because", None),
        ("", None),
    ],
)
def test_answers_are_read_in_every_usual_form(answer: str, guess: str | None) -> None:
    assert parse_guess(answer, 3) == guess


@pytest.mark.parametrize(
    "question",
    [
        "A:B=L",
        "A:B=L C:A=T",
        "A:B=L A:B=T",
        "A:B=L B:C=T",
        "A:B=L B:A=T C=L",
        "A:B=L B:A=T&A=L|B=L",
        "A:B=L B:A=T|",
        "A:B=LL B:A=T",
        "A:B==L B:A=T",
        "A:T=B B:A=T",
        "make 82 from 3, 7, 25",
        "x=3 and y=4",
        " ".join(f"{p}:A=T" for p in "ABCDEFGHI"),
        "",
    ],
)
def test_other_questions_are_not_claimed(question: str) -> None:
    assert not TASK.claims(question)
    assert not TASK.check(question, "TL")


@pytest.mark.parametrize("unit", ["A:B=L ", "T", "T ", "A=T", " ", "=", "A says ", ":A", "B=T&", "\x00", "ẗ"])
def test_hostile_text_is_wrong_at_once(unit: str) -> None:
    text = unit * (10**6 // len(unit))
    checks = [("A:B=L B:A=T|B=L", text), (text, "TL"), (text[:400], text)]
    assert not any(TASK.check(*check) for check in checks)
    assert cpu_seconds(lambda: [TASK.check(*check) for check in checks]) < 1

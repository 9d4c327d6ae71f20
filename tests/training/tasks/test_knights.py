"""Knights and Knaves: workings are correct, wrong ones stop at a clash, false text is masked."""

import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtap_training.models.huggingface import load_tokenizer
from rtap_training.tasks.base import Attempt
from rtap_training.tasks.knights import Knights, KnightsProblem
from rtap_training.tasks.puzzle import parse_puzzle, parse_statement

TASK = Knights(2, 8, weights=None)
SEEDS = st.integers(0, 2**32)
CLASH = re.compile(r"([A-H]):[A-HTL=!&|]+[01][TL] no$")


def text_of(attempt: Attempt) -> str:
    return "".join(s.text for s in attempt.think)


def is_honest(problem: KnightsProblem, attempt: Attempt) -> bool:
    """Whether the working is the guess that is answered and every statement truly evaluated up to the first clash."""
    guess = attempt.answer.text
    lines: list[str] = []
    for person, kind, statement in zip("ABCDEFGH", guess, problem.puzzle, strict=False):
        claims, is_true = statement.evaluate(guess)
        clashes = is_true != (kind == "T")
        lines.append(f"{person}:{claims}{int(is_true)}{kind}{' no' if clashes else '.'}")
        if clashes:
            break
    header = "".join(person + kind for person, kind in zip("ABCDEFGH", guess, strict=False))
    return text_of(attempt) == f"{header} {''.join(lines)}"


@given(SEEDS)
def test_right_attempts_are_honest_trained_and_check(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempt = problem.right_attempt(rng)
    assert attempt.is_right
    assert is_honest(problem, attempt)
    assert " no" not in text_of(attempt)
    assert all(s.is_trained for s in (*attempt.think, attempt.answer))
    assert TASK.check(problem.phrase(rng), attempt.answer.text)


@given(SEEDS)
def test_wrong_attempts_are_honest_end_at_a_clash_and_never_repeat(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    question = problem.phrase(rng)
    attempts: list[Attempt] = []
    while len(attempts) < 12 and (attempt := problem.wrong_attempt(rng, attempts)) is not None:
        assert is_honest(problem, attempt)
        assert text_of(attempt).endswith(" no")
        assert not attempt.is_right
        assert not TASK.check(question, attempt.answer.text)
        guess, evaluation = attempt.think
        assert evaluation.is_trained
        assert not guess.is_trained
        assert attempt.answer.is_trained
        attempts.append(attempt)
    answers = [a.answer.text for a in attempts]
    assert len(set(answers)) == len(answers) == min(12, 2 ** len(problem.puzzle) - 1)


@given(SEEDS)
def test_hard_negatives_look_right_and_are_lies(seed: int) -> None:
    rng = Random(seed)
    problem = TASK.sample(rng)
    attempt = problem.false_attempt(rng)
    assert attempt is not None
    assert " no" not in text_of(attempt)
    assert not is_honest(problem, attempt)
    assert not TASK.check(problem.phrase(rng), attempt.answer.text)


def test_the_doubt_names_the_speaker_who_clashed() -> None:
    problem = KnightsProblem(tuple(map(parse_statement, ("B=L", "A=C", "A=T|B=L"))))
    assert problem.reference == "LTL"
    last = problem.wrong_attempt(Random(0), [])
    assert last is not None
    (person,) = CLASH.findall(text_of(last))
    assert f"Oops, {person}.\n" in {problem.doubt(Random(seed), last.value) for seed in range(50)}


def test_wrong_guesses_are_mostly_near_the_solution() -> None:
    rng = Random(2)
    problems = [Knights(5, 5).sample(rng) for _ in range(300)]
    pairs = [(p.reference, p.wrong_attempt(rng, [])) for p in problems]
    distances = [sum(x != y for x, y in zip(r, a.answer.text, strict=True)) for r, a in pairs if a is not None]
    assert sum(distances) / len(distances) < 2  # 2.6 for guesses drawn evenly


def test_canonical_is_the_same_for_every_phrasing() -> None:
    rng = Random(1)
    for _ in range(300):
        problem = TASK.sample(rng)
        puzzle = parse_puzzle(problem.phrase(rng))
        assert puzzle is not None
        assert KnightsProblem(puzzle).canonical == problem.canonical


def test_sizes_follow_their_weights() -> None:
    task = Knights(3, 4, {3: 1, 4: 3})
    rng = Random(0)
    sizes = [len(task.sample(rng).puzzle) for _ in range(1000)]
    assert set(sizes) == {3, 4}
    assert 0.7 < sizes.count(4) / 1000 < 0.8
    with pytest.raises(ValueError, match="2 to 8 people"):
        Knights(2, 9)


def test_cycles_are_short_under_the_bundled_tokenizer() -> None:
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "deploy" / "models" / "policy")
    rng = Random(0)
    for people, mean, most in ((2, 33, 42), (3, 46, 62), (5, 73, 94), (6, 86, 110)):
        task = Knights(people, people)
        lengths: list[int] = []
        for _ in range(300):
            attempt = task.sample(rng).right_attempt(rng)
            text = f"<think>{text_of(attempt)}</think><answer>{attempt.answer.text}</answer>"
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            lengths.append(len(ids))
        assert sum(lengths) / len(lengths) < mean
        assert max(lengths) <= most

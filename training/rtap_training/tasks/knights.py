"""Knights and Knaves task in symbols: find who tells the truth (T) and who lies (L), from one statement per person.

Finding the only consistent guess takes a search; checking it means evaluating each statement. A working is the guess,
then per speaker the statement with the kinds of the people it names, its truth value, the speaker's kind, and whether
the two agree: ``ATBLCL A:BL=L1T.B:AT=L0L.C:AT=T1L no``. ``.`` continues, ``no`` stops at the first clash. Names are
repeated because a small model looks up one thing at a time. Wrong attempts are correctly evaluated wrong guesses: the
evaluation and the answer are trained, the guess is masked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from rtap_training.tasks.base import Attempt, Segment
from rtap_training.tasks.puzzle import (
    KINDS,
    PEOPLE,
    Claim,
    Puzzle,
    Statement,
    first_clash,
    parse_guess,
    parse_puzzle,
    solutions,
)

# Mostly short: the statements already make up most of a prompt.
_PHRASINGS = (
    "knights {c}",
    "knights {c}",
    "Knights: {c}",
    "knights: {c}?",
    "Who lies? {c}",
    "Who lies? {c}",
    "who lies: {c}",
    "{c}. Who lies?",
    "Who is T? {c}",
    "T or L? {c}",
    "{c}",
    "Knights and knaves: {s}",
    "Knights and knaves: {s}.",
    "{s}. Who lies?",
)
_SHUFFLED_SHARE = 0.15
# They end in a line break: a tokenizer may join a space with the masked guess that follows.
_DOUBTS = (
    "Oops, {p}.\n",
    "Oops, {p}.\n",
    "Wait, {p}.\n",
    "Wait, {p}.\n",
    "Hmm, {p} is wrong.\n",
    "Oops, not {p}.\n",
    "Oops.\n",
    "Let me try again:\n",
    "That was wrong.\n",
)
_OTHER_KIND = {"T": "L", "L": "T"}
_WEIGHTS: Mapping[int, float] = {2: 2, 3: 6, 4: 5, 5: 2}


def _distance(a: str, b: str) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _header(guess: str) -> str:
    return "".join(p + k for p, k in zip(PEOPLE, guess, strict=False))


def _verdict(index: int, kind: str, claims: str, *, is_true: bool) -> str:
    """One evaluated statement. The verdict follows from the arguments, which may be false."""
    return f"{PEOPLE[index]}:{claims}{int(is_true)}{kind}{'.' if is_true == (kind == 'T') else ' no'}"


def _evaluation(puzzle: Puzzle, guess: str) -> str:
    """Correct evaluation of every statement up to the first clash."""
    clash = first_clash(puzzle, guess)
    lines: list[str] = []
    for index in range(len(puzzle) if clash is None else clash + 1):
        claims, is_true = puzzle[index].evaluate(guess)
        lines.append(_verdict(index, guess[index], claims, is_true=is_true))
    return "".join(lines)


def _attempt(puzzle: Puzzle, guess: str) -> Attempt:
    clash = first_clash(puzzle, guess)
    is_right = clash is None
    think = (Segment(_header(guess), is_trained=is_right), Segment(f" {_evaluation(puzzle, guess)}"))
    # Copying the guess into the answer is trained; making a wrong guess is not.
    return Attempt(think, Segment(guess), len(puzzle) if clash is None else clash, is_right)


@dataclass(frozen=True, slots=True)
class KnightsProblem:
    """Statements of all people. Sampled problems have exactly one solution."""

    puzzle: Puzzle

    @property
    def canonical(self) -> str:
        """Statements by speaker, commuting operands sorted."""
        return "knights:" + ";".join(s.canonical for s in self.puzzle)

    @property
    def reference(self) -> str:
        """The solution."""
        return solutions(self.puzzle)[0]

    def phrase(self, rng: Random) -> str:
        """One of the phrasings; people are usually listed in order."""
        said = [(p, str(s)) for p, s in zip(PEOPLE, self.puzzle, strict=False)]
        if rng.random() < _SHUFFLED_SHARE:
            rng.shuffle(said)
        short = " ".join(f"{p}:{s}" for p, s in said)
        return rng.choice(_PHRASINGS).format(c=short, s="; ".join(f"{p} says {s}" for p, s in said))

    def right_attempt(self, _rng: Random, /) -> Attempt:
        """The solution with every statement evaluated."""
        return _attempt(self.puzzle, self.reference)

    def wrong_attempt(self, rng: Random, earlier: Sequence[Attempt]) -> Attempt | None:
        """A correctly evaluated wrong guess not in ``earlier``, near the solution or the previous attempt."""
        guess = self._wrong_guess(rng, [a.answer.text for a in earlier])
        return None if guess is None else _attempt(self.puzzle, guess)

    def _wrong_guess(self, rng: Random, tried: Sequence[str] = ()) -> str | None:
        right = solutions(self.puzzle)
        near = (right[0], *tried[-1:])
        misses = [g for g in _guesses(len(self.puzzle)) if g not in right and g not in tried]
        weights = [3.0 ** -min(_distance(g, n) for n in near) for g in misses]
        return rng.choices(misses, weights)[0] if misses else None

    def doubt(self, rng: Random, value: int, /) -> str:
        """A phrase of doubt that usually names the speaker whose statement clashed."""
        return rng.choice(_DOUBTS).format(p=PEOPLE[value])

    def false_attempt(self, rng: Random) -> Attempt | None:
        """A wrong answer with a plausible working: a false verdict at each clash, clashes omitted, the solution's
        evaluation under another guess, or a right working with another answer."""
        guess = self._wrong_guess(rng)
        clash = None if guess is None else first_clash(self.puzzle, guess)
        if guess is None or clash is None:
            return None
        kind_of_lie = rng.randrange(4)
        header = self.reference if kind_of_lie == 0 else guess
        if kind_of_lie < 2:
            evaluation = _evaluation(self.puzzle, self.reference)
        else:
            written = [i for i in range(len(guess)) if kind_of_lie == 3 or i != clash]
            evaluation = "".join(_false_verdict(self.puzzle[i], i, guess, rng) for i in written)
        think = (Segment(f"{_header(header)} {evaluation}", is_trained=False),)
        return Attempt(think, Segment(guess, is_trained=False), clash, is_right=False)


def _guesses(num_people: int) -> list[str]:
    return [format(i, f"0{num_people}b").replace("0", "T").replace("1", "L") for i in range(2**num_people)]


def _false_verdict(statement: Statement, index: int, guess: str, rng: Random) -> str:
    """The statement with an agreeing verdict, made false in one place if needed."""
    claims, is_true = statement.evaluate(guess)
    kind = guess[index]
    if is_true == (kind == "T"):
        return _verdict(index, kind, claims, is_true=is_true)
    match rng.randrange(4):
        case 0:  # the truth of the claims
            return _verdict(index, kind, claims, is_true=not is_true)
        case 1:  # the speaker's kind
            return _verdict(index, _OTHER_KIND[kind], claims, is_true=is_true)
        case 2:  # a kind in the claim that decides
            return _verdict(index, kind, claims[:-1] + _OTHER_KIND[claims[-1]], is_true=not is_true)
        case _:  # the verdict
            return _verdict(index, kind, claims, is_true=is_true).replace(" no", ".")


def _statement(rng: Random, people: str, speaker: str) -> Statement:
    """Random statement: about one person, a comparison of two, or two joined claims."""
    draw = rng.random()
    first, second = rng.sample(people, 2)
    if draw < 0.5:
        others = people if rng.random() < 0.15 else people.replace(speaker, "")
        return Statement((Claim(rng.choice(others), "=", rng.choice(KINDS)),))
    if draw < 0.8:
        return Statement((Claim(first, rng.choice(("=", "!=")), second),))
    claims = tuple(Claim(name, "=", rng.choice(KINDS)) for name in (first, second))
    return Statement(claims, rng.choice("&|"))


class Knights:
    """Knights and Knaves task. weights: relative frequency by number of people (default 1 each)."""

    name = "knights"
    wrong_first_share = 0.4
    # As in Countdown: after any number of misses the next attempt is right about half the time.
    wrong_count_weights = (0.54, 0.24, 0.11, 0.05, 0.03, 0.02, 0.01)

    def __init__(
        self, min_people: int = 2, max_people: int = 5, weights: Mapping[int, float] | None = _WEIGHTS
    ) -> None:
        if not 2 <= min_people <= max_people <= len(PEOPLE):
            raise ValueError(f"a puzzle has 2 to {len(PEOPLE)} people, not {min_people} to {max_people}")
        self._sizes = range(min_people, max_people + 1)
        self._weights = [(weights or {}).get(n, 1.0) for n in self._sizes]

    def sample(self, rng: Random) -> KnightsProblem:
        """A random puzzle with exactly one solution (about one in three draws)."""
        people = PEOPLE[: rng.choices(self._sizes, self._weights)[0]]
        while True:
            puzzle = tuple(_statement(rng, people, speaker) for speaker in people)
            if len(solutions(puzzle)) == 1:
                return KnightsProblem(puzzle)

    def claims(self, question: str) -> bool:
        """True if the text contains one statement each of A, B, …."""
        return parse_puzzle(question) is not None

    def check(self, question: str, answer: str) -> bool:
        """True if exactly the knights of the answer say something true."""
        puzzle = parse_puzzle(question)
        guess = parse_guess(answer, len(puzzle)) if puzzle is not None else None
        return puzzle is not None and guess is not None and first_clash(puzzle, guess) is None

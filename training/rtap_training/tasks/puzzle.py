"""Knights and Knaves puzzles: parsing, evaluation under a guess, brute-force solution.

People are A to H. A guess assigns each a kind, T (knight) or L (knave), one letter per person. It is consistent if
exactly its knights make true statements.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

PEOPLE = "ABCDEFGH"
KINDS = "TL"

_ATOM = r"[A-H]!?=[A-HTL]"
_SAID = re.compile(rf"\b([A-H])(?: ?: ?| says )({_ATOM}(?:[&|]{_ATOM})?)(?![\w=!&|])", re.IGNORECASE)
_CLAIM = re.compile(r"([A-H])(!?=)([A-HTL])")
_MAX_QUESTION = 400


@dataclass(frozen=True, slots=True)
class Claim:
    """``left`` has (``=``) or has not (``!=``) the kind ``right``, which is a kind or a person."""

    left: str
    op: str
    right: str

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}"

    @property
    def canonical(self) -> str:
        """The claim with two people in alphabetical order, because equality of kinds is symmetric."""
        return (
            str(Claim(self.right, self.op, self.left)) if self.right in PEOPLE and self.right < self.left else str(self)
        )

    def under(self, guess: str) -> str:
        """The claim with kinds after names: ``BL=L``, ``AT!=CL``."""
        return f"{_spelled(self.left, guess)}{self.op}{_spelled(self.right, guess)}"

    def holds(self, guess: str) -> bool:
        """True if it is true under ``guess``."""
        return (kind_of(self.left, guess) == kind_of(self.right, guess)) == (self.op == "=")


@dataclass(frozen=True, slots=True)
class Statement:
    """One claim, or two joined by ``&`` or ``|``."""

    claims: tuple[Claim, ...]
    joint: str = ""

    def __str__(self) -> str:
        return self.joint.join(map(str, self.claims))

    @property
    def canonical(self) -> str:
        """The statement with commuting operands sorted."""
        return self.joint.join(sorted(c.canonical for c in self.claims))

    def evaluate(self, guess: str) -> tuple[str, bool]:
        """(claims with kinds, truth value). A second claim is included only if the first does not decide."""
        first, *rest = self.claims
        text, is_true = first.under(guess), first.holds(guess)
        if rest and is_true == (self.joint == "&"):
            return f"{text}{self.joint}{rest[0].under(guess)}", rest[0].holds(guess)
        return text, is_true

    def holds(self, guess: str) -> bool:
        """True if it is true under ``guess``."""
        values = (c.holds(guess) for c in self.claims)
        return any(values) if self.joint == "|" else all(values)


Puzzle = tuple[Statement, ...]
"""Statements by person, in order."""


def kind_of(name: str, guess: str) -> str:
    """Kind of a person under ``guess``; a kind is returned unchanged."""
    return name if name in KINDS else guess[PEOPLE.index(name)]


def _spelled(name: str, guess: str) -> str:
    return name if name in KINDS else name + kind_of(name, guess)


def first_clash(puzzle: Puzzle, guess: str) -> int | None:
    """Index of the first person whose statement contradicts their kind; None if ``guess`` is consistent."""
    for index, (statement, kind) in enumerate(zip(puzzle, guess, strict=True)):
        if statement.holds(guess) != (kind == "T"):
            return index
    return None


@lru_cache(maxsize=8192)
def solutions(puzzle: Puzzle) -> tuple[str, ...]:
    """All consistent guesses."""
    guesses = map("".join, product(KINDS, repeat=len(puzzle)))
    return tuple(g for g in guesses if first_clash(puzzle, g) is None)


def parse_statement(text: str) -> Statement:
    """Parse a valid statement."""
    claims = tuple(Claim(left, op, right) for left, op, right in _CLAIM.findall(text))
    return Statement(claims, next((j for j in "&|" if j in text), ""))


def parse_puzzle(question: str) -> Puzzle | None:
    """Parse a text with one statement per person (``A:B=L`` or ``A says B=L``), in any order.

    None if some statement cannot be parsed, a person speaks twice, or the people are not exactly A, B, C, ….
    """
    if len(question) > _MAX_QUESTION or "=" not in question:
        return None
    said = [(speaker.upper(), parse_statement(text.upper())) for speaker, text in _SAID.findall(question)]
    speakers = sorted(speaker for speaker, _ in said)
    if not 2 <= len(said) <= len(PEOPLE) or "".join(speakers) != PEOPLE[: len(said)]:
        return None
    if re.search(r"[=&|]", _SAID.sub("", question)):
        return None
    puzzle = tuple(statement for _, statement in sorted(said, key=lambda pair: pair[0]))
    return puzzle if _mentioned(puzzle) <= {*speakers, *KINDS} else None


def _mentioned(puzzle: Sequence[Statement]) -> set[str]:
    return {name for s in puzzle for c in s.claims for name in (c.left, c.right)}


def parse_guess(answer: str, num_people: int) -> str | None:
    """Parse ``TLT``, ``t, l, t`` or ``A=T B=L C=T`` into one letter per person; None for anything else."""
    text = answer.strip()
    if len(text) > 8 * len(PEOPLE) or not text.isascii():
        return None
    text = re.sub(r"[\s,;.]", "", text).upper()
    if re.fullmatch(r"(?:[A-H]=[TL])+", text):
        kinds = {text[i]: text[i + 2] for i in range(0, len(text), 3)}
        is_complete = len(text) == 3 * num_people and "".join(sorted(kinds)) == PEOPLE[:num_people]
        return "".join(kinds[p] for p in sorted(kinds)) if is_complete else None
    return text if len(text) == num_people and re.fullmatch(r"[TL]+", text) else None

"""Symbolic statements of Knights and Knaves: read from text, evaluated under a guess, solved by brute force.

People are A to H; a guess gives each a kind, T (knight) or L (knave), as one letter per person in order. A guess is
consistent when exactly its knights say something true. Nothing here knows workings, phrasings or sampling.
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
    """``left`` is (``=``) or is not (``!=``) of the kind ``right``: a kind itself, or the person who has it."""

    left: str
    op: str
    right: str

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}"

    @property
    def canonical(self) -> str:
        """Two people in alphabetical order, since being of one kind is symmetric."""
        return (
            str(Claim(self.right, self.op, self.left)) if self.right in PEOPLE and self.right < self.left else str(self)
        )

    def under(self, guess: str) -> str:
        """With the kind of each person after their name: ``BL=L``, ``AT!=CL``."""
        return f"{_spelled(self.left, guess)}{self.op}{_spelled(self.right, guess)}"

    def holds(self, guess: str) -> bool:
        """Whether it is true under ``guess``."""
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
        """The same for every order of what commutes."""
        return self.joint.join(sorted(c.canonical for c in self.claims))

    def evaluate(self, guess: str) -> tuple[str, bool]:
        """Its claims with the kinds of people, and whether it is true. A second claim is looked at only where
        the first leaves it open, so the last claim written always decides."""
        first, *rest = self.claims
        text, is_true = first.under(guess), first.holds(guess)
        if rest and is_true == (self.joint == "&"):
            return f"{text}{self.joint}{rest[0].under(guess)}", rest[0].holds(guess)
        return text, is_true

    def holds(self, guess: str) -> bool:
        """Whether it is true under ``guess``."""
        values = (c.holds(guess) for c in self.claims)
        return any(values) if self.joint == "|" else all(values)


Puzzle = tuple[Statement, ...]
"""What each person says, in order of the people."""


def kind_of(name: str, guess: str) -> str:
    """The kind of a person under ``guess``; a kind is its own."""
    return name if name in KINDS else guess[PEOPLE.index(name)]


def _spelled(name: str, guess: str) -> str:
    return name if name in KINDS else name + kind_of(name, guess)


def first_clash(puzzle: Puzzle, guess: str) -> int | None:
    """The first person whose statement does not agree with their kind; None when ``guess`` is consistent."""
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
    """Read a statement; ``text`` must be one."""
    claims = tuple(Claim(left, op, right) for left, op, right in _CLAIM.findall(text))
    return Statement(claims, next((j for j in "&|" if j in text), ""))


def parse_puzzle(question: str) -> Puzzle | None:
    """What everybody says, from a text with one ``A:B=L`` or ``A says B=L`` each, in any order.

    None when anything is left over that looks like a statement, when somebody speaks twice, or when somebody who
    speaks or is spoken of is missing from A, B, C, ….
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
    """Read ``TLT``, ``t, l, t`` or ``A=T B=L C=T`` as one letter per person in order; None for anything else."""
    text = answer.strip()
    if len(text) > 8 * len(PEOPLE) or not text.isascii():
        return None
    text = re.sub(r"[\s,;.]", "", text).upper()
    if re.fullmatch(r"(?:[A-H]=[TL])+", text):
        kinds = {text[i]: text[i + 2] for i in range(0, len(text), 3)}
        is_complete = len(text) == 3 * num_people and "".join(sorted(kinds)) == PEOPLE[:num_people]
        return "".join(kinds[p] for p in sorted(kinds)) if is_complete else None
    return text if len(text) == num_people and re.fullmatch(r"[TL]+", text) else None

"""Interfaces of a task: problems, phrasings, attempts, and the train/held-out split.

Tasks depend on the ``random.Random`` passed in and nothing else; they know neither tokens nor models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Protocol

HELD_OUT_PERCENT = 10


class Split(StrEnum):
    """Train or held-out."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Question:
    """One question. answer: a right answer. task: name in reports."""

    question: str
    answer: str
    task: str

    @property
    def identity(self) -> str:
        """Text that identifies the question."""
        return self.question


@dataclass(frozen=True, slots=True)
class PicturedQuestion(Question):
    """A question about an image. image: file path or base64."""

    image: str

    @property
    def identity(self) -> str:
        """Text and image: several images may share a text."""
        return f"{self.question}\n{self.image}"


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a trajectory. is_trained: counts in the loss; False for all false text."""

    text: str
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class Attempt:
    """One cycle: a working and its answer.

    value: result of the working. Countdown compares it with the target; the next cycle's doubt names it.
    """

    think: tuple[Segment, ...]
    answer: Segment
    value: int
    is_right: bool


class Problem(Protocol):
    """One problem of a task, independent of its phrasing."""

    @property
    def canonical(self) -> str:
        """Canonical text, equal for every phrasing and operand order; the split hashes it."""
        ...

    @property
    def reference(self) -> str:
        """One right answer."""
        ...

    def phrase(self, rng: Random) -> str:
        """The question in a random phrasing."""
        ...

    def right_attempt(self, rng: Random, /) -> Attempt:
        """A right working."""
        ...

    def wrong_attempt(self, rng: Random, earlier: Sequence[Attempt]) -> Attempt | None:
        """A wrong working that differs from ``earlier``; None if there is none."""
        ...

    def doubt(self, rng: Random, value: int, /) -> str:
        """Opening phrase of the cycle after a wrong attempt with this ``value``."""
        ...

    def false_attempt(self, rng: Random, /) -> Attempt | None:
        """A wrong answer after a working that looks right: a hard negative for a confidence generator, all masked.

        None if the task has none or this draw found none.
        """
        ...


class Task(Protocol):
    """A family of problems with an exact checker."""

    @property
    def name(self) -> str:
        """Name in files and reports."""
        ...

    @property
    def wrong_first_share(self) -> float:
        """Share of training traces that begin with wrong attempts."""
        ...

    @property
    def wrong_count_weights(self) -> tuple[float, ...]:
        """Relative frequency of 1, 2, ... wrong attempts in those traces."""
        ...

    def sample(self, rng: Random) -> Problem:
        """A random problem of either split."""
        ...

    def claims(self, question: str) -> bool:
        """True if ``question`` belongs to this task."""
        ...

    def check(self, question: str, answer: str) -> bool:
        """True if ``answer`` is right. Both may be any text; hostile input returns False quickly."""
        ...


def split_of(canonical: str) -> Split:
    """Split of a problem by the SHA-256 of its canonical text: stable, independent of phrasing."""
    bucket = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") % 100
    return Split.HELD_OUT if bucket < HELD_OUT_PERCENT else Split.TRAIN


def sample_split(task: Task, rng: Random, split: Split) -> Problem:
    """A random problem of ``task`` that belongs to ``split``."""
    while True:
        problem = task.sample(rng)
        if split_of(problem.canonical) is split:
            return problem


def normalised(text: str) -> str:
    """Key of a text: white space, letter case and a final full stop do not matter."""
    return "".join(text.split()).casefold().removesuffix(".")

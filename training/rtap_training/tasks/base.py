"""What a task is: problems, phrasings, attempts with their truth marked, and the train/held-out split.

Everything is a pure function of the ``random.Random`` passed in; nothing here knows tokens or models.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Protocol

HELD_OUT_PERCENT = 10


class Split(StrEnum):
    """Which questions may be trained on."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Question:
    """One question as it is asked. ``answer`` is one right answer; ``task`` names what it is reported under."""

    question: str
    answer: str
    task: str

    @property
    def identity(self) -> str:
        """What tells it from other questions."""
        return self.question


@dataclass(frozen=True, slots=True)
class PicturedQuestion(Question):
    """A question about an image. ``image``: path of a file, or base64 of one."""

    image: str

    @property
    def identity(self) -> str:
        """The same words may be asked of many images."""
        return f"{self.question}\n{self.image}"


@dataclass(frozen=True, slots=True)
class Segment:
    """Some text of a trajectory. ``is_trained``: the policy should learn to write it (never set on false text)."""

    text: str
    is_trained: bool = True


@dataclass(frozen=True, slots=True)
class Attempt:
    """One cycle: a working and the answer it leads to.

    value: what the working arrives at (Countdown compares it with the target; the doubt of the next cycle names it).
    """

    think: tuple[Segment, ...]
    answer: Segment
    value: int
    is_right: bool


class Problem(Protocol):
    """One question of a task, independent of how it is phrased."""

    @property
    def canonical(self) -> str:
        """The problem as one string, the same for every phrasing and operand order; the split hashes it."""
        ...

    @property
    def reference(self) -> str:
        """One right answer."""
        ...

    def phrase(self, rng: Random) -> str:
        """The question as a person may type it."""
        ...

    def right_attempt(self, rng: Random, /) -> Attempt:
        """A right working."""
        ...

    def wrong_attempt(self, rng: Random, earlier: Sequence[Attempt]) -> Attempt | None:
        """A wrong working that differs from ``earlier``; None when there is none left."""
        ...

    def value_of(self, answer: str, /) -> int | None:
        """What an answer arrives at, as the ``value`` of an attempt; None where it is none that can be doubted."""
        ...

    def doubt(self, rng: Random, value: int, /) -> str:
        """How the cycle after a wrong attempt that arrived at ``value`` begins."""
        ...

    def false_attempt(self, rng: Random, /) -> Attempt | None:
        """A wrong answer behind a working that looks right, in ways a policy rarely samples: a hard negative for a
        confidence generator, nothing of it trained. None where there is no such thing or this draw finds none."""
        ...


class Task(Protocol):
    """A family of problems with an exact checker."""

    @property
    def name(self) -> str:
        """Name in file names, JSONL rows and reports."""
        ...

    @property
    def wrong_first_share(self) -> float:
        """Share of training traces that begin with wrong attempts."""
        ...

    @property
    def wrong_count_weights(self) -> tuple[float, ...]:
        """Relative frequency of 1, 2, ... wrong attempts in those traces."""
        ...

    @property
    def levels(self) -> tuple[int, ...]:
        """Difficulties that are sampled, easiest first."""
        ...

    def sample(self, rng: Random) -> Problem:
        """A random problem of either split."""
        ...

    def claims(self, question: str) -> bool:
        """Whether ``question`` is of this task."""
        ...

    def check(self, question: str, answer: str) -> bool:
        """Whether ``answer`` is right. Any text is allowed in both; hostile input is False, fast."""
        ...

    def level(self, question: str) -> int:
        """Difficulty of a question of this task; 0 for any other text."""
        ...


def split_of(canonical: str) -> Split:
    """The split a problem belongs to, by the SHA-256 of its canonical form: stable for ever, blind to phrasing."""
    bucket = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") % 100
    return Split.HELD_OUT if bucket < HELD_OUT_PERCENT else Split.TRAIN


def sample_split(task: Task, rng: Random, split: Split) -> Problem:
    """A random problem of ``task`` that belongs to ``split``."""
    while True:
        problem = task.sample(rng)
        if split_of(problem.canonical) is split:
            return problem

"""Cold-start trajectories as text with the parts marked that may be trained.

False statements and bad choices are masked, true statements are not, correct results of wrong Countdown attempts
included. Continuing after a wrong answer and ending the turn after a right one are trained. A few traces have a further
cycle after a right answer, as the server opens when the generator is unsure: its content is trained, its opening not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from rtap_core.format import RTAP
from rtap_training.tasks.base import Attempt, Problem, Segment, Split, Task, sample_split

TURN_END = "<|im_end|>"
CONFIRM_SHARE = 0.05
CONFIRMATIONS = ("Let me check again. ", "Let me check. ", "Wait, let me check. ", "Oops, let me check. ", "")
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Think before you answer.",
    "You are a careful mathematician.",
    "Answer briefly.",
    "Reason first, then give the answer.",
    "You are rtap.",
)
SYSTEM_SHARE = 0.08
HISTORY_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of the prompt and the assistant's turn."""

    task: str
    messages: tuple[Message, ...]
    turn: tuple[Segment, ...]


def cycle_segments(attempt: Attempt, doubt: str, *, is_opening_trained: bool = True) -> list[Segment]:
    """Segments of one cycle with its tags."""
    return [
        Segment(RTAP.think_open, is_opening_trained),
        *([Segment(doubt)] if doubt else []),
        *attempt.think,
        Segment(f"{RTAP.think_close}{RTAP.answer_open}"),
        attempt.answer,
        Segment(RTAP.answer_close or ""),
    ]


def build_turn(problem: Problem, rng: Random, num_wrong: int, *, is_confirmed: bool = False) -> tuple[Segment, ...]:
    """``num_wrong`` wrong cycles, a right one, and the end of turn."""
    segments: list[Segment] = []
    attempts: list[Attempt] = []
    for _ in range(num_wrong):
        wrong = problem.wrong_attempt(rng, attempts)
        if wrong is None:
            break
        segments += cycle_segments(wrong, problem.doubt(rng, attempts[-1].value) if attempts else "")
        attempts.append(wrong)
    right = problem.right_attempt(rng)
    segments += cycle_segments(right, problem.doubt(rng, attempts[-1].value) if attempts else "")
    if is_confirmed:
        segments += cycle_segments(right, rng.choice(CONFIRMATIONS), is_opening_trained=False)
    return (*segments, Segment(TURN_END))


def _prompt(task: Task, question: str, rng: Random) -> tuple[Message, ...]:
    messages = [Message("user", question)]
    if rng.random() < HISTORY_SHARE:
        earlier = sample_split(task, rng, Split.TRAIN)
        messages = [Message("user", earlier.phrase(rng)), Message("assistant", earlier.reference), *messages]
    if rng.random() < SYSTEM_SHARE:
        messages = [Message("system", rng.choice(_SYSTEM_PROMPTS)), *messages]
    return tuple(messages)


def sample_conversation(
    tasks: Mapping[str, Task], weights: Mapping[str, float], rng: Random, split: Split = Split.TRAIN
) -> Conversation:
    """A random training conversation. weights: share of each task by name."""
    name = rng.choices(list(weights), list(weights.values()))[0]
    task = tasks[name]
    problem = sample_split(task, rng, split)
    counts = task.wrong_count_weights
    num_wrong = rng.choices(range(1, len(counts) + 1), counts)[0] if rng.random() < task.wrong_first_share else 0
    turn = build_turn(problem, rng, num_wrong, is_confirmed=rng.random() < CONFIRM_SHARE)
    return Conversation(name, _prompt(task, problem.phrase(rng), rng), turn)

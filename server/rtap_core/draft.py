"""A cycle that is being generated: its token ids, and its text parsed into thought and answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import Engine, Step


class StepEvent(NamedTuple):
    """One piece of a cycle. ``think``, ``answer``: its text inside the thought and the answer, without tags."""

    cycle_index: int
    step: Step
    think: str
    in_answer: bool
    answer: str = ""


@dataclass(slots=True)
class Draft:
    """Accumulated state of one cycle.

    context: token ids before the cycle. opening: injected ids that begin it; ``opening_text``: their text.
    closing: end tag to append if the model ended its turn without it; set at the end of the cycle.
    token_ids: all ids of the cycle, the opening included and the closing not.
    first, last: first and last step. Steps between are dropped: an engine's objects are large and thoughts long.
    started, seconds: clock at its start, and its duration once it has ended.
    """

    index: int
    parser: CycleParser
    context: Sequence[int]
    opening: list[int]
    opening_text: str
    started: float
    seconds: float = 0.0
    closing: list[int] = field(default_factory=list[int])
    token_ids: list[int] = field(init=False)
    logprobs: list[tuple[int, Mapping[int, Any]]] = field(init=False)
    first: Step | None = None
    last: Step | None = None

    def __post_init__(self) -> None:
        self.token_ids, self.logprobs = list(self.opening), []

    @property
    def prompt(self) -> list[int]:
        """Token ids that the engine continues."""
        return [*self.context, *self.opening]

    def add(self, step: Step) -> StepEvent:
        """Append the engine's next step."""
        think = self.parser.feed(step.text)
        if step.finished:
            think += self.parser.close(ended_by_model=step.ended_turn)
        self.token_ids.extend(step.token_ids)
        if step.logprobs is not None:
            self.logprobs.extend(step.sampled_logprobs)
        self.first, self.last = self.first or step, step
        in_answer = self.parser.in_answer
        answer = self.parser.take_answer(final=step.finished) if in_answer else ""
        return StepEvent(self.index, step, think, in_answer, answer)

    @property
    def truncated(self) -> bool:
        """The token limit cut the cycle."""
        return self.last is not None and self.last.truncated

    @property
    def ended_turn(self) -> bool:
        """The model ended its turn in this cycle."""
        return self.last is not None and self.last.ended_turn

    @property
    def has_content(self) -> bool:
        """The cycle has more than tags and white space."""
        return bool(self.parser.think.strip() or self.parser.partial_answer)

    @property
    def is_blank(self) -> bool:
        """The model ended its turn without content."""
        return self.ended_turn and not self.has_content

    def complete_ids(self, end_of_turn_ids: frozenset[int]) -> list[int]:
        """The cycle as scorers and later cycles read it: with its end tag, without the end of turn.

        A model that reads its own end of turn stops at once."""
        end = len(self.token_ids)
        while end and self.token_ids[end - 1] in end_of_turn_ids:
            end -= 1
        return self.token_ids[:end] + self.closing


def thought_is_open(prompt: Sequence[int], engine: Engine, fmt: TrajectoryFormat) -> bool:
    """True if ``prompt`` ends with the tag that opens a thought; a chat template may add a newline after it."""
    opening, closing = engine.encode(fmt.think_open), engine.encode(fmt.think_close)
    tail = list(prompt[-len(opening) - 1 :])
    return opening in (tail[1:], tail[:-1]) and tail[-1:] != closing[-1:]

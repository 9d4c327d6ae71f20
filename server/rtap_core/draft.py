"""A cycle that is being generated: its token ids, and its text parsed into thought and answer."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rtap_core.format import CycleParser, TrajectoryFormat
from rtap_core.types import Engine, Step


class StepEvent(NamedTuple):
    """One piece of a cycle. ``think``, ``answer``: its text inside the thought and the answer, without tags.

    taken_back: characters at the end of the answer of earlier steps that belong to a stop string."""

    cycle_index: int
    step: Step
    think: str
    in_answer: bool
    answer: str = ""
    taken_back: int = 0


@dataclass(slots=True)
class Draft:
    """Accumulated state of one cycle.

    context: token ids before the cycle. opening: injected ids that begin it; ``opening_text``: their text.
    closing: tag to append if the cycle ended inside its thought or answer; set at the end of the cycle.
    stop_token_ids: end an answer; they come in steps of their own.
    token_ids: all ids of the cycle, the opening included and the closing not.
    is_stopped: a stop of the request ended the answer; the rest of the engine's cycle is not wanted.
    first, last: first and last step. Steps between are dropped: an engine's objects are large and thoughts long.
    started, seconds: clock at its start, and its duration once it has ended.
    """

    index: int
    parser: CycleParser
    context: Sequence[int]
    opening: list[int]
    opening_text: str
    started: float
    stop_token_ids: Set[int] = frozenset()
    seconds: float = 0.0
    closing: list[int] = field(default_factory=list[int])
    token_ids: list[int] = field(init=False)
    logprobs: list[tuple[int, Mapping[int, Any]]] = field(init=False)
    first: Step | None = None
    last: Step | None = None
    is_stopped: bool = False

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
        stop = self._stop(step)
        if stop is not None:
            self.is_stopped = True
            think += "" if step.finished else self.parser.close(ended_by_model=True)
            step = step._replace(finished=True, truncated=False, ended_turn=True, stop_reason=stop)
        self.token_ids.extend(step.token_ids)
        if step.logprobs is not None:
            self.logprobs.extend(step.sampled_logprobs)
        self.first, self.last = self.first or step, step
        in_answer = self.parser.in_answer
        answer = self.parser.take_answer(final=step.finished) if in_answer else ""
        return StepEvent(self.index, step, think, in_answer, answer, self.parser.taken_back if step.finished else 0)

    def _stop(self, step: Step) -> str | int | None:
        """Stop string or token id of the request that ends the answer in ``step``."""
        if self.parser.stopped_at is not None:
            return self.parser.stopped_at
        if self.stop_token_ids and len(step.token_ids) == 1 and step.token_ids[0] in self.stop_token_ids:
            return step.token_ids[0] if self.parser.stop_before(step.text) else None
        return None

    @property
    def truncated(self) -> bool:
        """The token limit cut the cycle."""
        return self.last is not None and self.last.truncated

    @property
    def ended_turn(self) -> bool:
        """The model ended its turn in this cycle."""
        return self.last is not None and self.last.ended_turn

    @property
    def ended_text(self) -> bool:
        """A stop of the request ended the whole text in this cycle."""
        return self.last is not None and self.last.ended_text

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
    """True if ``prompt`` ends with the tag that opens a thought, as the chat templates of DeepSeek-R1 and QwQ do."""
    return fmt.has_think_tags and _ends_with(prompt, fmt.think_open, engine)


def thought_is_closed(prompt: Sequence[int], engine: Engine, fmt: TrajectoryFormat) -> bool:
    """True if ``prompt`` ends with the tag that closes a thought, as Qwen3's does when thinking is disabled."""
    return fmt.has_think_tags and _ends_with(prompt, fmt.think_close, engine)


def _ends_with(prompt: Sequence[int], tag: str, engine: Engine) -> bool:
    """True if ``prompt`` ends with ``tag`` and line breaks, which may share a token with it."""
    endings = (engine.encode(tag + space) for space in ("", "\n", "\n\n"))
    return any(list(prompt[-len(ending) :]) == ending for ending in endings)


def num_thought_tokens(question: Sequence[int], prompt: Sequence[int], engine: Engine, fmt: TrajectoryFormat) -> int:
    """Number of tokens in the closed thoughts after ``question`` in ``prompt``, without tags."""
    if not fmt.has_think_tags:
        return 0
    ids, is_open = list(prompt[len(question) :]), thought_is_open(question, engine, fmt)
    opening, closing = engine.encode(fmt.think_open), engine.encode(fmt.think_close)
    at = begin = count = 0
    while at < len(ids):
        tag = closing if is_open else opening
        if ids[at : at + len(tag)] != tag:
            at += 1
            continue
        count += at - begin if is_open else 0
        at = begin = at + len(tag)
        is_open = not is_open
    return count

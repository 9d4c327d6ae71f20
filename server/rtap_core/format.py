"""Tags of a Think–Answer trajectory, and the parser that reads them from text arriving in pieces.

Text only: nothing here knows token ids or engines. The parser is linear in the text whatever the chunking
(each character is looked at a bounded number of times), because model output is hostile input.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rtap_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrajectoryFormat:
    """The tags of one cycle and what opens the next one.

    name: preset name, as written in the ``rtap`` block of a checkpoint's ``config.json``.
    answer_open, answer_close: None in the ``think`` preset, whose answer is all text after ``think_close`` up to
        the end of the turn.
    cycle_open: appended to the trajectory to make the model write one more cycle.
    All tags begin with ``<``, which is what lets the parser skip over ordinary text.
    """

    name: str
    think_open: str
    think_close: str
    answer_open: str | None
    answer_close: str | None
    cycle_open: str

    @property
    def has_answer_tags(self) -> bool:
        """Whether a cycle ends at its own tag (``rtap``) rather than at the end of the turn (``think``)."""
        return self.answer_close is not None

    @property
    def tags(self) -> tuple[str, ...]:
        """All that it writes around text."""
        written = (self.think_open, self.think_close, self.answer_open, self.answer_close, self.cycle_open)
        return tuple(tag for tag in written if tag is not None)

    def render_cycle(self, think: str, answer: str) -> str:
        """One cycle as the model would write it (used by training data and by ``/v1/rtap/score``)."""
        return f"{self.think_open}{think}{self.think_close}{self.answer_open or ''}{answer}{self.answer_close or ''}"


# R-TAP sec. 3 writes <think> </think> <answer> </answer>, several pairs in one turn.
RTAP = TrajectoryFormat("rtap", "<think>", "</think>", "<answer>", "</answer>", cycle_open="<think>")
THINK = TrajectoryFormat("think", "<think>", "</think>", None, None, cycle_open="<think>")
PRESETS: Mapping[str, TrajectoryFormat] = {f.name: f for f in (RTAP, THINK)}


def format_from_config(block: Mapping[str, Any] | None, *, override: str | None = None) -> TrajectoryFormat:
    """The format a checkpoint declares in the ``rtap`` block of its ``config.json``, or the preset named ``override``.

    A checkpoint without the block is read as ``think``: a plain reasoning model.
    Raises ConfigError for an unknown preset name.
    """
    declared = dict(block or {})
    name = override or declared.get("format", "think")
    if name not in PRESETS:
        raise ConfigError(f"unknown trajectory format {name!r}; use one of {sorted(PRESETS)}")
    preset = PRESETS[name]
    cycle_open = declared.get("cycle_open")
    return replace(preset, cycle_open=cycle_open) if isinstance(cycle_open, str) else preset


class CycleParser:
    """Split the text of **one** cycle into thinking and answer while it arrives.

    ``feed`` returns thinking as soon as it cannot be part of a tag any more; ``close`` returns what was held back. What
    there is of an answer, which nobody may see before it is judged, is asked for.
    thought_open: the prompt, or the loop that opened this cycle, already wrote ``think_open``.
    prefix: how somebody else began the cycle; it decides where the text goes on, and is no part of what is read.

    Text outside every tag counts as thinking where answers have tags (``rtap``), and as the answer where they have
    none and no thought was opened (``think``: a model that answers at once). Tags of the wrong kind are kept as text,
    so no input is lost and none raises.
    """

    def __init__(self, fmt: TrajectoryFormat, *, thought_open: bool = False, prefix: str = "") -> None:
        self._format = fmt
        self._longest = max(map(len, fmt.tags))
        self._held = ""
        self._blanks: list[str] = []  # before the first character that says how the cycle begins
        self._begun = thought_open or fmt.has_answer_tags
        self._in_answer = False
        self._answer_closed = False
        self._owes_close = False
        self._think: list[str] = []
        self._answer: list[str] = []
        if prefix:
            begun = prefix.rpartition(fmt.answer_close)[2] if fmt.answer_close else prefix  # after whole cycles
            self.feed(begun)
            self._held = "" if self._begun else self._held
            self._think.clear()
            self._answer.clear()

    @property
    def in_answer(self) -> bool:
        """Whether the text now arriving belongs to the answer."""
        return self._in_answer

    @property
    def owes_close(self) -> bool:
        """Whether the model ended its turn inside an answer, before the end tag that the format has for it."""
        return self._owes_close

    @property
    def think(self) -> str:
        """All thinking so far, tags removed."""
        return "".join(self._think)

    @property
    def answer(self) -> str | None:
        """The stripped answer, or None when the cycle was cut before it was complete (never a partial answer)."""
        if not self._answer_closed:
            return None
        return "".join(self._answer).strip() or None

    @property
    def partial_answer(self) -> str | None:
        """What has been written of the answer so far, complete or not."""
        return "".join(self._answer).strip() or None

    def feed(self, text: str) -> str:
        """Consume the next piece of text. Result: what is known to be thinking by it, tags removed."""
        if self._begun and not self._held and "<" not in text:  # as nearly all are
            return self._take(text)
        self._held += text
        if not self._begun:
            self._begin()
        return self._drain(final=False) if self._begun else ""

    def close(self, *, ended_by_model: bool) -> str:
        """End of the cycle; the last of its thinking. ``ended_by_model``: the model ended its turn, which closes an
        answer without end tag."""
        if not self._begun:
            self._start(in_answer=True)
        think = self._drain(final=True)
        if ended_by_model and self._in_answer:
            self._owes_close = self._format.has_answer_tags and not self._answer_closed
            self._answer_closed = True
        return think

    def _begin(self) -> None:
        """Decide whether the cycle starts with a thought, once enough text is here."""
        seen, tag = self._held.lstrip(), self._format.think_open
        if blank := self._held[: len(self._held) - len(seen)]:
            self._blanks.append(blank)
            self._held = seen
        if seen.startswith(tag):
            self._start(in_answer=False)
        elif not tag.startswith(seen):
            self._start(in_answer=True)

    def _start(self, *, in_answer: bool) -> None:
        self._begun, self._in_answer = True, in_answer
        self._held = "".join(self._blanks) + self._held

    def _tags(self) -> tuple[str, ...]:
        """Tags that mean something in the present state."""
        fmt = self._format
        if self._answer_closed:
            return ()
        if self._in_answer:
            return (fmt.answer_close,) if fmt.answer_close else ()
        tags = (fmt.think_open, fmt.think_close)
        return (*tags, fmt.answer_open) if fmt.answer_open else tags

    def _drain(self, *, final: bool) -> str:
        text, self._held = self._held, ""
        think: list[str] = []
        begin = at = 0
        while (at := text.find("<", at)) >= 0 and (tags := self._tags()):
            if text.startswith(tags, at):
                think.append(self._take(text[begin:at]))
                tag = next(t for t in tags if text.startswith(t, at))
                self._enter(tag)
                begin = at = at + len(tag)
            elif not final and len(text) - at < self._longest and any(t.startswith(text[at:]) for t in tags):
                think.append(self._take(text[begin:at]))
                self._held = text[at:]  # may still become a tag
                return "".join(think)
            else:
                at += 1
        think.append(self._take(text[begin:]))
        return "".join(think)

    def _enter(self, tag: str) -> None:
        fmt = self._format
        if tag == fmt.answer_close:
            self._answer_closed = True
        elif tag == fmt.answer_open or (tag == fmt.think_close and fmt.answer_open is None):
            self._in_answer = True

    def _take(self, text: str) -> str:
        """Keep text without tags as what it is in the present state. Result: itself where it is thinking."""
        if self._answer_closed:
            return ""
        (self._answer if self._in_answer else self._think).append(text)
        return "" if self._in_answer else text


def parse_cycle(text: str, fmt: TrajectoryFormat, *, ended_by_model: bool = False) -> tuple[str, str | None]:
    """(think, answer) of one whole cycle; answer is None when it is incomplete."""
    parser = CycleParser(fmt)
    parser.feed(text)
    parser.close(ended_by_model=ended_by_model)
    return parser.think.strip(), parser.answer


def split_cycles(text: str, fmt: TrajectoryFormat = RTAP) -> list[tuple[str, str | None]]:
    """(think, answer) of every cycle of a trajectory in the ``rtap`` format, in order."""
    if fmt.answer_close is None:
        return [parse_cycle(text, fmt, ended_by_model=True)] if text.strip() else []
    parts = text.split(fmt.answer_close)
    cycles = [parse_cycle(part + fmt.answer_close, fmt) for part in parts[:-1]]
    return [*cycles, parse_cycle(parts[-1], fmt)] if parts[-1].strip() else cycles

"""Trajectory formats, and the streaming parser that splits a cycle into thought and answer.

Works on text only; token ids are the engine's. Model output is hostile input, so the parser takes linear time however
the text is chunked.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rtap_core.errors import ConfigError
from rtap_core.types import Continuation


@dataclass(frozen=True, slots=True)
class TrajectoryFormat:
    """Tags of a cycle. Every tag begins with ``<``, so the parser can skip ordinary text.

    name: of the preset, as written in the ``rtap`` block of a checkpoint's ``config.json``.
    think_open, think_close: empty in preset ``text``, whose answer is the whole turn.
    answer_open, answer_close: None in preset ``think``, whose answer is all text from ``think_close`` to the end of
        the turn, and in preset ``text``.
    cycle_open: text appended to the trajectory to make the model write another cycle.
    """

    name: str
    think_open: str
    think_close: str
    answer_open: str | None
    answer_close: str | None
    cycle_open: str

    @property
    def has_think_tags(self) -> bool:
        """True if the model marks its thoughts, False if its whole turn is the answer (``text``)."""
        return bool(self.think_open)

    @property
    def has_answer_tags(self) -> bool:
        """True if a cycle ends at its own tag (``rtap``), False if it ends with the turn (``think``, ``text``)."""
        return self.answer_close is not None

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags of the format."""
        return tuple(filter(None, (self.think_open, self.think_close, self.answer_open, self.answer_close)))

    def render_cycle(self, think: str, answer: str, *, prompt: str = "") -> str:
        """Text of one cycle, as the model would write it after ``prompt``, whose chat template may have opened the
        thought or, with thinking off, closed it."""
        thought, begun = f"{self.think_open}{think}{self.think_close}", prompt.rstrip("\n")
        if self.think_open and begun.endswith(self.think_open):
            thought = thought.removeprefix(self.think_open)
        elif self.think_close and begun.endswith(self.think_close):
            thought = think
        return f"{thought}{self.answer_open or ''}{answer}{self.answer_close or ''}"


# R-TAP sec. 3: <think> </think> <answer> </answer>, several pairs in one turn.
RTAP = TrajectoryFormat("rtap", "<think>", "</think>", "<answer>", "</answer>", cycle_open="<think>")
THINK = TrajectoryFormat("think", "<think>", "</think>", None, None, cycle_open="<think>")
TEXT = TrajectoryFormat("text", "", "", None, None, cycle_open="\n\nWait, let me check this again, step by step.\n")
PRESETS: Mapping[str, TrajectoryFormat] = {f.name: f for f in (RTAP, THINK, TEXT)}


def format_from_config(block: Mapping[str, Any] | None, *, override: str | None = None) -> TrajectoryFormat:
    """Format named by ``override``, else by the ``rtap`` block of a checkpoint's ``config.json``, else ``think``.

    Raises ConfigError for an unknown name."""
    declared = block or {}
    name = override or declared.get("format") or "think"
    if name not in PRESETS:
        raise ConfigError(f"unknown trajectory format {name!r}; use one of {sorted(PRESETS)}")
    cycle_open = declared.get("cycle_open") if declared.get("format", name) == name else None  # of another format
    return replace(PRESETS[name], cycle_open=cycle_open) if cycle_open else PRESETS[name]


def detect_format(
    block: Mapping[str, Any] | None, *, template: str, vocabulary: Container[str], override: str | None = None
) -> tuple[TrajectoryFormat, str]:
    """Format of a model, and what shows it: the flag, the ``rtap`` block, the chat template or the vocabulary.

    A model that knows ``<think>`` or ``</think>`` writes thoughts. template: text of the chat template.
    Raises ConfigError for an unknown name."""
    if override:
        return format_from_config(block, override=override), "--trajectory-format"
    if (block or {}).get("format"):
        return format_from_config(block), "the rtap block of config.json"
    tags = (THINK.think_open, THINK.think_close)
    if any(tag in template for tag in tags):
        return format_from_config(block, override="think"), "<think> in the chat template"
    if all(tag in vocabulary for tag in tags):
        return format_from_config(block, override="think"), "<think> in the vocabulary"
    return format_from_config(block, override="text"), "no <think> in chat template or vocabulary"


def default_recursion(block: Mapping[str, Any] | None) -> Continuation:
    """``recursion`` in the ``rtap`` block of a checkpoint's ``config.json``; without it a model of format ``rtap`` was
    trained to continue, and for any other model further cycles are fresh.

    Raises ConfigError for an unknown value."""
    declared = block or {}
    default = Continuation.CONTINUE if declared.get("format") == RTAP.name else Continuation.FRESH
    name = declared.get("recursion") or default
    names = [continuation.value for continuation in Continuation]
    if name not in names:
        raise ConfigError(f"unknown recursion {name!r} in config.json; use one of {names}")
    return Continuation(name)


class CycleParser:
    """Split the text of one cycle into thought and answer while it arrives.

    ``feed`` returns thinking text once it cannot be part of a tag; ``close`` returns the rest. ``take_answer`` returns
    new text of the answer; the caller decides whether it may be shown before the answer is scored.
    thought_open: the prompt, or the loop, has already written ``think_open``.
    prefix: text that begins the cycle and was not generated. It sets the parser's state and is not part of its results.
    stop: strings that end the answer where they occur in it; white space before it is no part of it. They are ignored
        in the thought. include_stop: keep the string in the answer.

    Text outside every tag is thinking if the format has answer tags. Without them it is the answer, unless a thought
    comes first (a ``think`` model may answer at once, a ``text`` model always does). A tag in the wrong place is kept
    as text. No input raises.
    """

    def __init__(
        self,
        fmt: TrajectoryFormat,
        *,
        thought_open: bool = False,
        prefix: str = "",
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._format = fmt
        self._longest_tag = max(map(len, fmt.tags), default=0)
        self._pending = ""  # text that may still become a tag
        self._leading_space: list[str] = []  # before the first character that shows how the cycle begins
        self._has_begun = thought_open or fmt.has_answer_tags or not fmt.has_think_tags
        self._in_answer = not fmt.has_think_tags
        self._answer_closed = False
        self._closing_tag = fmt.think_close if thought_open else ""
        self._think: list[str] = []
        self._answer: list[str] = []
        self._untaken: list[str] = []  # text of the answer for the next take_answer
        self._skips_space = False  # at the beginning of an answer that follows a tag
        self._waiting_space: list[str] = []  # at the end of an answer that a tag may end
        self._stop: Sequence[str] = ()
        self._include_stop = include_stop
        self._stop_tail = ""  # end of the answer, where a stop string may have begun
        self._stopped_at: str | None = None
        self._taken_back = 0
        if prefix:
            begun = prefix.rpartition(fmt.answer_close)[2] if fmt.answer_close else prefix  # after whole cycles
            self.feed(begun)
            self._pending = "" if self._has_begun else self._pending
            self._think.clear()
            self._answer.clear()
            self._untaken, self._skips_space = [], False
        self._stop = stop

    @property
    def in_answer(self) -> bool:
        """True while the arriving text belongs to the answer."""
        return self._in_answer

    @property
    def stopped_at(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stopped_at

    @property
    def taken_back(self) -> int:
        """Number of characters at the end of what ``take_answer`` has returned that a stop string took back."""
        return self._taken_back

    @property
    def closing_tag(self) -> str:
        """Tag that closes the thought or answer that is open; empty if none is."""
        if not self._format.has_think_tags:
            return ""
        if self._in_answer and not self._format.has_answer_tags:  # the model may have opened a thought after its answer
            begun = "".join(self._answer).rpartition(self._format.think_open)
            return self._format.think_close if begun[1] and self._format.think_close not in begun[2] else ""
        return self._closing_tag

    @property
    def think(self) -> str:
        """All thinking so far, without tags."""
        return "".join(self._think)

    @property
    def answer(self) -> str | None:
        """The complete answer, stripped; None if there is none or it is incomplete."""
        if not self._answer_closed:
            return None
        return "".join(self._answer).strip() or None

    @property
    def partial_answer(self) -> str | None:
        """The answer so far, complete or not, stripped; None if there is none."""
        return "".join(self._answer).strip() or None

    def take_answer(self, *, final: bool) -> str:
        """Answer text since the last call, without the white space next to the format's tags.

        final: the cycle has ended; before that, white space waits if an end tag may follow it."""
        text, self._untaken = "".join(self._untaken), []
        if self._skips_space:
            text = text.lstrip()
            self._skips_space = not text
        if self._format.has_answer_tags and not (final and not self._answer_closed):
            shown = text.rstrip()
            waiting, self._waiting_space = self._waiting_space, [] if shown else self._waiting_space
            self._waiting_space.append(text[len(shown) :])
            return "".join(waiting) + shown if shown else ""
        return "".join(self._waiting_space) + text

    def feed(self, text: str) -> str:
        """Consume the next piece of text. Returns the part now known to be thinking, without tags."""
        if self._has_begun and not self._pending and "<" not in text:  # fast path: nearly every token
            return self._append(text)
        self._pending += text
        if not self._has_begun:
            self._begin()
        return self._consume(final=False) if self._has_begun else ""

    def close(self, *, ended_by_model: bool) -> str:
        """End the cycle. Returns the last of its thinking.

        ended_by_model: the model ended its turn, which completes an answer without end tag."""
        if not self._has_begun:
            self._start(in_answer=True)
        think = self._consume(final=True)
        if ended_by_model and self._in_answer:
            self._answer_closed = True
        return think

    def stop_before(self, text: str) -> bool:
        """End the answer before ``text``, the last piece of it (after it with ``include_stop``).

        False, and nothing happens, if the answer does not end with ``text`` or is blank."""
        answer = "".join(self._answer) + self._pending
        if not self._in_answer or self._answer_closed or not answer.strip() or not answer.endswith(text):
            return False
        self._answer, self._untaken, self._pending = [answer], [*self._untaken, self._pending], ""
        self._end_answer(without=0 if self._include_stop else len(text))
        return True

    def _begin(self) -> None:
        """Decide whether the cycle starts with a thought, once there is enough text."""
        seen, tag = self._pending.lstrip(), self._format.think_open
        if space := self._pending[: len(self._pending) - len(seen)]:
            self._leading_space.append(space)
            self._pending = seen
        if seen.startswith(tag):
            self._start(in_answer=False)
        elif not tag.startswith(seen):
            self._start(in_answer=True)

    def _start(self, *, in_answer: bool) -> None:
        self._has_begun, self._in_answer = True, in_answer
        self._pending = "".join(self._leading_space) + self._pending

    def _active_tags(self) -> tuple[str, ...]:
        """Tags with a meaning in the current state."""
        fmt = self._format
        if self._answer_closed:
            return ()
        if self._in_answer:
            return (fmt.answer_close,) if fmt.answer_close else ()
        tags = (fmt.think_open, fmt.think_close)
        return (*tags, fmt.answer_open) if fmt.answer_open else tags

    def _consume(self, *, final: bool) -> str:
        """Parse the pending text; unless ``final``, keep an end that may still become a tag. Returns its thinking."""
        text, self._pending = self._pending, ""
        think: list[str] = []
        begin = at = 0
        while (at := text.find("<", at)) >= 0 and (tags := self._active_tags()):
            if text.startswith(tags, at):
                think.append(self._append(text[begin:at]))
                tag = next(t for t in tags if text.startswith(t, at))
                self._apply(tag)
                begin = at = at + len(tag)
            elif not final and len(text) - at < self._longest_tag and any(t.startswith(text[at:]) for t in tags):
                think.append(self._append(text[begin:at]))
                self._pending = text[at:]
                return "".join(think)
            else:
                at += 1
        think.append(self._append(text[begin:]))
        return "".join(think)

    def _apply(self, tag: str) -> None:
        """Change state at a tag."""
        fmt = self._format
        if tag == fmt.answer_close:
            self._answer_closed, self._closing_tag = True, ""
        elif tag == fmt.think_open:
            self._closing_tag = fmt.think_close
        elif tag == fmt.think_close:
            self._closing_tag = ""
        if tag == fmt.answer_open or (tag == fmt.think_close and fmt.answer_open is None):
            self._in_answer = self._skips_space = True
            self._closing_tag = fmt.answer_close or ""

    def _append(self, text: str) -> str:
        """Add text without tags to the thought or the answer. Returns it if it is thinking."""
        if self._answer_closed:
            return ""
        if not self._in_answer:
            self._think.append(text)
            return text
        self._answer.append(text)
        self._untaken.append(text)
        if self._stop:
            self._find_stop(text)
        return ""

    def _find_stop(self, text: str) -> None:
        """End the answer at the stop string that is complete first; ``text`` is its new end."""
        seen = self._stop_tail + text
        if not self._stop_tail:
            seen = seen.lstrip()
        found = [(seen.index(stop) + len(stop), stop) for stop in self._stop if stop in seen]
        if not found:
            self._stop_tail = seen[-max(map(len, self._stop)) :]
            return
        end, self._stopped_at = min(found, key=lambda match: match[0])
        self._end_answer(without=len(seen) - (end if self._include_stop else end - len(self._stopped_at)))

    def _end_answer(self, *, without: int) -> None:
        """Close the answer before its last ``without`` characters, and before white space there as at an end tag."""
        text = "".join(self._answer)
        answer = text[: len(text) - without]
        if self._format.has_answer_tags:
            answer = answer.rstrip()
        self._answer, self._answer_closed = [answer], True
        rest = "".join([*self._waiting_space, *self._untaken])
        num_rest = len(rest) - (len(text) - len(answer))
        self._untaken, self._waiting_space, self._taken_back = [rest[: max(0, num_rest)]], [], max(0, -num_rest)


def parse_cycle(text: str, fmt: TrajectoryFormat, *, ended_by_model: bool = False) -> tuple[str, str | None]:
    """(thought, answer) of one whole cycle; the answer is None if it is incomplete."""
    parser = CycleParser(fmt)
    parser.feed(text)
    parser.close(ended_by_model=ended_by_model)
    return parser.think.strip(), parser.answer


def split_cycles(text: str, fmt: TrajectoryFormat = RTAP) -> list[tuple[str, str | None]]:
    """(thought, answer) of every cycle of a trajectory, in order. Without answer tags it has one cycle a turn."""
    if fmt.answer_close is None:
        return [parse_cycle(text, fmt, ended_by_model=True)] if text.strip() else []
    parts = text.split(fmt.answer_close)
    cycles = [parse_cycle(part + fmt.answer_close, fmt) for part in parts[:-1]]
    return [*cycles, parse_cycle(parts[-1], fmt)] if parts[-1].strip() else cycles

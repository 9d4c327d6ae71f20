"""How `rtap chat` shows one turn: pure functions from what has happened so far to what rich prints.

Model text is never markup and never reaches the terminal with control characters (``connection.safe``).
"""

import difflib
import re
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rtap_client.connection import safe
from rtap_client.streams import AnswerEvent, CycleEvent, DoneEvent, Event, ThinkingEvent
from rtap_client.types import Cycle, StopReason

BAR_CELLS = 24
THOUGHT_LINES = 6
GONE_CHARACTERS = 40
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
STOP_WORDS: dict[StopReason, str] = {
    "threshold": "sure enough",
    "model": "the model ended its turn",
    "max_cycles": "no more cycles allowed",
    "max_tokens": "out of tokens",
    "deadline": "out of time",
    "no_gain": "confidence rose no more",
    "vote": "majority",
    "drained": "the server was stopping",
}


@dataclass(slots=True)
class Turn:
    """One question being answered. threshold: None where the policy looks at none."""

    policy: str
    threshold: float | None
    max_cycles: int
    cycles: list[Cycle] = field(default_factory=list[Cycle])
    thought: str = ""
    reasoning: str = ""
    answer: str = ""
    done: DoneEvent | None = None
    stopped: bool = False
    failed: bool = False

    @property
    def noun(self) -> str:
        """What one of ``cycles`` is called."""
        return "sample" if self.policy == "vote" else "cycle"

    def observe(self, event: Event) -> None:
        """Take in what the server says."""
        match event:
            case ThinkingEvent():
                self.thought += event.text
                self.reasoning += event.text
            case AnswerEvent():
                self.answer += event.text
            case CycleEvent():
                self.cycles.append(event.cycle)
                self.thought = ""
            case DoneEvent():
                self.done = event
                if event.rtap is not None:
                    self.cycles = list(event.rtap.cycles)
            case _:
                pass  # a tool call: chat offers no tools


def render(turn: Turn, seconds: float) -> RenderableType:
    """The whole turn. seconds: since the question was sent."""
    if turn.failed:
        return Text("")  # the error is told below
    parts: list[RenderableType] = [_cycles(turn)] if turn.cycles else []
    if turn.done is None and not turn.stopped:
        at_most = f" of at most {turn.max_cycles}" if turn.policy == "confidence" else ""
        label = f"{turn.noun} {len(turn.cycles) + 1}{at_most} · {turn.policy} · {seconds:.1f} s · Ctrl-C stops"
        return Group(*parts, Spinner("dots", Text(label, style="dim")), *_thought(turn))
    if turn.stopped:
        parts.append(Text(f"stopped after {seconds:.1f} s", style="yellow"))
    elif turn.answer:
        parts.append(Panel(Text(safe(turn.answer)), title="answer", title_align="left", border_style="green"))
    else:
        parts.append(Text("no answer was completed; raise max-tokens or the deadline", style="yellow"))
    return Group(*parts, Text(summary(turn, seconds), style="dim"))


def summary(turn: Turn, seconds: float) -> str:
    """Tokens, time and why it stopped, in a line."""
    done, parts = turn.done, list[str]()
    rtap = None if done is None else done.rtap
    if rtap is not None:
        why, link = STOP_WORDS.get(rtap.stop_reason, rtap.stop_reason), "of" if rtap.stop_reason == "vote" else "after"
        parts.append(f"{why} {link} {count(len(rtap.cycles), turn.noun)}")
        if rtap.confidence is not None:
            against = "" if turn.threshold is None else f" (threshold {turn.threshold:.2f})"
            parts.append(f"confidence {rtap.confidence:.3f}{against}")
        if rtap.degraded:
            parts.append(f"without the generator: {rtap.degraded}")
    if done is not None and done.usage is not None:
        parts.append(count(done.usage.completion_tokens, "token"))
    else:
        parts.append(count(sum(cycle.tokens for cycle in turn.cycles), "token"))
    return " · ".join([*parts, f"{seconds:.2f} s"])


def bar(confidence: float | None, threshold: float | None, cells: int = BAR_CELLS) -> Text:
    """A confidence as a bar, with a line where the threshold is."""
    value = 0.0 if confidence is None else min(1.0, max(0.0, confidence))
    filled = round(value * cells)
    line = None if threshold is None else min(cells - 1, round(min(1.0, max(0.0, threshold)) * cells))
    is_enough = threshold is None or value >= threshold
    text = Text()
    for cell in range(cells):
        shown = "│" if cell == line else "█" if cell < filled else "░"
        text.append(shown, "bold" if cell == line else ("green" if is_enough else "red") if cell < filled else "dim")
    return text


def changes(before: str | None, after: str | None) -> Text:
    """An answer: what is new in it is bold, and what is gone from the one before follows, if that is short."""
    if after is None:
        return Text("(cut before its answer was complete)", style="dim italic")
    new = safe(after)
    if before is None:
        return Text(new)
    old = safe(before)
    if old == new:
        return Text.assemble(new, ("  same answer", "dim"))
    a, b, gone = _WORDS.findall(old), _WORDS.findall(new), list[str]()
    text = Text()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        text.append("".join(b[b0:b1]), "" if kind == "equal" else "bold green")
        if kind != "equal" and a0 < a1:
            gone.append("".join(a[a0:a1]))
    if gone and sum(map(len, gone)) <= GONE_CHARACTERS:
        text.append("  gone: ", "dim").append(" ".join(gone), "red strike")
    return text


def _cycles(turn: Turn) -> Table:
    """Accepted is the cycle that was returned; of a vote, every sample that agrees with it."""
    chosen = {cycle.answer for cycle in turn.cycles if cycle.accepted} if turn.policy == "vote" else set[str | None]()
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "left", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(overflow="fold")
    before: str | None = None
    for cycle in turn.cycles:
        value = "  –  " if cycle.confidence is None else f"{cycle.confidence:.3f}"
        table.add_row(
            str(cycle.index + 1),
            Text("✓", "bold green") if cycle.accepted or cycle.answer in chosen else Text("✗", "red"),
            bar(cycle.confidence, turn.threshold),
            value,
            Text(f"{cycle.tokens} tok", "dim"),
            Text(f"{cycle.seconds:.2f} s", "dim"),
            changes(before, cycle.answer),
        )
        before = before if cycle.answer is None else cycle.answer
    return table


def _thought(turn: Turn) -> list[RenderableType]:
    """The last lines of what is being thought; a rejected answer, which comes first, is in the table already."""
    text = safe(turn.thought)
    if turn.cycles and turn.cycles[-1].answer is not None:
        text = text.replace(f"<answer>{safe(turn.cycles[-1].answer)}</answer>", "", 1)
    lines = text.strip().splitlines()[-THOUGHT_LINES:]
    return [Text("\n".join(lines), style="dim italic")] if lines else []


def count(number: int, noun: str) -> str:
    """3 tokens, 1 token."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

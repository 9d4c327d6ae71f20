"""Rendering of a streamed reply in `rtap chat`, as rich renderables.

Model text is never parsed as markup and is printed without control characters (``commands.printable``).
"""

import difflib
import re
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rtap_client.commands import printable
from rtap_client.streams import AnswerEvent, CycleEvent, DoneEvent, DraftEvent, Event, ThinkingEvent
from rtap_client.types import Cycle, Draft, StopReason

BAR_CELLS = 24
THOUGHT_LINES = 6
MAX_REMOVED_CHARACTERS = 40  # longer removals are not shown
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
STOP_PHRASES: dict[StopReason, str] = {
    "threshold": "reached the threshold",
    "model": "the model ended its turn",
    "max_cycles": "cycle limit reached",
    "max_tokens": "token limit reached",
    "deadline": "deadline reached",
    "no_gain": "confidence stopped rising",
    "samples": "majority",
    "agreement": "agreement",
    "drained": "the server is shutting down",
}


@dataclass(slots=True)
class LiveReply:
    """State of a reply while it streams. threshold: None if the policy has none.

    draft: all text so far of the cycle that is being written. rejected: the answer that the reasoning repeats next."""

    policy: str
    threshold: float | None
    max_cycles: int
    cycles: list[Cycle] = field(default_factory=list[Cycle])
    thought: str = ""
    reasoning: str = ""
    draft: Draft | None = None
    rejected: str = ""
    answer: str = ""
    done: DoneEvent | None = None
    stopped: bool = False
    failed: bool = False

    @property
    def noun(self) -> str:
        """Name of one item of ``cycles``."""
        return "sample" if self.policy == "vote" else "cycle"

    def observe(self, event: Event) -> None:
        """Add one event."""
        match event:
            case ThinkingEvent():
                self.thought += event.text
                self.reasoning += event.text
            case DraftEvent(draft=new):
                old = self.draft if self.draft is not None and self.draft.index == new.index else Draft(index=new.index)
                self.draft = Draft(index=new.index, text=old.text + new.text, think=old.think + new.think)
            case AnswerEvent():
                self.answer += event.text
                self.draft = None
            case CycleEvent():
                self.cycles.append(event.cycle)
                self.thought = self.rejected = ""
                if self.draft is not None and self.draft.index == event.cycle.index:
                    self.rejected, self.draft = self.draft.text, None
            case DoneEvent():
                self.done = event
                if event.rtap is not None:
                    self.cycles = list(event.rtap.cycles)
            case _:
                pass  # tool calls: chat sends no tools


def render(reply: LiveReply, seconds: float) -> RenderableType:
    """Render the whole reply. seconds: time since the question was sent."""
    if reply.failed:
        return Text("")  # the error is printed below
    parts: list[RenderableType] = [_cycles(reply)] if reply.cycles else []
    if reply.done is None and not reply.stopped:
        at_most = f" of at most {reply.max_cycles}" if reply.policy == "confidence" else ""
        label = f"{reply.noun} {len(reply.cycles) + 1}{at_most} · {reply.policy} · {seconds:.1f} s · Ctrl-C stops"
        return Group(*parts, Spinner("dots", Text(label, style="dim")), *being_written(reply))
    if reply.stopped:
        parts.append(Text(f"stopped after {seconds:.1f} s", style="yellow"))
    elif reply.answer:
        confidence = None if reply.done is None or reply.done.rtap is None else reply.done.rtap.confidence
        doubt = not_sure(confidence, reply.threshold)
        title, color = ("answer", "green") if doubt is None else (f"answer · {doubt}", "yellow")
        parts.append(Panel(Text(printable(reply.answer)), title=title, title_align="left", border_style=color))
    else:
        parts.append(Text("no cycle completed an answer; raise --max-tokens or --deadline", style="yellow"))
    return Group(*parts, Text(summary(reply, seconds), style="dim"))


def not_sure(confidence: float | None, threshold: float | None) -> str | None:
    """Warning next to an answer whose confidence is below the threshold."""
    if confidence is None or threshold is None or confidence >= threshold:
        return None
    return f"not sure ({confidence:.2f}, needs {threshold:.2f})"


def summary(reply: LiveReply, seconds: float) -> str:
    """One line: stop reason, confidence, tokens and time."""
    done, parts = reply.done, list[str]()
    rtap = None if done is None else done.rtap
    if rtap is not None:
        reason = STOP_PHRASES.get(rtap.stop_reason, rtap.stop_reason)
        link = "of" if rtap.stop_reason in ("samples", "agreement") else "after"
        parts.append(f"{reason} {link} {count(len(rtap.cycles), reply.noun)}")
        if rtap.confidence is not None:
            threshold = "" if reply.threshold is None else f" (threshold {reply.threshold:.2f})"
            parts.append(f"confidence {rtap.confidence:.3f}{threshold}")
        if rtap.degraded:
            parts.append(f"without the generator: {rtap.degraded}")
    if done is not None and done.usage is not None:
        parts.append(count(done.usage.completion_tokens, "token"))
    else:
        parts.append(count(sum(cycle.tokens for cycle in reply.cycles), "token"))
    return " · ".join([*parts, f"{seconds:.2f} s"])


def bar(confidence: float | None, threshold: float | None, cells: int = BAR_CELLS) -> Text:
    """Draw a confidence as a bar, with a line at the threshold."""
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
    """Mark the new parts of an answer, and append short parts that it no longer has."""
    if after is None:
        return Text("(cut before its answer was complete)", style="dim italic")
    new = printable(after)
    if before is None:
        return Text(new)
    old = printable(before)
    if old == new:
        return Text.assemble(new, ("  same answer", "dim"))
    a, b, removed = _WORDS.findall(old), _WORDS.findall(new), list[str]()
    text = Text()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        text.append("".join(b[b0:b1]), "" if kind == "equal" else "bold green")
        if kind != "equal" and a0 < a1:
            removed.append("".join(a[a0:a1]))
    if removed and sum(map(len, removed)) <= MAX_REMOVED_CHARACTERS:
        text.append("  removed: ", "dim").append(" ".join(removed), "red strike")
    return text


def _cycles(reply: LiveReply) -> Table:
    """One row per cycle. In a vote, every sample that agrees with the answer has a check mark."""
    chosen = {cycle.answer for cycle in reply.cycles if cycle.accepted} if reply.policy == "vote" else set[str | None]()
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "left", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(overflow="fold")
    before: str | None = None
    for cycle in reply.cycles:
        value = "  –  " if cycle.confidence is None else f"{cycle.confidence:.3f}"
        table.add_row(
            str(cycle.index + 1),
            _mark(cycle, reply.threshold, is_chosen=cycle.accepted or cycle.answer in chosen),
            bar(cycle.confidence, reply.threshold),
            value,
            Text(f"{cycle.tokens} tok", "dim"),
            Text(f"{cycle.seconds:.2f} s", "dim"),
            changes(before, cycle.answer),
        )
        before = before if cycle.answer is None else cycle.answer
    return table


def _mark(cycle: Cycle, threshold: float | None, *, is_chosen: bool) -> Text:
    if not is_chosen:
        return Text("✗", "red")
    return Text("✓", "bold green") if not_sure(cycle.confidence, threshold) is None else Text("?", "bold yellow")


def being_written(reply: LiveReply) -> list[RenderableType]:
    """The last lines of the answer that is being written, or else of the thinking."""
    draft = reply.draft
    if draft is not None and draft.text:
        heading = Text(f"{reply.noun} {draft.index + 1}, not judged yet:", style="dim")
        return [heading, Text(_last_lines(draft.text), style="dim")]
    lines = _last_lines(_thought(reply) if draft is None else draft.think)
    return [Text(lines, style="dim italic")] if lines else []


def _last_lines(text: str) -> str:
    return "\n".join(printable(text).strip().splitlines()[-THOUGHT_LINES:])


def _thought(reply: LiveReply) -> str:
    """The thinking without the rejected answer at its beginning, which was shown already."""
    rejected = reply.rejected or (reply.cycles[-1].answer or "" if reply.cycles else "")
    tag, end_tag = r"<[^<>\s]{1,40}>", r"</[^<>\s]{1,40}>"
    known = re.escape(rejected.strip())
    # Without its draft an answer is known only in its short form, which is whole only between tags.
    pattern = rf"\s*({tag})?{known}({end_tag})?" if reply.rejected else rf"\s*{tag}{known}{end_tag}"
    return re.sub(rf"\A{pattern}", "", reply.thought) if rejected else reply.thought


def count(number: int, noun: str) -> str:
    """Format a number with its noun: 3 tokens, 1 token."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

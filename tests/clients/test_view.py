"""Rendering of `rtap chat`: bars, changes, running and finished replies, hostile model text."""

import io
import re

import pytest
from rich.console import Console, RenderableType

from rtap_client.commands import printable
from rtap_client.streams import AnswerEvent, CycleEvent, DoneEvent, DraftEvent, ThinkingEvent
from rtap_client.types import Cycle, Draft, Trajectory
from rtap_client.view import LiveReply, bar, changes, render, summary
from tests.clients.fake_server import CYCLE, RTAP

HOSTILE = "[bold]x[/bold]\x1b[2J\x1b]0;owned\x07\x9b31m4\r"


def printed(shown: RenderableType, width: int = 100, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **options).print(shown)
    return out.getvalue()


def cycle(index: int, answer: str | None, confidence: float | None, *, accepted: bool = False) -> Cycle:
    return Cycle.construct(**CYCLE | {"index": index, "answer": answer, "confidence": confidence, "accepted": accepted})


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [
        (0.5, None, "█████░░░░░"),
        (0.0, 0.5, "░░░░░│░░░░"),
        (1.0, 0.5, "█████│████"),
        (0.3, 1.0, "███░░░░░░│"),
        (None, 0.0, "│░░░░░░░░░"),
        (7.0, -1.0, "│█████████"),
    ],
)
def test_a_bar_shows_the_confidence_and_where_the_threshold_is(confidence, threshold, expected):
    assert bar(confidence, threshold, cells=10).plain == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, "25*3", "25*3"),
        ("25*3", "25*3", "25*3  same answer"),
        ("25+7", "25*3", "25*3  removed: +7"),
        ("25", "25*3", "25*3"),
        ("a " * 50, "b", "b"),
        ("25", None, "(cut before its answer was complete)"),
    ],
)
def test_changes_between_answers(before, after, expected):
    assert changes(before, after).plain == expected


def test_new_parts_are_bold():
    text = changes("25+7", "25*3")
    marked = ["".join(text.plain[s.start : s.end]) for s in text.spans if s.style == "bold green"]
    assert marked == ["*3"]


def test_a_running_reply_shows_cycles_and_the_last_thoughts_without_the_rejected_answer():
    reply = LiveReply("confidence", 0.5, 4)
    for event in (
        ThinkingEvent("first thought", 0),
        CycleEvent(cycle(0, "25*3", 0.1), 0),
        ThinkingEvent("\n<answer>25*3</answer>\n" + "\n".join(f"line {i}" for i in range(20)), 0),
    ):
        reply.observe(event)
    shown = printed(render(reply, 1.25))
    assert "cycle 2 of at most 4 · confidence · 1.2 s · Ctrl-C stops" in shown
    assert re.search(r"1 ✗ ██░+│░+ 0\.100 7 tok", shown)
    assert "line 19" in shown
    assert "line 13" not in shown
    assert "first thought" not in shown
    assert "<answer>" not in shown


def test_a_draft_is_shown_until_its_cycle_ends_and_is_not_repeated_as_thinking():
    reply = LiveReply("confidence", 0.5, 4)
    paragraph = "First add.\nSo it is \\boxed{75}."
    for text in (paragraph[:9], paragraph[9:] + "\x1b[2J\n"):
        reply.observe(DraftEvent(Draft(index=0, text=text), 0))
    shown = printed(render(reply, 1.0))
    assert re.search(r"cycle 1, not judged yet: *\nFirst add\. *\nSo it is \\boxed\{75\}\.\[2J", shown)
    reply.observe(CycleEvent(cycle(0, "75", 0.1), 0))
    reply.observe(ThinkingEvent(f"\n{paragraph}\x1b[2J\n", 0))
    shown = printed(render(reply, 1.0))
    assert "First add" not in shown
    assert "75" in shown
    reply.observe(DraftEvent(Draft(index=1, text="76"), 0))
    assert "cycle 2, not judged yet" in printed(render(reply, 1.0))
    reply.observe(AnswerEvent("76", 0))
    assert reply.draft is None


def test_a_draft_of_a_vote_shows_one_sample_first_its_thinking():
    reply = LiveReply("vote", None, 4)
    reply.observe(DraftEvent(Draft(index=1, think="2+2"), 0))
    assert "2+2" in printed(render(reply, 1.0))
    reply.observe(DraftEvent(Draft(index=1, text="4"), 0))
    assert "sample 2, not judged yet" in printed(render(reply, 1.0))
    reply.observe(DraftEvent(Draft(index=2, text="5"), 0))  # the next one that is shown
    assert "4" not in printed(render(reply, 1.0)).partition("yet:")[2]


def test_a_finished_reply_shows_the_answer_and_why_it_stopped():
    reply = LiveReply("confidence", 0.5, 4)
    reply.observe(AnswerEvent("4", 0))
    rtap = Trajectory.construct(**RTAP)
    reply.observe(DoneEvent("id", "4", "stop", rtap, (rtap,), None))
    shown = printed(render(reply, 0.5))
    assert "─ answer ─" in shown
    assert "reached the threshold after 1 cycle · confidence 0.900 (threshold 0.50) · 7 tokens · 0.50 s" in shown
    assert "Ctrl-C" not in shown


def test_an_answer_below_the_threshold_is_not_sure():
    reply = LiveReply("confidence", 0.76, 4)
    reply.observe(AnswerEvent("4", 0))
    below = {**RTAP, "stop_reason": "max_cycles", "confidence": 0.13, "cycles": [{**CYCLE, "confidence": 0.13}]}
    rtap = Trajectory.construct(**below)
    reply.observe(DoneEvent("id", "4", "stop", rtap, (rtap,), None))
    shown = printed(render(reply, 0.5), force_terminal=True, color_system="standard")
    assert "answer · not sure (0.13, needs 0.76)" in shown
    assert "\x1b[1;33m?" in shown
    assert "\x1b[32m" not in shown  # no green


def test_a_vote_counts_samples_and_marks_those_that_agree_with_the_answer():
    reply = LiveReply("vote", None, 8)
    assert "sample 1 · vote · 1.0 s" in printed(render(reply, 1.0))
    cycles = [{**CYCLE, "index": i, "answer": a, "accepted": i == 0} for i, a in enumerate(("4", "5", "4"))]
    rtap = Trajectory.construct(**{**RTAP, "policy": "vote", "stop_reason": "samples", "cycles": cycles})
    reply.observe(DoneEvent("id", "4", "stop", rtap, (rtap,), None))
    shown = printed(render(reply, 0.5))
    assert re.findall(r"^\d ([✓✗])", shown, re.MULTILINE) == ["✓", "✗", "✓"]
    assert "majority of 3 samples · confidence 0.900 · " in shown


def test_a_stopped_reply_and_one_without_an_answer_say_so():
    reply = LiveReply("model", None, 4, cycles=[cycle(0, None, None)], stopped=True)
    assert "stopped after 2.0 s" in printed(render(reply, 2.0))
    assert summary(reply, 2.0) == "7 tokens · 2.00 s"
    cut = LiveReply("model", None, 4, done=DoneEvent("id", "", "length", None, (), None))
    assert "no cycle completed an answer; raise --max-tokens or --deadline" in printed(render(cut, 1.0))


def test_hostile_model_text_is_shown_without_control_characters():
    reply = LiveReply("confidence", 0.5, 4, cycles=[cycle(0, HOSTILE, 0.1)], thought=HOSTILE)
    finished = LiveReply("confidence", 0.5, 4, answer=HOSTILE, done=DoneEvent("id", HOSTILE, "stop", None, (), None))
    for shown in (printed(render(reply, 1.0)), printed(render(finished, 1.0))):
        assert "[bold]x[/bold]" in shown
        assert not set(shown) & set("\x1b\x07\x9b\r")


def test_printable_text_keeps_lines_and_letters():
    assert printable("a\tb\nç→𝟙" + HOSTILE) == "a\tb\nç→𝟙[bold]x[/bold][2J]0;owned31m4"


def test_a_narrow_terminal_shows_the_whole_answer():
    shown = printed(render(LiveReply("confidence", 0.5, 4, cycles=[cycle(0, "abcdefghij" * 4, 0.2)]), 1.0), width=70)
    assert sum(shown.split("⠋")[0].count(letter) for letter in "hij") == 12
